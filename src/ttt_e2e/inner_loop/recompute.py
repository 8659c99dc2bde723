"""The mini-batch loop over a sequence, and outer gradients of it that store less than plain autograd does.

`RecomputedLoop` gives the same gradient; `TruncatedLoop` leaves out a part of it.

Shapes: B sequences, N mini-batches of b tokens, D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttt_e2e.inner_loop.functions import LoopFunctions
from ttt_e2e.inner_loop.step import InnerLoopState, MiniBatch
from ttt_e2e.model.counting import KEPT_GRAPHS
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.ops.derivatives import last_derivative


def loop_parameters(model: Transformer) -> list[Tensor]:
    """The static weights that the loop may use: all of the suffix, the last norm and the head.

    The first suffix block's mixer runs before the loop: it gets its gradient from there, and none from the loop. The
    initial fast weights get theirs through the first state.
    """
    modules = [*model.suffix, model.final_norm]
    weights = [model.head_weight, *(p for module in modules for p in module.parameters())]
    return [w for w in weights if w.requires_grad]


class SequenceLoop(NamedTuple):
    """A sequence in mini-batches, and how to walk it. parameters: the static weights that receive gradients."""

    model: Transformer
    start: InnerLoopState
    batches: list[MiniBatch]
    lr: Tensor
    keep_all: bool  # of the recomputed loop: keep every state between mini-batches, or only one in about sqrt(N)
    parameters: list[Tensor]
    functions: LoopFunctions

    def step(self, i: int, state: InnerLoopState, x_BbD: Tensor | None = None) -> tuple[InnerLoopState | None, Tensor]:
        """Mini-batch `i`: the state after it and its losses. No update follows the last one: nothing would read it."""
        batch = self.batches[i] if x_BbD is None else self.batches[i]._replace(x_BbD=x_BbD)
        if i == len(self.batches) - 1:
            return None, self.functions.mini_batch_loss(self.model, state, batch)[0]
        after, nll_Bb, _ = self.functions.inner_step(self.model, state, batch, self.lr)
        return after, nll_Bb

    def walk(
        self, state: InnerLoopState, first: int, stop: int, keep: bool = False, x_NBbD: Sequence[Tensor] | None = None
    ) -> tuple[list[InnerLoopState], list[Tensor], InnerLoopState | None]:
        """Walk mini-batches `first` to `stop`, on their own x or on `x_NBbD`.

        Returns the states before each (if not `keep`, before the first only), the losses of each, N x [B, b], and the
        state after all.
        """
        states: list[InnerLoopState] = []
        losses = []
        after: InnerLoopState | None = state
        for i in range(first, stop):
            assert after is not None
            if keep or not states:
                states.append(after)
            after, nll_Bb = self.step(i, after, None if x_NBbD is None else x_NBbD[i - first])
            losses.append(nll_Bb)
        return states, losses, after


class _Graph(NamedTuple):
    """Some mini-batches walked with a graph: what went in, ready for gradients, and what came out."""

    first: int
    state: InnerLoopState
    x_NBbD: list[Tensor]
    losses: list[Tensor]
    after: InnerLoopState | None


class RecomputedLoop(torch.autograd.Function):
    """The loop that stores states between mini-batches only, and recomputes what lies between in the backward pass.

    With `keep_all` it stores all N states and recomputes each mini-batch once. Otherwise it stores one state in about
    sqrt(N), and the backward pass walks each segment forward again before it goes backward through it: about 2 sqrt(N)
    states at any time, each mini-batch recomputed twice. The last `KEPT_GRAPHS` mini-batches are not recomputed.
    """

    @staticmethod
    def forward(ctx: Any, loop: SequenceLoop, *tensors: Tensor) -> Tensor:
        """Losses [B, T]. `tensors`: x of every mini-batch, the first state, and the loop's static weights."""
        ctx.save_for_backward(*tensors)
        ctx.loop = loop
        ctx.kept, losses = _walk_and_keep(loop, loop.start, 0, len(loop.batches), KEPT_GRAPHS)
        return torch.cat(losses, 1)

    @staticmethod
    @last_derivative
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        """Gradients of all that `forward` was given."""
        loop: SequenceLoop = ctx.loop
        if ctx.kept.last is None:
            raise RuntimeError("The recomputed loop has freed what it stored: a second backward pass is not possible.")
        grad_nll = grad_outputs[0].split([batch.x_BbD.shape[1] for batch in loop.batches], 1)
        totals: list[Tensor | None] = [None] * len(loop.parameters)
        grad_x, grad_state = _go_all_back(loop, ctx.kept, grad_nll, totals)
        return (None, *grad_x, *grad_state, *totals)


