"""The functions that training and reading call, as a value: as they stand, or compiled (`inner_loop.compiled`)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ttt_e2e.inner_loop.step import InnerLoopState, MiniBatch, inner_step, mini_batch_loss
from ttt_e2e.model.kv_cache import KVCache
from ttt_e2e.model.mixers.base import CacheView, Positions
from ttt_e2e.model.transformer import Transformer


class LoopFunctions(NamedTuple):
    """`EAGER`, or what `compiled_functions` gives."""

    forward_prefix: Callable[[Transformer, Tensor, Positions, torch.dtype, bool], Tensor]
    losses: Callable[[Transformer, Tensor, Tensor], Tensor]
    mini_batch_loss: Callable[[Transformer, InnerLoopState, MiniBatch], tuple[Tensor, tuple[KVCache, ...]]]
    inner_step: Callable[[Transformer, InnerLoopState, MiniBatch, Tensor], tuple[InnerLoopState, Tensor, Tensor]]
    read_and_learn: Callable[..., tuple[tuple[KVCache, ...], InnerLoopState, Tensor, Tensor]]
    static_cache: bool  # caches have all their slots from the start, so that all mini-batches have the same shapes


def forward_prefix(
    model: Transformer, tokens_BT: Tensor, positions: Positions, dtype: torch.dtype, recompute: bool = False
) -> Tensor:
    """The residual stream [B, T, D] below the lowest fast weight, of a text from its start.

    recompute: see `Transformer.forward_prefix`.
    """
    return model.forward_prefix(tokens_BT, positions, None, dtype, recompute=recompute)[0]


def losses(model: Transformer, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
    """Every target's loss [B, T] in nats."""
    return model.losses(x_BTD, targets_BT)[0]


def read_and_learn(
    model: Transformer,
    static: tuple[KVCache, ...] | None,
    loop: InnerLoopState,
    tokens_Bb: Tensor,
    targets_Bb: Tensor,
    mask_Bb: Tensor,
    positions: Positions,
    cache_view: CacheView,
    lr: Tensor,
    dtype: torch.dtype,
) -> tuple[tuple[KVCache, ...], InnerLoopState, Tensor, Tensor]:
    """A whole mini-batch of reading, from tokens to updated fast weights: `forward_prefix`, then `inner_step`.

    Args:
        static, loop: states of the mixers below the loop (None at the start of a text), and the loop's own state.
        tokens_Bb, targets_Bb, mask_Bb: token ids, the ids after them, and which of these count.
        positions, cache_view: see `Mixer.forward`.

    Returns the next `static`, and what `inner_step` returns.
    """
    x_BbD, static = model.forward_prefix(tokens_Bb, positions, static, dtype, cache_view)
    return static, *inner_step(model, loop, MiniBatch(x_BbD, targets_Bb, mask_Bb, positions, cache_view), lr)


EAGER = LoopFunctions(forward_prefix, losses, mini_batch_loss, inner_step, read_and_learn, static_cache=False)
