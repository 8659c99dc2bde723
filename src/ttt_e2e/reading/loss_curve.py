"""The losses along a text, in memory that does not grow with the text."""

import numpy as np

BINS = 512


class LossCurve:
    """Sums of the losses along a text over bins of `bin_tokens` tokens. When all bins are full, neighbours merge."""

    def __init__(self, bins: int = BINS) -> None:
        assert bins % 2 == 0
        self.bin_tokens = 1
        self.tokens = 0
        self.sums = np.zeros(bins)

    @classmethod
    def restore(cls, bin_tokens: int, tokens: int, sums: np.ndarray) -> "LossCurve":
        """The curve that had these values."""
        curve = cls(len(sums))
        curve.bin_tokens, curve.tokens, curve.sums = bin_tokens, tokens, sums
        return curve

    def add(self, losses: np.ndarray) -> None:
        """Append losses [n], one per token."""
        stop = self.tokens + len(losses)
        while stop > self.bin_tokens * len(self.sums):
            pairs = self.sums.reshape(-1, 2).sum(1)
            self.sums = np.concatenate((pairs, np.zeros_like(pairs)))
            self.bin_tokens *= 2
        bins = np.arange(self.tokens, stop) // self.bin_tokens
        self.sums += np.bincount(bins, losses.astype(np.float64), len(self.sums))
        self.tokens = stop

    def total(self, start: float = 0.0, stop: float | None = None) -> float:
        """The sum of the losses of tokens `start` to `stop` (default: all); within a bin every token has its mean."""
        full = -(-self.tokens // self.bin_tokens)
        edges = np.minimum(np.arange(full + 1) * self.bin_tokens, self.tokens)
        sums = np.concatenate(([0.0], self.sums[:full].cumsum()))
        first, last = np.interp([start, self.tokens if stop is None else stop], edges, sums)
        return float(last - first)

    def mean(self, start: float, stop: float) -> float:
        """The mean loss of tokens `start` to `stop`."""
        return self.total(start, stop) / (stop - start)