class TruncatedLoop(torch.autograd.Function):
    """Truncated backpropagation through time: gradients go through at most `length` mini-batches.

    The sequence is cut into chunks of `length` mini-batches. The state that a chunk begins with, fast weights and
    caches, is a constant to it. Only what the fast weights are when the text begins is not: W at the start of a chunk
    is W_0 plus a constant, so that the gradient in W is one in W_0, and every chunk trains the initial weights.

    A chunk's gradient is taken as soon as the chunk was walked, so that no more than one chunk is ever stored.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loop: SequenceLoop,
        length: int,
        num_graphs: int,
        loss_of: Callable[[Tensor], Tensor],
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the losses of all tokens [B, T], which have no gradient.

        Args:
            length: mini-batches in a chunk.
            num_graphs: how many mini-batches at the end of a chunk keep their graph; the others are recomputed.
            loss_of: the loss from the losses of all tokens [B, T], in which it is linear.
            tensors: as for `RecomputedLoop`.
        """
        ctx.save_for_backward(*tensors)
        count = len(loop.batches)
        sizes = [batch.x_BbD.shape[1] for batch in loop.batches]
        nll_BT = torch.zeros_like(torch.cat([batch.mask_Bb for batch in loop.batches], 1)).requires_grad_()
        with torch.enable_grad():  # linear: the gradient is known before the losses are
            grad_nll = torch.autograd.grad(loss_of(nll_BT), nll_BT)[0].split(sizes, 1)
        totals: list[Tensor | None] = [None] * len(loop.parameters)
        grad_x: list[Tensor | None] = []
        grad_fast: list[Tensor] = []
        losses: list[Tensor] = []
        state = loop.start
        for first in range(0, count, length):
            kept, nll = _walk_and_keep(loop, state, first, min(first + length, count), num_graphs)
            losses += nll
            assert kept.last is not None
            if kept.last.after is not None:  # without it, nothing of the last update's graph is left
                state = kept.last.after.map(Tensor.detach)
                kept.last = kept.last._replace(after=None)
            more, grad_state = _go_all_back(loop, kept, grad_nll, totals)
            grad_x += more
            of_chunk = grad_state[: len(grad_state) - 2 * len(state.caches)]
            grad_fast = [a + b for a, b in zip(grad_fast, of_chunk, strict=True)] if grad_fast else of_chunk
        ctx.gradients = [*grad_x, *grad_fast, *[None] * (2 * len(state.caches)), *totals]
        nll_BT = torch.cat(losses, 1)
        ctx.mark_non_differentiable(nll_BT)
        return loss_of(nll_BT), nll_BT

    @staticmethod
    @last_derivative
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        """Gradients of all that `forward` was given."""
        return None, None, None, None, *(None if g is None else grad_outputs[0] * g for g in ctx.gradients)


@dataclass
class _Kept:
    """What is stored of some mini-batches: states before the first of them, and the graph of the last."""

    segments: list[tuple[int, int]]
    states: list[list[InnerLoopState]]  # of each segment: before each of its mini-batches, or before the first only
    last: _Graph | None


def _walk_and_keep(
    loop: SequenceLoop, start: InnerLoopState, first: int, stop: int, num_graphs: int
) -> tuple[_Kept, list[Tensor]]:
    """Walk mini-batches `first` to `stop`, the last `num_graphs` of them with a graph; also returns their losses."""
    end = max(first, stop - num_graphs)
    length = max(1, end - first if loop.keep_all else round((end - first) ** 0.5))
    kept = _Kept([(i, min(i + length, end)) for i in range(first, end, length)], [], None)
    losses: list[Tensor] = []
    state: InnerLoopState | None = start
    for begin, until in kept.segments:
        assert state is not None
        # The last segment goes first in the backward pass: its states need not be walked to again.
        states, nll, state = loop.walk(state, begin, until, keep=until == end)
        kept.states.append(states)
        losses += nll
    assert state is not None
    kept.last = _graph(loop, end, stop, state)
    return kept, [*losses, *(nll_Bb.detach() for nll_Bb in kept.last.losses)]


def _go_all_back(
    loop: SequenceLoop, kept: _Kept, grad_nll: Sequence[Tensor], totals: list[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor]]:
    """`_go_back` through all that is `kept`, which is freed on the way."""
    assert kept.last is not None
    grad_x, grad_state = _go_back(loop, kept.last, grad_nll, [], totals)
    kept.last = None
    for first, stop in reversed(kept.segments):
        states = kept.states.pop()
        if len(states) < stop - first:
            with torch.no_grad():
                states, _, _ = loop.walk(states[0], first, stop, keep=True)
        for i in reversed(range(first, stop)):
            graph = _graph(loop, i, i + 1, states.pop())
            more, grad_state = _go_back(loop, graph, grad_nll, grad_state, totals)
            grad_x = more + grad_x
    return grad_x, grad_state


def _graph(loop: SequenceLoop, first: int, stop: int, state: InnerLoopState) -> _Graph:
    """Walk mini-batches `first` to `stop` with a graph of their own."""
    state = state.map(lambda t: t.detach().requires_grad_())
    x_NBbD = [x.detach().requires_grad_(x.requires_grad) for x in (loop.batches[i].x_BbD for i in range(first, stop))]
    with torch.enable_grad():
        _, losses, after = loop.walk(state, first, stop, x_NBbD=x_NBbD)
    return _Graph(first, state, x_NBbD, losses, after)


def _go_back(
    loop: SequenceLoop, graph: _Graph, grad_nll: Sequence[Tensor], grad_after: list[Tensor], totals: list[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Gradients of a graph's x and of the state before it; those of the static weights are added to `totals`.

    grad_after: of the state after it, in the order of its tensors; empty after the last mini-batch. The gradients of x
    are None if nothing below the loop is trained.
    """
    outputs = [*graph.losses, *([] if graph.after is None else graph.after.tensors())]
    along = [*grad_nll[graph.first : graph.first + len(graph.losses)], *grad_after]
    pairs = [(o, g) for o, g in zip(outputs, along, strict=True) if o.requires_grad]
    x_NBbD, state = [x for x in graph.x_NBbD if x.requires_grad], graph.state.tensors()
    inputs, count = [*x_NBbD, *state, *loop.parameters], len(x_NBbD)
    gradients = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
    of_state = zip(state, gradients[count : count + len(state)], strict=True)
    for j, g in enumerate(gradients[count + len(state) :]):
        total = totals[j]
        totals[j] = g if total is None else total if g is None else total.add_(g)
    grad_x: list[Tensor | None] = [*gradients[:count]] if count else [None] * len(graph.x_NBbD)
    return grad_x, [torch.zeros_like(t) if g is None else g for t, g in of_state]
