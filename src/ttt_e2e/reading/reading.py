"""A reading under way: who reads which text, how far they have come, and what was measured."""

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ttt_e2e.inference.session import Diverged, Session
from ttt_e2e.reading.loss_curve import LossCurve


@dataclass
class Reading:
    """A session that reads a text, and perhaps a baseline that reads the same without learning."""

    session: Session
    baseline: Session | None
    name: str
    total_bytes: int | None  # of the text, if known
    initial_digest: str = ""  # of the text that the session had read before
    notebook_start: int | None = None  # the notebook's character at which the text begins; None: it is not recorded
    tokens: int = 0
    bytes: float = 0.0
    seconds: float = 0.0
    learning_seconds: float = 0.0  # of the session, without the baseline
    curve: LossCurve = field(default_factory=LossCurve)
    baseline_curve: LossCurve = field(default_factory=LossCurve)
    token_hash: Any = field(default_factory=hashlib.sha256)

    def read(self, ids: np.ndarray, size: float) -> str | None:
        """Read the token ids [n] of `size` bytes of text; returns how learning diverged, if it did."""
        diverged = self._learn(lambda: self.session.read_chunks(ids))
        if self.baseline is not None:
            self.baseline_curve.add(self.baseline.read(ids))
        self.add_chunk(ids, size)
        return diverged

    def score_pending(self) -> str | None:
        """Add the losses of the last tokens, which fill no mini-batch; returns how learning diverged, if it did."""
        return self._learn(lambda: [self.session.score_pending()])

    def score_pending_of_baseline(self) -> None:
        """Add those of the baseline, if there is one."""
        if self.baseline is not None:
            self.baseline_curve.add(self.baseline.score_pending())

    def add_chunk(self, ids: np.ndarray, size: float) -> None:
        """Count `size` bytes of the text, whose token ids [n] are `ids`, as read."""
        self.tokens += len(ids)
        self.bytes += size
        self.token_hash.update(ids.astype("<i8").tobytes())

    def describe(self) -> str:
        """Speed and losses so far, for a progress bar."""
        if self.curve.tokens == 0:
            return "filling the first mini-batch"
        without = f" ({self.baseline_curve.mean():.3f} without learning)" if self.baseline_curve.tokens else ""
        speed = self.curve.tokens / max(self.learning_seconds, 1e-9)
        return f"{speed:,.0f} tokens/s, loss {self.curve.mean():.3f}{without}"

    def _learn(self, losses_of: Callable[[], Iterable[np.ndarray]]) -> str | None:
        """Add the session's losses of this text and the time that they take; returns how learning diverged."""
        started = time.perf_counter()
        try:
            for losses in losses_of():
                self.curve.add(losses)
        except Diverged as error:
            return str(error)
        finally:
            self.learning_seconds += time.perf_counter() - started
        return None
