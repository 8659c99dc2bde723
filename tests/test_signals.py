"""Ctrl-C that finishes the step."""

import signal
from collections.abc import Iterator

import pytest

from ttt_e2e.signals import GracefulStop


def test_graceful_stop_keeps_the_first_signal_and_passes_on_the_second() -> None:
    previous = signal.getsignal(signal.SIGINT)
    with GracefulStop(signal.SIGINT) as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == previous


def test_graceful_stop_merges_signals_that_come_together() -> None:
    with GracefulStop(signal.SIGINT, signal.SIGTERM, merge_seconds=1e6) as stop:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.requested


def test_graceful_stop_interrupts_the_wait_for_the_next_item() -> None:
    def items() -> Iterator[int]:
        yield 1
        signal.raise_signal(signal.SIGINT)
        yield 2

    with GracefulStop(signal.SIGINT) as stop:
        assert list(stop.until_requested(items())) == [1]
        assert stop.requested


def test_graceful_stop_finishes_the_item_at_hand() -> None:
    done = []
    with GracefulStop(signal.SIGINT) as stop:
        for item in stop.until_requested(iter([1, 2, 3])):
            if item == 2:
                signal.raise_signal(signal.SIGINT)
            done.append(item)
    assert done == [1, 2]
