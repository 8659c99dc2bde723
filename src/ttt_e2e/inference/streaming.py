"""Test time: a model reads a text that may never end, mini-batch by mini-batch, and learns from it.

All that the text leaves behind is one value, `ReadState`. See `inner_loop` for the step itself, `session` for what
people use.

Shapes: B sequences, T tokens, b tokens of a mini-batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.inner_loop.step import (
    EAGER,
    LoopFunctions,
    State,
    empty_caches,
    initial_state,
    read_and_learn,
    tree_map,
    with_empty,
)
from ttt_e2e.model.mixers.attention import Cache
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.ops.elementwise import accumulation_dtype


class ReadState(NamedTuple):
    """All that a text leaves behind in a model, at a border between mini-batches: a value, to keep, copy or save.

    position: tokens read so far. static: states of the mixers below the lowest fast weight. loop: the rest.
    ahead_B: how much further than `position` each text is, int64, where texts at different positions are read together;
    None where all are at `position`. Their caches may begin with empty slots then, but cannot be learned from.
    """

    position: int
    static: tuple[Any, ...] | None
    loop: State
    position_offsets_B: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors that `map` changes, in its order."""
        return [t for value in self.static or () for t in value] + self.loop.tensors()

    def map(self, change: Callable[[Tensor], Tensor]) -> "ReadState":
        """The same with every tensor changed but `position_offsets_B`; their first dimension is the batch."""
        static = None if self.static is None else tree_map(self.static, change)
        loop = State(tree_map(self.loop.fast, change), tree_map(self.loop.caches, change))
        return self._replace(static=static, loop=loop)


def stacked(states: Sequence[ReadState], rows: Sequence[int], positions: Sequence[int]) -> ReadState:
    """Texts in one state, in their order: row `rows[i]` of `states[i]`, which has read `positions[i]` tokens; a copy.

    Their states have the same shapes, but for the number of slots of their caches.
    """
    columns = zip(*(state.tensors() for state in states), strict=True)

    def join(like: Tensor) -> Tensor:
        parts = [t[row : row + 1] for row, t in zip(rows, next(columns), strict=True)]
        if len({part.shape for part in parts}) > 1:  # caches of texts of different lengths
            slots = max(part.shape[2] for part in parts)
            parts = [F.pad(part, (0, 0, slots - part.shape[2], 0)) for part in parts]
        return torch.cat(parts)

    state, position_offsets_B, start = states[0].map(join), None, min(positions)
    if max(positions) > start or any(state.position_offsets_B is not None for state in states):
        device = states[0].tensors()[0].device
        position_offsets_B = torch.tensor([position - start for position in positions], device=device)
    return state._replace(position=start, position_offsets_B=position_offsets_B)


def start_reading(model: Transformer, batch: int, dtype: torch.dtype = torch.float32) -> ReadState:
    """The state before the first token of `batch` texts."""
    state = initial_state(model, batch, dtype)
    return ReadState(0, None, State(tree_map(state.fast, Tensor.detach), state.caches))


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
    in_place: bool = False,
) -> tuple[ReadState, Tensor, Tensor]:
    """Read one mini-batch, score it, and learn from it; returns the next state, the losses and the gradient norms [B].

    learn: whether the fast weights are updated. inner_lr: None for the model's own. Without learning any number of tokens may come at once, and the norms
    are zero. Nothing in the result hangs on a graph. in_place: whoever calls gives `state` away, whose memory is its
    own (as that of `stacked`): the next one takes its place, which is faster where many texts are read together.
    Uncompiled only; where nothing is learned it changes nothing.
    """
    if not (learn and model.suffix):
        x_BbD, after = _forward(model, state, tokens_Bb, dtype)
        nll_Bb, _ = model.losses(x_BbD, targets_Bb)
        return after, nll_Bb, nll_Bb.new_zeros(len(nll_Bb))
    length, window = tokens_Bb.shape[1], model.config.sliding_window
    if mask_Bb is None:
        mask_Bb = torch.ones_like(targets_Bb, dtype=accumulation_dtype(dtype))
    place = model.place(state.position, length, dtype, state.position_offsets_B)._replace(in_place=in_place)
    static, loop = state.static, state.loop
    lr = model.config.inner_loop.lr if inner_lr is None else inner_lr
    step_size = torch.tensor(lr, dtype=accumulation_dtype(dtype), device=tokens_Bb.device)
    if functions.fixed and has_fixed_caches(model.config) and length == model.config.mini_batch_size:
        # A state holds filled slots only; the compiled function is given a whole window of them.
        empty, filled = max(0, window - state.position), min(window, state.position + length)
        place = with_empty(place, empty, window, window)
        if static is None:
            static = empty_caches(model, model.config.prefix_layers + 1, len(tokens_Bb), dtype)
        loop = State(tree_map(loop.fast, Tensor.contiguous), _last_slots(loop.caches, window))
        static, loop, nll_Bb, norm_B = functions.read_and_learn(
            model, _last_slots(static, window), loop, tokens_Bb, targets_Bb, mask_Bb, place, step_size, dtype
        )
        static, loop = _last_slots(static, filled), State(loop.fast, _last_slots(loop.caches, filled))
    else:
        static, loop, nll_Bb, norm_B = read_and_learn(
            model, static, loop, tokens_Bb, targets_Bb, mask_Bb, place, step_size, dtype
        )
    return state._replace(position=state.position + length, static=static, loop=loop), nll_Bb, norm_B


def has_fixed_caches(config: ModelConfig) -> bool:
    """Whether every mixer's state can have its final size from the start, as compiled reading needs it."""
    return set(config.mixers) == {"window"}


def _last_slots(caches: tuple[Cache, ...], slots: int) -> tuple[Cache, ...]:
    """Caches of the last `slots` slots, with empty ones before the first where there are fewer."""

    def cut(t: Tensor) -> Tensor:
        return t if t.shape[2] == slots else F.pad(t, (0, 0, slots - t.shape[2], 0))

    return tuple(Cache(*(cut(t) for t in cache)) for cache in caches)


@torch.no_grad()
def forward(
    model: Transformer, state: ReadState, tokens_BT: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ReadState]:
    """Logits [B, T, V] after each of the tokens, and the state after them; nothing is learned."""
    x_BTD, after = _forward(model, state, tokens_BT, dtype)
    return model.logits(x_BTD), after


def _forward(model: Transformer, state: ReadState, tokens_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, ReadState]:
    place = model.place(state.position, tokens_BT.shape[1], dtype, state.position_offsets_B)
    x_BTD, static = model.forward_prefix(tokens_BT, place, state.static, dtype)
    loop = state.loop
    if model.suffix:
        x_BTD, caches, _ = model.forward_suffix(x_BTD, place, loop.fast, loop.caches, inner=False)
        loop = State(loop.fast, caches)
    return x_BTD, state._replace(position=state.position + tokens_BT.shape[1], static=static, loop=loop)
