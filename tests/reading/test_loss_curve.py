"""The loss curve keeps sums and means in a fixed number of bins."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.reading.loss_curve import LossCurve


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    bins=st.sampled_from([2, 4, 16]),
    skip=st.sampled_from([0, 0, 1, 30, 100]),
)
@settings(deadline=None)
def test_loss_curve_keeps_sums_and_means(sizes: list[int], bins: int, skip: int) -> None:
    losses = np.random.default_rng(0).random(sum(sizes)).astype(np.float32)
    curve = LossCurve(np.zeros(bins), skip=skip)
    for chunk in np.split(losses, np.cumsum(sizes)[:-1]):
        curve.add(chunk)
    losses = losses[skip:]  # those of the text
    assert curve.tokens == len(losses) <= curve.bin_tokens * bins
    assert curve.sums.sum() == pytest.approx(losses.sum(), abs=1e-4)
    for start in range(0, len(losses), curve.bin_tokens):
        stop = min(start + curve.bin_tokens, len(losses))
        assert curve.mean(start, stop) == pytest.approx(losses[start:stop].mean(), abs=1e-5)
