"""What the tests of sessions share."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ttt_e2e.inference.session import Session
from ttt_e2e.inner_loop.step import tree_map

TEXT = "Die Straße war naß – 雨が降った 🌧️. The rain had stopped; the street was still wet.\n" * 8


def tokens_of(count: int, seed: int = 0, vocabulary: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, count)


def having_read(session: Session, tokens: np.ndarray | str) -> Session:
    session.read(tokens)
    return session


def same_state(one: Session, other: Session) -> bool:
    """Whether two sessions have the same state, bit for bit."""
    a, b = one.state(), other.state()
    return (
        one.position == other.position
        and np.array_equal(a.pending, b.pending)
        and all(torch.equal(x, y) for x, y in zip(a.read_state.tensors(), b.read_state.tensors(), strict=True))
    )


def with_fast_weights(session: Session, change: Callable[[Tensor], Tensor]) -> Session:
    """A fork of the session whose fast weights are changed."""
    state = session.state()
    loop = state.read_state.loop._replace(fast=tree_map(state.read_state.loop.fast, change))
    return session.with_state(state._replace(read_state=state.read_state._replace(loop=loop)))
