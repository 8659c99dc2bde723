"""When an optional package's kernels are taken, and the errors where they are required."""

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ttt_e2e.errors import UserError
from ttt_e2e.ops.kernel_library import KernelLibrary, find_functions

LIBRARY = KernelLibrary("fast-things", "fast", "A mixer", "fast_things", ("chunk", "step"))


@pytest.fixture(autouse=True)
def fresh_cache() -> Iterator[None]:
    find_functions.cache_clear()
    yield
    find_functions.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    module = ModuleType("fast_things")
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, "fast_things", module)


def on_gpu(dtype: torch.dtype) -> Any:
    return SimpleNamespace(is_cuda=True, dtype=dtype)


def test_auto_takes_the_kernels_in_16_bits_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, chunk=max, step=min)
    assert LIBRARY.choose("auto", on_gpu(torch.bfloat16)) == (max, min)
    assert LIBRARY.choose("auto", on_gpu(torch.float16)) == (max, min)
    assert LIBRARY.choose("auto", on_gpu(torch.float32)) is None
    assert LIBRARY.choose("auto", torch.empty(1, dtype=torch.bfloat16)) is None
    monkeypatch.setattr("ttt_e2e.ops.kernel_library.is_compiling", lambda: True)
    assert LIBRARY.choose("auto", on_gpu(torch.bfloat16)) is None


def test_torch_never_takes_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, chunk=max, step=min)
    assert LIBRARY.choose("torch", on_gpu(torch.bfloat16)) is None


def test_fused_requires_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, chunk=max, step=min)
    LIBRARY.check("fused")
    assert LIBRARY.choose("fused", on_gpu(torch.float32)) == (max, min)
    with pytest.raises(UserError, match="A mixer with kernels=fused runs on a GPU only, but its input is on cpu"):
        LIBRARY.choose("fused", torch.empty(1))


@pytest.mark.parametrize("functions", [None, {}, {"chunk": max}])
def test_fused_requires_the_package(functions: dict[str, object] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not installed, or without one of the functions: "auto" does without it."""
    if functions is None:
        monkeypatch.setitem(sys.modules, "fast_things", None)  # its import fails
    else:
        install(monkeypatch, **functions)
    assert LIBRARY.choose("auto", on_gpu(torch.bfloat16)) is None
    LIBRARY.check("auto")
    message = r"A mixer with kernels=fused needs fast-things; install it with pip install 'ttt-e2e\[fast\]'"
    for call in (lambda: LIBRARY.check("fused"), lambda: LIBRARY.choose("fused", on_gpu(torch.bfloat16))):
        with pytest.raises(UserError, match=message):
            call()
