"""Ctrl-C that finishes the step: the first signal asks to stop, the next one acts as usual."""

import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self, TypeVar

_Item = TypeVar("_Item")


class GracefulStop:
    """While open, the first of `signals` only sets `requested`; the next one does what it did before.

    merge_seconds: signals within this time of the first count as one. A Ctrl-C under torchrun arrives twice, from the
    terminal and from torchrun. Outside the main thread, where Python allows no handlers, nothing changes.
    """

    def __init__(self, *signals: signal.Signals, merge_seconds: float = 0.0) -> None:
        self.requested = False
        self._signals = signals
        self._merge_seconds = merge_seconds
        self._requested_at = 0.0
        self._waiting = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def until_requested(self, items: Iterator[_Item]) -> Iterator[_Item]:
        """The items until a stop is requested, which also interrupts the wait for the next one."""
        while not self.requested:
            self._waiting = True
            try:
                item = next(items)
            except (StopIteration, KeyboardInterrupt):
                return
            finally:
                self._waiting = False
            yield item

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._requested_at = True, time.monotonic()
            if self._waiting:
                raise KeyboardInterrupt
        elif time.monotonic() - self._requested_at >= self._merge_seconds:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
