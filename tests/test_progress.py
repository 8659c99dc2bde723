"""A progress bar is no worse for a clock that is set back."""

import io
import itertools
import time

import pytest
import tqdm.std

from ttt_e2e.progress import ProgressBar


def test_bar_goes_on_while_the_clock_goes_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    falling, rising = itertools.count(1e9, -1000.0), itertools.count(0.0)
    monkeypatch.setattr(tqdm.std, "time", lambda: next(falling))
    monkeypatch.setattr(time, "monotonic", lambda: next(rising))
    for bar_type in (tqdm.std.tqdm, ProgressBar):
        out = io.StringIO()
        with bar_type(total=5, file=out, unit="step") as bar:
            for _ in range(4):
                bar.update()
            assert ("4/5" in out.getvalue()) is (bar_type is ProgressBar)
    assert "1.00step/s" in out.getvalue()
