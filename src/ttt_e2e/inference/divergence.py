"""Whether a mini-batch's loss or gradient shows that learning diverged, and the error that says so."""

import math

import numpy as np

from ttt_e2e.errors import Divergence

# A mean loss above this many times ln(vocabulary), the loss of a uniform guess, is divergence, if it is above so many
# nats too: with few tokens to choose from, a sound model may be as wrong as that, but not as sure of it.
_LIMIT, _LEAST_LIMIT = 10.0, 30.0


class Diverged(Divergence):
    """Learning while reading diverged; the reader is back at its last good state, after `position` tokens.

    what: the loss or the gradient that showed it; empty if nothing had been learned.
    """

    def __init__(self, message: str, position: int, what: str = "") -> None:
        super().__init__(message)
        self.position = position
        self.what = what


def find_divergence(
    losses: np.ndarray, norm: float, position: int, vocab_size: int, *, learns: bool, text: str = ""
) -> tuple[str, bool] | None:
    """What is wrong with a mini-batch, and whether the update before it is to blame; None if nothing is wrong.

    Its loss judges the update before it. A gradient that is not finite would only spoil the next state.

    Args:
        losses: of its tokens, in nats [n].
        norm: of its gradient; 0 if nothing is learned from it.
        position: tokens before it.
        vocab_size: of the model.
        learns: whether the text is learned from; the first update comes after the first mini-batch.
        text: the text's name, for the message.

    Raises:
        Diverged: nothing was learned yet and the loss is not finite, so the model's weights are to blame.
    """
    at = f"at tokens {position} to {position + len(losses)}{f' of {text}' if text else ''}"
    loss, learned = float(losses.mean()), learns and position > 0
    if not learned and not math.isfinite(loss):
        raise Diverged(
            f"The model has a loss of {loss} {at} although nothing was learned; "
            "its weights are not fit for use, train or load another model.",
            position,
        )
    if learned and not loss <= max(_LEAST_LIMIT, _LIMIT * math.log(vocab_size)):
        return f"the loss {at} is {loss:.4g} nats per token", True
    return None if math.isfinite(norm) else (f"the gradient {at} is {norm}", False)


def rolled_back_error(what: str, position: int, known: bool) -> Diverged:
    """The error of a session that went back to `position`. known: whether a good state was known there."""
    back = "back at its last good state" if known else "at a state that may be unusable: no earlier one is known"
    return Diverged(
        f"Learning diverged: {what}; the session is {back}, after {position} tokens. "
        "Read without learning, or use a model with a smaller inner_loop.lr.",
        position,
        what,
    )
