"""Test time: a model reads a text that may never end, mini-batch by mini-batch, and learns from it.

All that the text leaves behind is one value, `ReadState`. `inner_loop.step` has the step itself, `inference.session`
what people use.

Shapes: B sequences, T tokens, b tokens of a mini-batch, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_e2e.inner_loop.functions import EAGER, LoopFunctions
from ttt_e2e.inner_loop.meta_loss import static_cache_view
from ttt_e2e.inner_loop.step import (
    InnerLoopState,
    MiniBatch,
    empty_caches,
    initial_state,
    inner_step,
    inner_step_,
    tree_map,
)
from ttt_e2e.model.kv_cache import KVCache
from ttt_e2e.model.mixers.attention import Attention
from ttt_e2e.model.mixers.base import CacheView
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.ops.attention import causal_window_mask
from ttt_e2e.ops.elementwise import accumulation_dtype


class ReadState(NamedTuple):
    """All that a text leaves behind in a model between two mini-batches: a value, to keep, copy or save.

    The first dimension of every tensor is the batch. Rows that have read different numbers of tokens may have empty
    slots in their caches, and can be learned from only when they have none.
    """

    position: int  # tokens read so far; where rows have read different numbers, the smallest of them
    static: tuple[Any, ...] | None  # states of the mixers below the lowest fast weight; None before the first token
    loop: InnerLoopState  # fast weights, and caches of the mixers above
    position_offsets_B: Tensor | None = None  # how many tokens more each row has read, int64; None if none has

    def tensors(self) -> list[Tensor]:
        """All tensors that `map` changes, in its order."""
        return [t for value in self.static or () for t in value] + self.loop.tensors()

    def map(self, change: Callable[[Tensor], Tensor]) -> "ReadState":
        """The state with `change` applied to every tensor but `position_offsets_B`."""
        static = None if self.static is None else tree_map(self.static, change)
        return self._replace(static=static, loop=self.loop.map(change))


def start_reading(model: Transformer, batch: int, dtype: torch.dtype = torch.float32) -> ReadState:
    """The state before the first token of `batch` texts. Raises UserError if the model is for another dtype."""
    model.check_products(dtype)
    return ReadState(0, None, initial_state(model, batch, dtype).map(Tensor.detach))


class PrefixOutput(NamedTuple):
    """What `Transformer.forward_prefix` returns for a mini-batch: it does not depend on what is learned."""

    x_BbD: Tensor  # the residual stream
    static: tuple[Any, ...]  # states of the mixers after it


@torch.no_grad()
def read_ahead(
    model: Transformer, state: ReadState, tokens_BT: Tensor, dtype: torch.dtype = torch.float32
) -> list[PrefixOutput]:
    """The prefix over the next mini-batches at once, for `read_mini_batch` to take one after the other.

    The matrices are then read from memory once for all of them. The list ends with the last whole mini-batch, or with
    what fits in a window. It is empty where that is only one, and where the prefix has other mixers than attention:
    their states after each mini-batch would not be known.

    Args:
        model, state, dtype: as for `read_mini_batch`.
        tokens_BT: token ids.
    """
    b, mixers = model.config.tokens_per_read, [block.mixer for block in (*model.prefix, *model.suffix[:1])]
    length = min(tokens_BT.shape[1], model.config.sliding_window) // b * b
    if length < 2 * b or not all(isinstance(mixer, Attention) for mixer in mixers):
        return []
    tokens_BT = tokens_BT[:, :length]
    positions = model.positions(state.position, length, dtype, state.position_offsets_B)
    view = _cache_view(model, state, length, dtype)._replace(keep_all=True)
    x_BTD, caches = model.forward_prefix(tokens_BT, positions, state.static, dtype, view)
    return [
        PrefixOutput(
            x_BTD[:, stop - b : stop],
            tuple(cache.without_last(length - stop).last(m.window) for cache, m in zip(caches, mixers, strict=True)),
        )
        for stop in range(b, length + 1, b)
    ]


@torch.no_grad()
def read_mini_batch(
    model: Transformer,
    state: ReadState,
    tokens_Bb: Tensor,
    targets_Bb: Tensor,
    mask_Bb: Tensor | None = None,
    *,
    learn: bool = True,
    inner_lr: float | None = None,
    dtype: torch.dtype = torch.float32,
    functions: LoopFunctions = EAGER,
    donate_state: bool = False,
    prefix: PrefixOutput | None = None,
) -> tuple[ReadState, Tensor, Tensor]:
    """Read one mini-batch, score it, and learn from it. No graph is built.

    Args:
        model: any model; it is not changed.
        state: what the texts have left behind so far.
        tokens_Bb, targets_Bb: token ids, and the ids that follow them, int64.
        mask_Bb: 1 where a target counts; None: all count.
        learn: whether the fast weights are updated. Without learning any number of tokens may come at once.
        inner_lr: inner learning rate; None for the model's own.
        dtype: of the matrix products.
        functions: `EAGER`, or compiled ones.
        donate_state: the caller gives `state` away, whose memory nothing else uses (such as a copy). The
            next state then takes its place, which is faster where many texts are read together. It has no effect
            where nothing is learned, and compiled functions do not support it.
        prefix: of this mini-batch, from `read_ahead`; None to compute it here, as compiled functions always do.

    Returns:
        The next state, the losses [B, b] in nats, and the norms [B] of the unclipped gradients, 0 without learning.
    """
    if tokens_Bb.numel() == 0:  # no sequences, or no tokens
        losses_Bb = torch.empty_like(tokens_Bb, dtype=accumulation_dtype(dtype))
        return state._replace(position=state.position + tokens_Bb.shape[1]), losses_Bb, losses_Bb.sum(1)
    if not (learn and model.suffix):
        x_BbD, after = _forward(model, state, tokens_Bb, dtype)
        nll_Bb, _ = model.losses(x_BbD, targets_Bb)
        return after, nll_Bb, nll_Bb.new_zeros(len(nll_Bb))
    length, window = tokens_Bb.shape[1], model.config.sliding_window
    mask_Bb = (torch.ones_like(targets_Bb) if mask_Bb is None else mask_Bb).to(accumulation_dtype(dtype))
    positions = model.positions(state.position, length, dtype, state.position_offsets_B)
    lr = torch.tensor(model.config.inner_loop.lr if inner_lr is None else inner_lr)
    lr = lr.to(tokens_Bb.device, accumulation_dtype(dtype))
    static, loop = state.static, state.loop
    has_windows_only = set(model.config.mixers) == {"window"}  # whose states can have their final size from the start
    if functions.static_cache and has_windows_only and length == model.config.mini_batch_size:
        # A state holds filled slots only; the compiled function is given a whole window of them.
        view = static_cache_view(min(state.position, window), length, window, window, positions.cos)
        if static is None:
            static = empty_caches(model, model.config.prefix_layers + 1, len(tokens_Bb), dtype)
        loop = InnerLoopState(tree_map(loop.fast, Tensor.contiguous), _last_slots(loop.caches, window))
        static, loop, nll_Bb, norm_B = functions.read_and_learn(
            model, _last_slots(static, window), loop, tokens_Bb, targets_Bb, mask_Bb, positions, view, lr, dtype
        )
        filled = min(window, state.position + length)
        static, loop = _last_slots(static, filled), loop._replace(caches=_last_slots(loop.caches, filled))
    else:
        view = _cache_view(model, state, length, dtype)._replace(donated=donate_state)
        x_BbD, static = prefix or model.forward_prefix(tokens_Bb, positions, static, dtype, view)
        step = inner_step_ if donate_state else inner_step
        loop, nll_Bb, norm_B = step(model, loop, MiniBatch(x_BbD, targets_Bb, mask_Bb, positions, view), lr)
    return state._replace(position=state.position + length, static=static, loop=loop), nll_Bb, norm_B


@torch.no_grad()
def forward(
    model: Transformer, state: ReadState, tokens_BT: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ReadState]:
    """Logits [B, T, V] after each of the tokens, and the state after them; nothing is learned."""
    x_BTD, after = _forward(model, state, tokens_BT, dtype)
    return model.logits(x_BTD), after


def _forward(model: Transformer, state: ReadState, tokens_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, ReadState]:
    positions = model.positions(state.position, tokens_BT.shape[1], dtype, state.position_offsets_B)
    view = _cache_view(model, state, tokens_BT.shape[1], dtype)
    x_BTD, static = model.forward_prefix(tokens_BT, positions, state.static, dtype, view)
    loop = state.loop
    if model.suffix:
        x_BTD, caches, _ = model.forward_suffix(x_BTD, positions, loop.fast, loop.caches, view, second_order=False)
        loop = loop._replace(caches=caches)
    return x_BTD, state._replace(position=state.position + tokens_BT.shape[1], static=static, loop=loop)


def _cache_view(model: Transformer, state: ReadState, length: int, dtype: torch.dtype) -> CacheView:
    """What attention has to know to read `length` tokens more.

    Rows that have read different numbers of tokens may have empty slots, unless every window is full.
    """
    window = model.config.sliding_window
    has_read = state.static is not None  # a text may begin at any position
    full_windows = has_read and state.position >= window and "full" not in model.config.mixers
    if state.position_offsets_B is not None and not full_windows:
        return CacheView(seq_lens=state.position + state.position_offsets_B)
    device = model.embedding.device
    if full_windows and length > 1 and device.type == "cpu":  # one mask for all; a GPU's operators need none
        like = torch.empty(0, dtype=dtype, device=device)
        return CacheView(attn_mask_TS=causal_window_mask(length, window + length, window, like))
    return CacheView()


def _last_slots(caches: tuple[KVCache, ...], slots: int) -> tuple[KVCache, ...]:
    """Caches of the last `slots` slots, with empty ones in front where there are fewer."""
    return tree_map(caches, lambda t: t if t.shape[2] == slots else F.pad(t, (0, 0, slots - t.shape[2], 0)))
