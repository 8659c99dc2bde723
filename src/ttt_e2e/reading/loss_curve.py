"""The losses along a text, in a memory that does not grow with it."""

import numpy as np

BINS = 512


class Curve:
    """The losses along a text: sums over bins of `width` tokens. When `bins` are full, neighbours are merged."""

    def __init__(self, bins: int = BINS) -> None:
        assert bins % 2 == 0
        self.width = 1
        self.tokens = 0
        self.sums = np.zeros(bins)

    @classmethod
    def restore(cls, width: int, tokens: int, sums: np.ndarray) -> "Curve":
        """The curve that had these values."""
        curve = cls(len(sums))
        curve.width, curve.tokens, curve.sums = width, tokens, sums
        return curve

    def add(self, losses: np.ndarray) -> None:
        """Append losses [n], one a token."""
        stop = self.tokens + len(losses)
        while stop > self.width * len(self.sums):
            pairs = self.sums.reshape(-1, 2).sum(1)
            self.sums = np.concatenate((pairs, np.zeros_like(pairs)))
            self.width *= 2
        at = np.arange(self.tokens, stop) // self.width
        self.sums += np.bincount(at, losses.astype(np.float64), len(self.sums))
        self.tokens = stop

    def total(self, start: float = 0.0, stop: float | None = None) -> float:
        """The sum of the losses of tokens `start` to `stop` (default: all), within a bin by its mean."""
        full = -(-self.tokens // self.width)
        edges = np.minimum(np.arange(full + 1) * self.width, self.tokens)
        sums = np.concatenate(([0.0], self.sums[:full].cumsum()))
        first, last = np.interp([start, self.tokens if stop is None else stop], edges, sums)
        return float(last - first)

    def mean(self, start: float, stop: float) -> float:
        """The mean loss of tokens `start` to `stop`."""
        return self.total(start, stop) / (stop - start)
