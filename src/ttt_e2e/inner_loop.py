"""The method: a model that goes on training on what it reads, and the gradient through that (arXiv 2512.23675).

A sequence is walked in mini-batches of b tokens. On each, the suffix runs with the sequence's present fast weights W
and the loss is reported; then W takes one step of SGD on that loss:

    loss_i(W_i) = masked mean NLL of mini-batch i            evaluated first, this is what is reported and trained
    g_i         = d loss_i / d W_i, over all fast weights of the sequence jointly
    W_{i+1}     = W_i - lr * g_i * min(1, clip / |g_i|)      updated after

Within `inner_step` everything else is a constant for g_i: the static weights, the cached keys and values of earlier
mini-batches, the residual stream that comes up from the prefix. The outer gradient sees all of it.

Two functions use the step: `sequence_loss` for training (with two outer gradients that give the same numbers: plain
autograd, and recomputation) and `read_mini_batch` at test time.

Shapes: B sequences, T tokens, N mini-batches of b tokens, D width; fast weights as in `model`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttt_e2e.config import Recompute
from ttt_e2e.model import Cache, FastWeights, Rotary, Transformer, wide
from ttt_e2e.ops.elementwise import clipped_step


class State(NamedTuple):
    """What one mini-batch hands to the next: the fast weights, and the caches of the attentions inside the loop."""

    fast: tuple[FastWeights, ...]
    caches: tuple[Cache, ...]

    def tensors(self) -> list[Tensor]:
        """All tensors in a fixed order."""
        return [t for pair in (*self.fast, *self.caches) for t in pair]


class MiniBatch(NamedTuple):
    """One mini-batch as the loop sees it: x is the residual stream after the first suffix block's attention."""

    x_BbD: Tensor
    targets_Bb: Tensor
    mask_Bb: Tensor
    rotary: Rotary


class InnerGradient(NamedTuple):
    """An inner step's gradient before the clip, in the order and shapes of the fast weights, and its norm."""

    fast: tuple[FastWeights, ...]
    norm_B: Tensor


class LossOutput(NamedTuple):
    """loss: scalar, mean over sequences; nll_BT: float32, every token's; mask_BT: which tokens count."""

    loss: Tensor
    nll_BT: Tensor
    mask_BT: Tensor


