"""What counts as divergence."""

import math

import numpy as np
import pytest

from ttt_e2e.inference.divergence import Diverged, find_divergence

LIMIT = 10 * math.log(50)


@pytest.mark.parametrize(
    ("loss", "norm", "position", "learns", "expected"),
    [
        (3.0, 1.0, 5, True, None),
        (LIMIT - 0.01, 1.0, 5, True, None),
        (LIMIT + 0.01, 1.0, 5, True, ("the loss at tokens 5 to 9 of war.txt is 39.13 nats per token", True)),
        (math.nan, 1.0, 5, True, ("the loss at tokens 5 to 9 of war.txt is nan nats per token", True)),
        (3.0, math.inf, 5, True, ("the gradient at tokens 5 to 9 of war.txt is inf", False)),
        (LIMIT + 0.01, 0.0, 5, False, None),  # a poor model may have any loss
        (LIMIT + 0.01, 1.0, 0, True, None),  # no update is to blame yet
        (3.0, math.nan, 0, True, ("the gradient at tokens 0 to 4 of war.txt is nan", False)),
    ],
)
def test_find_divergence(loss: float, norm: float, position: int, learns: bool, expected: tuple | None) -> None:
    losses = np.array([0.0, loss, loss, 2 * loss])
    assert find_divergence(losses, norm, position, 50, learns=learns, text="war.txt") == expected


@pytest.mark.parametrize(("position", "learns"), [(0, True), (5, False)])
def test_find_divergence_blames_the_model_if_nothing_was_learned(position: int, learns: bool) -> None:
    with pytest.raises(Diverged, match="nothing was learned; its weights are not fit for use"):
        find_divergence(np.array([math.nan]), 0.0, position, 50, learns=learns)


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 20])
def test_few_tokens_to_choose_from_are_no_cause_for_alarm(vocab_size: int) -> None:
    """A sound model may give a token a probability of 1e-9, whatever the vocabulary."""
    assert find_divergence(np.array([-math.log(1e-9)]), 1.0, 5, vocab_size, learns=True) is None
    for loss in (30.1, math.inf, math.nan):
        assert find_divergence(np.array([loss]), 1.0, 5, vocab_size, learns=True) is not None
