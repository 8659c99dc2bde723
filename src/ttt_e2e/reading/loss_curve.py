"""The losses along a text, in memory that does not grow with the text."""

from dataclasses import dataclass, field

import numpy as np

BINS = 512


@dataclass
class LossCurve:
    """Sums of the losses along a text over bins of `bin_tokens` tokens. When all bins are full, neighbours merge."""

    sums: np.ndarray = field(default_factory=lambda: np.zeros(BINS))  # an even number
    bin_tokens: int = 1
    tokens: int = 0
    skip: int = 0  # how many of the next losses belong to tokens before the text, which were pending in the session

    def add(self, losses: np.ndarray) -> None:
        """Append losses [n], one per token, without those to skip."""
        skipped = min(self.skip, len(losses))
        self.skip -= skipped
        losses = losses[skipped:]
        stop = self.tokens + len(losses)
        while stop > self.bin_tokens * len(self.sums):
            pairs = self.sums.reshape(-1, 2).sum(1)
            self.sums = np.concatenate((pairs, np.zeros_like(pairs)))
            self.bin_tokens *= 2
        bins = np.arange(self.tokens, stop) // self.bin_tokens
        self.sums += np.bincount(bins, losses.astype(np.float64), len(self.sums))
        self.tokens = stop

    def mean(self, start: float = 0.0, stop: float | None = None) -> float:
        """The mean loss of tokens `start` to `stop` (default: all); within a bin every token has its mean."""
        stop = self.tokens if stop is None else stop
        full = -(-self.tokens // self.bin_tokens)
        edges = np.minimum(np.arange(full + 1) * self.bin_tokens, self.tokens)
        sums = np.concatenate(([0.0], self.sums[:full].cumsum()))
        first, last = np.interp([start, stop], edges, sums)
        return float(last - first) / (stop - start)
