"""What the process asks of the machine."""

import ctypes
import platform
from types import SimpleNamespace

import pytest

from ttt_e2e.hardware import keep_freed_memory


@pytest.mark.parametrize("libc", ["glibc", ""])
def test_keep_freed_memory_asks_glibc_and_no_other(libc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    library = SimpleNamespace(mallopt=lambda name, value: asked.update({name: value}))
    monkeypatch.setattr(platform, "libc_ver", lambda: (libc, "2.39" if libc else ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    keep_freed_memory()
    # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    assert asked == ({-1: 2**31 - 1, -3: 32 << 20} if libc else {})


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_glibc_takes_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    mallopt, answers = ctypes.CDLL(None).mallopt, []
    library = SimpleNamespace(mallopt=lambda name, value: answers.append(mallopt(name, value)))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    keep_freed_memory()
    assert answers == [1, 1]
