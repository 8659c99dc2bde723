"""The method: a model that goes on training on what it reads, and the gradient through that (arXiv 2512.23675).

A sequence is walked in mini-batches of b tokens. On each, the suffix runs with the sequence's present fast weights W
and the loss is reported; then W takes one step of SGD on that loss:

    loss_i(W_i) = masked mean NLL of mini-batch i            evaluated first, this is what is reported and trained
    g_i         = d loss_i / d W_i, over all fast weights of the sequence jointly
    W_{i+1}     = W_i - lr * g_i * min(1, clip / |g_i|)      updated after

Within a step everything else is a constant for g_i: the static weights, the cached keys and values of earlier
mini-batches, the residual stream that comes up from the prefix. The outer gradient sees all of it.

g_i is not asked of autograd: it is the chain of the layers' pulls (see `model`), ordinary arithmetic like the forward
pass. The outer gradient is then one plain backward pass through both, and at test time no graph is built at all.
`inner_gradient_reference` is the twin that asks autograd.

`sequence_loss` uses the step for training, with two outer gradients that give the same numbers: plain autograd, and
recomputation. At test time `streaming` uses it.

Shapes: B sequences, T tokens, N mini-batches of b tokens, D width; fast weights as in `model`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttt_e2e.config.schema import ActivationCheckpointing
from ttt_e2e.model.mixers.attention import Cache
from ttt_e2e.model.mixers.base import Place
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.ops.attention import causal_window_mask
from ttt_e2e.ops.elementwise import accumulation_dtype, clipped_step, clipped_step_
from ttt_e2e.ops.fast_mlp import Weights
from ttt_e2e.ops.linear import OuterProductFactors, weight_gradient

# Of how many mini-batches at the end of a sequence the recomputed loop keeps the graph.
KEPT_GRAPHS = 2


class State(NamedTuple):
    """What one mini-batch hands to the next: the fast weights, and the caches of the attentions inside the loop."""

    fast: tuple[Weights, ...]
    caches: tuple[Cache, ...]

    def tensors(self) -> list[Tensor]:
        """All tensors in a fixed order."""
        return [t for value in (*self.fast, *self.caches) for t in value]


def tree_map(values: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """Fast weights or mixers' states with every tensor changed."""
    return tuple(type(value)(*map(change, value)) for value in values)


class MiniBatch(NamedTuple):
    """One mini-batch as the loop sees it: x is the residual stream after the first suffix block's attention."""

    x_BbD: Tensor
    targets_Bb: Tensor
    mask_Bb: Tensor
    place: Place


class InnerGradient(NamedTuple):
    """nll_Bb: every token's loss. gradient: of their masked mean, before the clip. caches: for the next mini-batch."""

    nll_Bb: Tensor
    gradient: tuple[Weights, ...]
    caches: tuple[Cache, ...]


class LossOutput(NamedTuple):
    """loss: scalar, mean over sequences; nll_BT: float32, every token's; mask_BT: which tokens count."""

    loss: Tensor
    nll_BT: Tensor
    mask_BT: Tensor