def masked_mean(nll_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of the counted losses of each sequence, [B]; 0 where nothing counts."""
    return (nll_BT * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1)


def score(model: Transformer, state: State, batch: MiniBatch, twice: bool) -> tuple[Tensor, tuple[Cache, ...]]:
    """Every token's loss [B, b] under the state's fast weights, and the caches for the next mini-batch."""
    x_BbD, caches = model.read_fast(batch.x_BbD, batch.rotary, state.fast, state.caches, twice)
    return model.losses(x_BbD, batch.targets_Bb), caches


def inner_step(
    model: Transformer, state: State, batch: MiniBatch, lr: float, outer: bool
) -> tuple[State, Tensor, InnerGradient]:
    """Score one mini-batch, then learn from it; returns the next state, the losses [B, b] and the inner gradient.

    The state's fast weights must require a gradient. `outer` keeps the graph, so that a gradient can pass through the
    update; without it the new state is detached.
    """
    nll_Bb, caches = score(model, state, batch, twice=outer)
    loss = masked_mean(nll_Bb, batch.mask_Bb).sum()  # a sum over sequences: each has fast weights of its own
    weights = [w for pair in state.fast for w in pair]
    gradients = torch.autograd.grad(loss, weights, create_graph=outer)
    new, norm_B = clipped_step(weights, gradients, lr, model.config.inner_clip)
    if not outer:
        new, caches, nll_Bb = (
            [w.detach() for w in new],
            tuple(Cache(*(t.detach() for t in cache)) for cache in caches),
            nll_Bb.detach(),
        )
    return State(_by_block(new), caches), nll_Bb, InnerGradient(_by_block(gradients), norm_B)


def _by_block(tensors: Sequence[Tensor]) -> tuple[FastWeights, ...]:
    """Tensors in the order of the blocks, w_in before w_out, as one pair a block."""
    return tuple(FastWeights(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True))


# -- training ----------------------------------------------------------------------------------------------------------


def sequence_loss(
    model: Transformer,
    tokens_BT1: Tensor,
    *,
    bos: int | None = None,
    inner_lr: float | None = None,
    recompute: Recompute = "none",
    dtype: torch.dtype = torch.float32,
) -> LossOutput:
    """The loss that training minimises, of T + 1 tokens a sequence, differentiable through the inner updates.

    tokens [B, T + 1] int64. Targets equal to `bos` do not count. inner_lr: None for the model's own, 0 for no learning.
    recompute: see `TrainConfig`. The loss is the mean over mini-batches of their masked means (a last, shorter
    mini-batch weighs by its length), then over sequences. Works for a standard model too, where nothing is updated,
    and under `torch.no_grad`, where the model learns all the same and nothing is kept.
    """
    config = model.config
    inputs_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
    mask_BT = torch.ones_like(targets_BT, dtype=wide(dtype))
    if bos is not None:
        mask_BT = (targets_BT != bos).to(mask_BT.dtype)
    x_BTD, _ = model.read_static(inputs_BT, 0, None, dtype)
    lr = config.inner_lr if inner_lr is None else inner_lr
    if not model.suffix:
        nll_BT = model.losses(x_BTD, targets_BT)
    elif lr == 0:
        fast = model.initial_fast_weights(len(x_BTD))
        x_BTD, _ = model.read_fast(x_BTD, model.rotary(0, x_BTD.shape[1], dtype), fast, None, twice=False)
        nll_BT = model.losses(x_BTD, targets_BT)
    else:
        batches = mini_batches(model, x_BTD, targets_BT, mask_BT)
        start = initial_state(model, len(x_BTD), dtype)
        loop = _Loop(model, start, batches, lr, recompute == "mini-batch", loop_parameters(model))
        if not torch.is_grad_enabled():
            nll_BT = torch.cat(loop.forget(start, 0, len(batches), keep=False)[1], 1)
        elif recompute == "none":
            nll_BT = torch.cat(walk(model, start, batches, lr), 1)
        else:
            x_NBbD = [batch.x_BbD for batch in batches]
            nll_BT = _RecomputedLoop.apply(loop, *x_NBbD, *start.tensors(), *loop.parameters)
    b = min(config.mini_batch or targets_BT.shape[1], targets_BT.shape[1])
    loss_B = mini_batch_mean(nll_BT, mask_BT, b)
    return LossOutput(loss_B.mean(), nll_BT.detach(), mask_BT)


def mini_batch_mean(nll_BT: Tensor, mask_BT: Tensor, b: int) -> Tensor:
    """Mean over mini-batches of b tokens of their masked means, [B]; a shorter last one weighs by its length."""
    means_BN = torch.stack([masked_mean(n, m) for n, m in zip(nll_BT.split(b, 1), mask_BT.split(b, 1), strict=True)], 1)
    lengths_N = torch.tensor([n.shape[1] for n in nll_BT.split(b, 1)], dtype=means_BN.dtype, device=nll_BT.device)
    return means_BN @ (lengths_N / lengths_N.sum())


def mini_batches(model: Transformer, x_BTD: Tensor, targets_BT: Tensor, mask_BT: Tensor) -> list[MiniBatch]:
    """A whole sequence cut into mini-batches; the last may be shorter."""
    b, length = model.config.mini_batch, x_BTD.shape[1]
    assert b is not None
    rotary = model.rotary(0, length, x_BTD.dtype)
    pieces = zip(x_BTD.split(b, 1), targets_BT.split(b, 1), mask_BT.split(b, 1), range(0, length, b), strict=True)
    return [MiniBatch(x, t, m, rotary.slice(i, min(i + b, length))) for x, t, m, i in pieces]


def initial_state(model: Transformer, batch: int, dtype: torch.dtype) -> State:
    """The state at the start of every text: the learned fast weights and empty caches."""
    shape = (batch, model.config.kv_head_count, 0, model.config.head_width)
    empty = torch.empty(shape, dtype=dtype, device=model.embedding.device)
    return State(model.initial_fast_weights(batch), tuple(Cache(empty, empty) for _ in model.suffix[1:]))


def walk(model: Transformer, state: State, batches: list[MiniBatch], lr: float) -> list[Tensor]:
    """The loop, plainly: autograd through it is the reference for the outer gradient. Returns the losses, N x [B, b].

    No update follows the last mini-batch, since nothing reads it.
    """
    losses = []
    for batch in batches[:-1]:
        state, nll_Bb, _ = inner_step(model, state, batch, lr, outer=True)
        losses.append(nll_Bb)
    nll_Bb, _ = score(model, state, batches[-1], twice=False)
    return [*losses, nll_Bb]


def loop_parameters(model: Transformer) -> list[Tensor]:
    """The static weights that the loop itself uses: the suffix above its first attention, the last norm, the head."""
    modules: list[torch.nn.Module] = [model.final_norm]
    for i, block in enumerate(model.suffix):
        modules += [block.fast_norm, block.fast_post_norm, block.mlp_norm, block.mlp, block.mlp_post_norm]
        if i > 0:
            modules += [block.attention_norm, block.attention, block.attention_post_norm]
    return [model.head_weight, *(p for module in modules for p in module.parameters())]


class _Loop(NamedTuple):
    """What the recomputed loop needs besides the tensors that receive gradients."""

    model: Transformer
    start: State
    batches: list[MiniBatch]
    lr: float
    keep_all: bool  # keep every state between mini-batches, or only one in about sqrt(N)
    parameters: list[Tensor]

    def forget(self, state: State, first: int, stop: int, keep: bool) -> tuple[list[State], list[Tensor], State]:
        """Walk mini-batches `first` to `stop` without a graph.

        Returns the states before each (if not `keep`, before the first only), the losses of each, the state after all.
        """
        states: list[State] = []
        losses = []
        for i in range(first, stop):
            state = _leaves(state)
            if keep or not states:
                states.append(state)
            batch = self.batches[i]._replace(x_BbD=self.batches[i].x_BbD.detach())
            if i == len(self.batches) - 1:
                with torch.no_grad():
                    nll_Bb, _ = score(self.model, state, batch, twice=False)
            else:
                with torch.enable_grad():
                    state, nll_Bb, _ = inner_step(self.model, state, batch, self.lr, outer=False)
            losses.append(nll_Bb)
        return states, losses, state


class _RecomputedLoop(torch.autograd.Function):
    """The loop that stores states between mini-batches only, and in the backward pass recomputes what lies between.

    With `keep_all` it stores all N states and recomputes each mini-batch once. Otherwise it stores one state in about
    sqrt(N), and the backward pass walks a segment forward again before it goes through it backwards: about 2 sqrt(N)
    states at any time, each mini-batch recomputed twice.
    """

    @staticmethod
    def forward(ctx: Any, loop: _Loop, *tensors: Tensor) -> Tensor:
        count = len(loop.batches)
        length = count if loop.keep_all else max(1, round(count**0.5))
        ctx.segments = [(i, min(i + length, count)) for i in range(0, count, length)]
        ctx.boundaries, losses, state = [], [], loop.start
        for first, stop in ctx.segments:
            # The last segment goes first in the backward pass: its states need not be walked to again.
            states, nll_Bb, state = loop.forget(state, first, stop, keep=stop == count)
            ctx.boundaries.append(states)
            losses += nll_Bb
        ctx.loop = loop
        return torch.cat(losses, 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        loop: _Loop = ctx.loop
        grad_nll = grad_outputs[0].split([batch.x_BbD.shape[1] for batch in loop.batches], 1)
        grad_x: list[Tensor | None] = [None] * len(loop.batches)
        grad_state: list[Tensor] = []  # of the state after the mini-batch at hand; empty after the last one
        grad_parameters: list[Tensor | None] = [None] * len(loop.parameters)
        for (first, stop), states in zip(reversed(ctx.segments), reversed(ctx.boundaries), strict=True):
            states = list(states)
            if len(states) < stop - first:
                states, _, _ = loop.forget(states[0], first, stop, keep=True)
            for i in reversed(range(first, stop)):
                state = _leaves(states.pop(), cached=True)
                x_BbD = loop.batches[i].x_BbD.detach().requires_grad_()
                batch = loop.batches[i]._replace(x_BbD=x_BbD)
                with torch.enable_grad():
                    if i == len(loop.batches) - 1:
                        nll_Bb, _ = score(loop.model, state, batch, twice=False)
                        outputs = [nll_Bb]
                    else:
                        after, nll_Bb, _ = inner_step(loop.model, state, batch, loop.lr, outer=True)
                        outputs = [nll_Bb, *after.tensors()]
                pairs = [(o, g) for o, g in zip(outputs, [grad_nll[i], *grad_state], strict=True) if o.requires_grad]
                inputs = [x_BbD, *state.tensors(), *loop.parameters]
                gradients = torch.autograd.grad(
                    [o for o, _ in pairs],
                    inputs,
                    [g for _, g in pairs],
                    allow_unused=True,
                    materialize_grads=False,
                )
                grad_x[i] = gradients[0]
                held = len(state.tensors())
                grad_state = [
                    torch.zeros_like(t) if g is None else g
                    for t, g in zip(state.tensors(), gradients[1 : 1 + held], strict=True)
                ]
                for j, g in enumerate(gradients[1 + held :]):
                    total = grad_parameters[j]
                    grad_parameters[j] = g if total is None else total if g is None else total.add_(g)
        return (None, *grad_x, *grad_state, *grad_parameters)


def _leaves(state: State, cached: bool = False) -> State:
    """The same values cut from their graph, the fast weights (and, if `cached`, the caches) ready for gradients."""
    fast = tuple(FastWeights(*(w.detach().requires_grad_() for w in pair)) for pair in state.fast)
    caches = tuple(Cache(*(t.detach().requires_grad_(cached) for t in pair)) for pair in state.caches)
    return State(fast, caches)


# -- test time ---------------------------------------------------------------------------------------------------------


class ReadState(NamedTuple):
    """All that a text leaves behind in a model, at a border between mini-batches: a value, to keep, copy or save.

    position: tokens read so far. static: caches of the attentions below the lowest fast weight. loop: the rest.
    """

    position: int
    static: tuple[Cache, ...] | None
    loop: State


def start_reading(model: Transformer, batch: int, dtype: torch.dtype = torch.float32) -> ReadState:
    """The state before the first token of `batch` texts."""
    state = initial_state(model, batch, dtype)
    fast = tuple(FastWeights(*(w.detach() for w in pair)) for pair in state.fast)
    return ReadState(0, None, State(fast, state.caches))


def read_mini_batch(
    model: Transformer,
    state: ReadState,
    tokens_Bb: Tensor,
    targets_Bb: Tensor,
    mask_Bb: Tensor | None = None,
    *,
    inner_lr: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[ReadState, Tensor, Tensor]:
    """Read one mini-batch, score it, and learn from it; returns the next state, the losses and the gradient norms [B].

    inner_lr None is the model's own; with 0 nothing is learned, any number of tokens may come at once, and the norms
    are zero. Nothing in the result hangs on a graph.
    """
    lr = model.config.inner_lr if inner_lr is None else inner_lr
    if not model.suffix or lr == 0:
        with torch.no_grad():
            x_BbD, after = _forward(model, state, tokens_Bb, dtype)
            nll_Bb = model.losses(x_BbD, targets_Bb)
        return after, nll_Bb, nll_Bb.new_zeros(len(nll_Bb))
    with torch.no_grad():
        x_BbD, static = model.read_static(tokens_Bb, state.position, state.static, dtype)
        if mask_Bb is None:
            mask_Bb = torch.ones_like(targets_Bb, dtype=wide(dtype))
        rotary = model.rotary(state.position, tokens_Bb.shape[1], dtype)
    with torch.enable_grad():
        loop, nll_Bb, inner = inner_step(
            model, _leaves(state.loop), MiniBatch(x_BbD, targets_Bb, mask_Bb, rotary), lr, outer=False
        )
    return ReadState(state.position + tokens_Bb.shape[1], static, loop), nll_Bb, inner.norm_B


@torch.no_grad()
def forward(
    model: Transformer, state: ReadState, tokens_BT: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ReadState]:
    """Logits [B, T, V] after each of the tokens, and the state after them; nothing is learned."""
    x_BTD, after = _forward(model, state, tokens_BT, dtype)
    return model.logits(x_BTD), after


def _forward(model: Transformer, state: ReadState, tokens_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, ReadState]:
    x_BTD, static = model.read_static(tokens_BT, state.position, state.static, dtype)
    loop = state.loop
    if model.suffix:
        rotary = model.rotary(state.position, tokens_BT.shape[1], dtype)
        x_BTD, caches = model.read_fast(x_BTD, rotary, loop.fast, loop.caches, twice=False)
        loop = State(loop.fast, caches)
    return x_BTD, ReadState(state.position + tokens_BT.shape[1], static, loop)