def masked_mean(nll_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of the counted losses of each sequence, [B]; 0 where nothing counts."""
    return (nll_BT * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1)


def score(model: Transformer, state: State, batch: MiniBatch) -> tuple[Tensor, tuple[Cache, ...]]:
    """Every token's loss [B, b] under the state's fast weights, and the caches for the next mini-batch."""
    x_BbD, caches, _ = model.forward_suffix(batch.x_BbD, batch.place, state.fast, state.caches, inner=False)
    return model.losses(x_BbD, batch.targets_Bb)[0], caches


def inner_gradient(model: Transformer, state: State, batch: MiniBatch) -> InnerGradient:
    """Score one mini-batch, and the gradient of its loss in the fast weights, by the layers' pulls."""
    nll_Bb, factors, caches = _forward_and_vjp(model, state, batch)
    dtype = state.fast[0][0].dtype
    return InnerGradient(nll_Bb, _by_block(model, [weight_gradient(*pair).to(dtype) for pair in factors]), caches)


def _forward_and_vjp(
    model: Transformer, state: State, batch: MiniBatch
) -> tuple[Tensor, list[OuterProductFactors], tuple[Cache, ...]]:
    """`inner_gradient` before it is multiplied out."""
    x_BbD, caches, suffix_vjp = model.forward_suffix(batch.x_BbD, batch.place, state.fast, state.caches, inner=True)
    nll_Bb, head_vjp = model.losses(x_BbD, batch.targets_Bb)
    weight_Bb = batch.mask_Bb / batch.mask_Bb.sum(-1, keepdim=True).clamp(min=1)
    return nll_Bb, suffix_vjp(head_vjp(weight_Bb)), caches


def inner_gradient_reference(model: Transformer, state: State, batch: MiniBatch) -> InnerGradient:
    """The plain twin of `inner_gradient`: autograd's own gradient, through which the outer one can pass."""
    fast = tree_map(state.fast, lambda w: w if w.requires_grad else w.detach().requires_grad_())
    with torch.enable_grad():
        x_BbD, caches, _ = model.forward_suffix(batch.x_BbD, batch.place, fast, state.caches, inner=True)
        nll_Bb, _ = model.losses(x_BbD, batch.targets_Bb)
        loss = masked_mean(nll_Bb, batch.mask_Bb).sum()  # a sum over sequences: each has fast weights of its own
        gradients = torch.autograd.grad(loss, [w for value in fast for w in value], create_graph=True)
    return InnerGradient(nll_Bb, _by_block(model, gradients), caches)


def inner_step(
    model: Transformer,
    state: State,
    batch: MiniBatch,
    lr: float | Tensor,
    gradient: Callable[[Transformer, State, MiniBatch], InnerGradient] = inner_gradient,
) -> tuple[State, Tensor, Tensor]:
    """Score one mini-batch, then learn from it; returns the next state, the losses [B, b], the gradient's norms [B]."""
    scored = gradient(model, state, batch)
    weights, gradients = ([w for value in values for w in value] for values in (state.fast, scored.gradient))
    new, norm_B = clipped_step(weights, gradients, lr, model.config.inner_loop.max_grad_norm)
    return State(_by_block(model, new), scored.caches), scored.nll_Bb, norm_B


def inner_step_in_place(
    model: Transformer, state: State, batch: MiniBatch, lr: float | Tensor
) -> tuple[State, Tensor, Tensor]:
    """`inner_step` on a state that nobody needs any more, without a graph: the next fast weights take its place.

    Many sequences' fast weights are more than a cache holds, so their update is as long as it takes to move them.
    """
    nll_Bb, factors, caches = _forward_and_vjp(model, state, batch)
    weights = [w for value in state.fast for w in value]
    norm_B = clipped_step_(weights, factors, lr, model.config.inner_loop.max_grad_norm)
    return State(state.fast, caches), nll_Bb, norm_B


def _by_block(model: Transformer, tensors: Sequence[Tensor]) -> tuple[Weights, ...]:
    """Tensors in the order of the blocks, and of their names within one, as fast weights, one value a block."""
    kind = model.fast_kind
    count = len(kind._fields)
    return tuple(kind(*tensors[i : i + count]) for i in range(0, len(tensors), count))


# -- training ----------------------------------------------------------------------------------------------------------


class LoopFunctions(NamedTuple):
    """What the work is made of: these functions as they stand (`EAGER`), or compiled (`compiled.compiled_functions`).

    fixed: caches have all their slots from the start, so that all mini-batches look alike to a compiler.
    """

    forward_prefix: Callable[[Transformer, Tensor, Place, torch.dtype], Tensor]
    losses: Callable[[Transformer, Tensor, Tensor], Tensor]
    score: Callable[[Transformer, State, MiniBatch], tuple[Tensor, tuple[Cache, ...]]]
    inner_step: Callable[[Transformer, State, MiniBatch, Tensor], tuple[State, Tensor, Tensor]]
    read_and_learn: Callable[..., tuple[tuple[Cache, ...], State, Tensor, Tensor]]
    fixed: bool


def forward_prefix(model: Transformer, tokens_BT: Tensor, place: Place, dtype: torch.dtype) -> Tensor:
    """The residual stream below the lowest fast weight, of a text from its start."""
    return model.forward_prefix(tokens_BT, place, None, dtype)[0]


def losses(model: Transformer, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
    """Every target's loss."""
    return model.losses(x_BTD, targets_BT)[0]


def read_and_learn(
    model: Transformer,
    static: tuple[Cache, ...] | None,
    loop: State,
    tokens_Bb: Tensor,
    targets_Bb: Tensor,
    mask_Bb: Tensor,
    place: Place,
    lr: Tensor,
    dtype: torch.dtype,
) -> tuple[tuple[Cache, ...], State, Tensor, Tensor]:
    """A whole mini-batch of reading: the caches below the loop, the loop's state, the losses, the gradients' norms."""
    x_BbD, static = model.forward_prefix(tokens_Bb, place, static, dtype)
    step = inner_step_in_place if place.in_place else inner_step
    return static, *step(model, loop, MiniBatch(x_BbD, targets_Bb, mask_Bb, place), lr)


EAGER = LoopFunctions(forward_prefix, losses, score, inner_step, read_and_learn, fixed=False)


def sequence_loss(
    model: Transformer,
    tokens_BT1: Tensor,
    *,
    bos: int | None = None,
    learn: bool = True,
    inner_lr: float | None = None,
    activation_checkpointing: ActivationCheckpointing = "none",
    dtype: torch.dtype = torch.float32,
    functions: LoopFunctions = EAGER,
) -> LossOutput:
    """The loss that training minimises, of T + 1 tokens a sequence, differentiable through the inner updates.

    tokens [B, T + 1] int64. Targets equal to `bos` do not count. learn: whether the fast weights are updated. inner_lr: None for the model's own.
    activation_checkpointing: see `TrainConfig`. The loss is the mean over mini-batches of their masked means (a last, shorter
    mini-batch weighs by its length), then over sequences. Works for a standard model too, where nothing is updated,
    and under `torch.no_grad`, where the model learns all the same and nothing is kept.
    """
    config = model.config
    inputs_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
    batch, length = inputs_BT.shape
    mask_BT = torch.ones_like(targets_BT, dtype=accumulation_dtype(dtype))
    if bos is not None:
        mask_BT = (targets_BT != bos).to(mask_BT.dtype)
    place = model.place(0, length, dtype)
    if functions.fixed:
        torch.compiler.cudagraph_mark_step_begin()
    x_BTD = functions.forward_prefix(model, inputs_BT, place, dtype)
    if not model.suffix:
        nll_BT = functions.losses(model, x_BTD, targets_BT)
    elif not learn:
        x_BTD, _, _ = model.forward_suffix(x_BTD, place, model.initial_fast_weights(batch), None, inner=False)
        nll_BT = functions.losses(model, x_BTD, targets_BT)
    else:
        slots = cache_slots(model, length) if functions.fixed else 0
        batches = mini_batches(model, x_BTD, targets_BT, mask_BT, place, slots)
        start = initial_state(model, batch, dtype, slots)
        lr = config.inner_loop.lr if inner_lr is None else inner_lr
        step_size = torch.tensor(lr, dtype=accumulation_dtype(dtype), device=x_BTD.device)
        loop = _SequenceLoop(
            model,
            start,
            batches,
            step_size,
            activation_checkpointing == "mini-batch",
            loop_parameters(model),
            functions,
        )
        if activation_checkpointing == "none" or not torch.is_grad_enabled():
            nll_BT = torch.cat(loop.walk(start, 0, len(batches))[1], 1)
        else:
            x_NBbD = [batch.x_BbD for batch in batches]
            nll_BT = _RecomputedLoop.apply(loop, *x_NBbD, *start.tensors(), *loop.parameters)
    b = min(config.mini_batch_size or length, length)
    loss_B = mini_batch_mean(nll_BT, mask_BT, b)
    return LossOutput(loss_B.mean(), nll_BT.detach(), mask_BT)


def mini_batch_mean(nll_BT: Tensor, mask_BT: Tensor, b: int) -> Tensor:
    """Mean over mini-batches of b tokens of their masked means, [B]; a shorter last one weighs by its length."""
    means_BN = torch.stack([masked_mean(n, m) for n, m in zip(nll_BT.split(b, 1), mask_BT.split(b, 1), strict=True)], 1)
    lengths_N = torch.tensor([n.shape[1] for n in nll_BT.split(b, 1)], dtype=means_BN.dtype, device=nll_BT.device)
    return means_BN @ (lengths_N / lengths_N.sum())


def mini_batches(
    model: Transformer, x_BTD: Tensor, targets_BT: Tensor, mask_BT: Tensor, place: Place, slots: int = 0
) -> list[MiniBatch]:
    """A whole sequence at `place` cut into mini-batches; the last may be shorter. slots: as for `initial_state`."""
    b, length = model.config.mini_batch_size, x_BTD.shape[1]
    assert b is not None
    starts = range(0, length, b)
    places = [place.slice(i, i + b) for i in starts]
    if slots:
        like: dict[tuple[int, int], Place] = {}  # all mini-batches with a full window behind them see alike
        for n, i in enumerate(starts):
            key = (max(0, slots - i), len(places[n].cos))
            if key not in like:
                like[key] = with_empty(places[n], key[0], slots, model.config.loop_window)
            places[n] = like[key]._replace(cos=places[n].cos, sin=places[n].sin)
    pieces = (x_BTD.split(b, 1), targets_BT.split(b, 1), mask_BT.split(b, 1))
    return [MiniBatch(*piece) for piece in zip(*pieces, places, strict=True)]


def with_empty(place: Place, empty: int, slots: int, window: int | None) -> Place:
    """The same place above caches of `slots` slots, the first `empty` of which hold no token yet."""
    device, length = place.cos.device, len(place.cos)
    count = torch.tensor(empty, dtype=torch.int32, device=device)
    # On a GPU the operators of attention do without, and this would be large.
    attn_mask_TS = (
        causal_window_mask(length, slots + length, window, place.cos, count) if device.type == "cpu" else None
    )
    return place._replace(empty=count, attn_mask_TS=attn_mask_TS)


def cache_slots(model: Transformer, length: int) -> int:
    """How many slots a cache of fixed size needs in a text of `length` tokens: a window, or all but a mini-batch."""
    b = model.config.mini_batch_size
    assert b is not None
    return model.config.loop_window or max(0, -(-length // b) - 1) * b


def initial_state(model: Transformer, batch: int, dtype: torch.dtype, slots: int = 0) -> State:
    """The state at the start of every text: the learned fast weights and caches of `slots` empty slots."""
    fast = model.initial_fast_weights(batch)
    if slots:
        fast = tree_map(fast, Tensor.contiguous)
    return State(fast, empty_caches(model, len(model.suffix) - 1, batch, dtype, slots))


def empty_caches(model: Transformer, count: int, batch: int, dtype: torch.dtype, slots: int = 0) -> tuple[Cache, ...]:
    """`count` caches of `slots` empty slots."""
    shape = (batch, model.config.num_key_value_heads, slots, model.config.head_dim)
    # A compiled function asks whether tensors are shared, need a gradient and how they lie: the first mini-batch must
    # look like all others.
    wanted = slots > 0 and torch.is_grad_enabled()

    def empty() -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=model.embedding.device, requires_grad=wanted)

    return tuple(Cache(empty(), empty()) for _ in range(count))


def loop_parameters(model: Transformer) -> list[Tensor]:
    """The static weights that the loop itself uses: the suffix above its first attention, the last norm, the head.

    Of the fast MLPs too: those that only start a sequence get no gradient this way, but through the first state.
    """
    modules: list[torch.nn.Module] = [model.final_norm]
    for i, block in enumerate(model.suffix):
        modules += [block.fast_norm, block.fast, block.fast_post_norm]
        if block.static:
            modules += [block.mlp_norm, block.mlp, block.mlp_post_norm]
        if i > 0:
            modules += [block.mixer_norm, block.mixer, block.mixer_post_norm]
    return [model.head_weight, *(p for module in modules for p in module.parameters())]


class _SequenceLoop(NamedTuple):
    """A sequence in mini-batches, and how to walk it. parameters: the static weights that receive gradients."""

    model: Transformer
    start: State
    batches: list[MiniBatch]
    lr: Tensor
    keep_all: bool  # of the recomputed loop: keep every state between mini-batches, or only one in about sqrt(N)
    parameters: list[Tensor]
    functions: LoopFunctions

    def step(self, i: int, state: State, x_BbD: Tensor | None = None) -> tuple[State | None, Tensor]:
        """Mini-batch `i`: the state after it and its losses. No update follows the last one: nothing would read it."""
        batch = self.batches[i] if x_BbD is None else self.batches[i]._replace(x_BbD=x_BbD)
        if i == len(self.batches) - 1:
            return None, self.functions.score(self.model, state, batch)[0]
        after, nll_Bb, _ = self.functions.inner_step(self.model, state, batch, self.lr)
        return after, nll_Bb

    def walk(
        self, state: State, first: int, stop: int, *, keep: bool = False, x_NBbD: Sequence[Tensor] | None = None
    ) -> tuple[list[State], list[Tensor], State | None]:
        """Walk mini-batches `first` to `stop`, on their own x or on `x_NBbD`.

        Returns the states before each (if not `keep`, before the first only), the losses of each, N x [B, b], and the
        state after all.
        """
        states: list[State] = []
        losses = []
        after: State | None = state
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
    state: State
    x_NBbD: list[Tensor]
    losses: list[Tensor]
    after: State | None


class _RecomputedLoop(torch.autograd.Function):
    """The loop that stores states between mini-batches only, and in the backward pass recomputes what lies between.

    With `keep_all` it stores all N states and recomputes each mini-batch once. Otherwise it stores one state in about
    sqrt(N), and the backward pass walks a segment forward again before it goes through it backwards: about 2 sqrt(N)
    states at any time, each mini-batch recomputed twice. The last `KEPT_GRAPHS` mini-batches are not recomputed: the
    backward pass begins with them, before it holds anything else.
    """

    @staticmethod
    def forward(ctx: Any, loop: _SequenceLoop, *tensors: Tensor) -> Tensor:
        count = len(loop.batches) - min(KEPT_GRAPHS, len(loop.batches))
        length = max(1, count if loop.keep_all else round(count**0.5))
        ctx.segments = [(i, min(i + length, count)) for i in range(0, count, length)]
        ctx.boundaries, losses = [], []
        state: State | None = loop.start
        for first, stop in ctx.segments:
            assert state is not None
            # The last segment goes first in the backward pass: its states need not be walked to again.
            states, nll_Bb, state = loop.walk(state, first, stop, keep=stop == count)
            ctx.boundaries.append(states)
            losses += nll_Bb
        assert state is not None
        ctx.loop, ctx.last = loop, _graph(loop, count, len(loop.batches), state)
        return torch.cat([*losses, *(nll_Bb.detach() for nll_Bb in ctx.last.losses)], 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        loop: _SequenceLoop = ctx.loop
        if ctx.last is None:
            raise RuntimeError("The recomputed loop gives up what it kept as it goes back; it goes back once only.")
        grad_nll = grad_outputs[0].split([batch.x_BbD.shape[1] for batch in loop.batches], 1)
        totals: list[Tensor | None] = [None] * len(loop.parameters)
        grad_x, grad_state = _go_back(loop, ctx.last, grad_nll, [], totals)
        ctx.last = None
        for first, stop in reversed(ctx.segments):
            states = ctx.boundaries.pop()
            if len(states) < stop - first:
                with torch.no_grad():
                    states, _, _ = loop.walk(states[0], first, stop, keep=True)
            for i in reversed(range(first, stop)):
                graph = _graph(loop, i, i + 1, states.pop())
                more, grad_state = _go_back(loop, graph, grad_nll, grad_state, totals)
                grad_x = more + grad_x
        return (None, *grad_x, *grad_state, *totals)


def _graph(loop: _SequenceLoop, first: int, stop: int, state: State) -> _Graph:
    """Walk mini-batches `first` to `stop` with a graph of their own."""
    state = _leaves(state)
    x_NBbD = [loop.batches[i].x_BbD.detach().requires_grad_() for i in range(first, stop)]
    with torch.enable_grad():
        _, losses, after = loop.walk(state, first, stop, x_NBbD=x_NBbD)
    return _Graph(first, state, x_NBbD, losses, after)


def _go_back(
    loop: _SequenceLoop,
    graph: _Graph,
    grad_nll: Sequence[Tensor],
    grad_after: list[Tensor],
    totals: list[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Gradients of a graph's x and of the state before it; those of the static weights are added to `totals`.

    grad_after: of the state after it, in the order of its tensors; empty after the last mini-batch.
    """
    outputs = [*graph.losses, *([] if graph.after is None else graph.after.tensors())]
    along = [*grad_nll[graph.first : graph.first + len(graph.losses)], *grad_after]
    pairs = [(o, g) for o, g in zip(outputs, along, strict=True) if o.requires_grad]
    state, count = graph.state.tensors(), len(graph.x_NBbD)
    gradients = torch.autograd.grad(
        [o for o, _ in pairs],
        [*graph.x_NBbD, *state, *loop.parameters],
        [g for _, g in pairs],
        allow_unused=True,
        materialize_grads=False,
    )
    of_state = zip(state, gradients[count : count + len(state)], strict=True)
    for j, g in enumerate(gradients[count + len(state) :]):
        total = totals[j]
        totals[j] = g if total is None else total if g is None else total.add_(g)
    return list(gradients[:count]), [torch.zeros_like(t) if g is None else g for t, g in of_state]


def _leaves(state: State) -> State:
    """The same values cut from their graph, ready for gradients."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_()

    return State(tree_map(state.fast, leaf), tree_map(state.caches, leaf))
