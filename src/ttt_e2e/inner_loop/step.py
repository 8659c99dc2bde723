"""The method's inner step: a model goes on training on what it reads (arXiv 2512.23675, section 2).

A sequence is walked in mini-batches of b tokens. On each, the suffix runs with the sequence's present fast weights W
and the loss is reported; then W takes one step of SGD on that loss:

    loss_i(W_i) = masked mean NLL of mini-batch i                      evaluated first: this is reported and trained
    g_i         = d loss_i / d W_i, over all fast weights of the sequence jointly
    W_{i+1}     = W_i - lr * g_i * min(1, max_grad_norm / |g_i|)       updated after

With `inner_loop.learned_lr` every matrix has a rate of its own, `lr` times a factor that is trained with the model.
Everything else is a constant for g_i: the static weights, the cached keys and values of earlier mini-batches, the
residual stream that comes up from the prefix. The outer gradient (`meta_loss`) sees all of it.

`inner_gradient_reference` defines g_i: it asks autograd. `inner_gradient` is its fast twin: the chain of the layers'
vjps (see `model.block`), ordinary arithmetic like the forward pass. So the outer gradient is one plain backward
pass through both, and while a text is read no graph is built at all.

Shapes: B sequences, b tokens of a mini-batch, D hidden size; fast weights as in `ops.fast_mlp`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttt_e2e.model.kv_cache import KVCache
from ttt_e2e.model.mixers.base import CacheView, Positions
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.ops.clipped_step import clipped_step, clipped_step_
from ttt_e2e.ops.derivatives import definitions
from ttt_e2e.ops.fast_mlp import Weights
from ttt_e2e.ops.linear import OuterProductFactors, weight_gradient


class InnerLoopState(NamedTuple):
    """What one mini-batch hands to the next: the fast weights, and the caches of the attentions inside the loop."""

    fast: tuple[Weights, ...]
    caches: tuple[KVCache, ...]

    def tensors(self) -> list[Tensor]:
        """All tensors in a fixed order."""
        return [t for value in (*self.fast, *self.caches) for t in value]

    def map(self, change: Callable[[Tensor], Tensor]) -> "InnerLoopState":
        """The state with `change` applied to every tensor."""
        return InnerLoopState(tree_map(self.fast, change), tree_map(self.caches, change))


def tree_map(values: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """Fast weights or mixers' states with `change` applied to every tensor."""
    return tuple(type(value)(*map(change, value)) for value in values)


class MiniBatch(NamedTuple):
    """One mini-batch as the loop sees it."""

    x_BbD: Tensor  # the residual stream after the first suffix block's mixer
    targets_Bb: Tensor
    mask_Bb: Tensor  # 1 where the target counts, else 0
    positions: Positions
    cache_view: CacheView = CacheView()


class InnerGradient(NamedTuple):
    """A scored mini-batch."""

    nll_Bb: Tensor  # every token's loss in nats
    gradient: tuple[Weights, ...]  # of the masked mean of these losses, before it is clipped
    caches: tuple[KVCache, ...]  # for the next mini-batch


def masked_mean(nll_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of the losses that count in each sequence, [B]; 0 where none does."""
    return (nll_BT * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1)


def mini_batch_loss(model: Transformer, state: InnerLoopState, batch: MiniBatch) -> tuple[Tensor, tuple[KVCache, ...]]:
    """Every token's loss [B, b] under the state's fast weights, and the caches for the next mini-batch."""
    given = (batch.x_BbD, batch.positions, state.fast, state.caches, batch.cache_view)
    x_BbD, caches, _ = model.forward_suffix(*given, second_order=False)
    return model.losses(x_BbD, batch.targets_Bb)[0], caches


def inner_gradient_reference(model: Transformer, state: InnerLoopState, batch: MiniBatch) -> InnerGradient:
    """Score one mini-batch, and the gradient of its loss in the fast weights: the definition, by autograd.

    It goes through the operators' own definitions: the derivatives that are written out end after the second, and
    `torch.autograd.grad` would leave out what lies behind them without a word.
    """
    fast = tree_map(state.fast, lambda w: w if w.requires_grad else w.detach().requires_grad_())
    with torch.enable_grad(), definitions():
        given = (batch.x_BbD, batch.positions, fast, state.caches, batch.cache_view)
        x_BbD, caches, _ = model.forward_suffix(*given, second_order=True)
        nll_Bb, _ = model.losses(x_BbD, batch.targets_Bb)
        loss = masked_mean(nll_Bb, batch.mask_Bb).sum()  # a sum over sequences: each has fast weights of its own
        gradients = torch.autograd.grad(loss, [w for value in fast for w in value], create_graph=True)
    return InnerGradient(nll_Bb, _by_block(model, gradients), caches)


def inner_gradient(model: Transformer, state: InnerLoopState, batch: MiniBatch) -> InnerGradient:
    """The fast twin of `inner_gradient_reference`: the chain of the layers' vjps, differentiable once."""
    nll_Bb, factors, caches = _inner_gradient_factors(model, state, batch)
    dtype = state.fast[0][0].dtype
    return InnerGradient(nll_Bb, _by_block(model, [weight_gradient(*pair).to(dtype) for pair in factors]), caches)


def _inner_gradient_factors(
    model: Transformer, state: InnerLoopState, batch: MiniBatch
) -> tuple[Tensor, list[OuterProductFactors], tuple[KVCache, ...]]:
    """`inner_gradient` with every matrix's gradient left as the two factors of its product."""
    given = (batch.x_BbD, batch.positions, state.fast, state.caches, batch.cache_view)
    x_BbD, caches, suffix_vjp = model.forward_suffix(*given, second_order=True)
    nll_Bb, loss_vjp = model.losses(x_BbD, batch.targets_Bb)
    weight_Bb = batch.mask_Bb / batch.mask_Bb.sum(-1, keepdim=True).clamp(min=1)
    return nll_Bb, suffix_vjp(loss_vjp(weight_Bb)), caches


def inner_step(
    model: Transformer,
    state: InnerLoopState,
    batch: MiniBatch,
    lr: float | Tensor,
    gradient: Callable[[Transformer, InnerLoopState, MiniBatch], InnerGradient] = inner_gradient,
) -> tuple[InnerLoopState, Tensor, Tensor]:
    """Score one mini-batch, then learn from it with the inner learning rate `lr`; `gradient` may be the reference.

    Returns the next state, the losses [B, b] under the old fast weights, and the norms [B] of the unclipped gradients.
    """
    scored = gradient(model, state, batch)
    weights, gradients = ([w for value in values for w in value] for values in (state.fast, scored.gradient))
    rates = model.inner_learning_rates(lr)
    new, norm_B = clipped_step(weights, gradients, rates, model.config.inner_loop.max_grad_norm)
    return InnerLoopState(_by_block(model, new), scored.caches), scored.nll_Bb, norm_B


def inner_step_(
    model: Transformer, state: InnerLoopState, batch: MiniBatch, lr: float | Tensor
) -> tuple[InnerLoopState, Tensor, Tensor]:
    """`inner_step` on a donated state, without a graph: the next fast weights take the memory of the old ones.

    The fast weights of many sequences are more than a processor's caches hold, so that updating them takes as long as
    moving them. The gradients are therefore never multiplied out.
    """
    nll_Bb, factors, caches = _inner_gradient_factors(model, state, batch)
    weights = [w for value in state.fast for w in value]
    rates = model.inner_learning_rates(lr)
    norm_B = clipped_step_(weights, factors, rates, model.config.inner_loop.max_grad_norm)
    return InnerLoopState(state.fast, caches), nll_Bb, norm_B


def _by_block(model: Transformer, tensors: Sequence[Tensor]) -> tuple[Weights, ...]:
    """Tensors in the order of the blocks, and of their names within one, as fast weights, one value a block."""
    kind, count = model.fast_kind, len(model.fast_kind._fields)
    return tuple(kind(*tensors[i : i + count]) for i in range(0, len(tensors), count))


def initial_state(model: Transformer, batch: int, dtype: torch.dtype, num_slots: int = 0) -> InnerLoopState:
    """The state at the start of `batch` texts: the learned initial fast weights, and caches of empty slots."""
    fast = model.initial_fast_weights(batch)
    if num_slots:
        fast = tree_map(fast, Tensor.contiguous)
    return InnerLoopState(fast, empty_caches(model, len(model.suffix) - 1, batch, dtype, num_slots))


def empty_caches(
    model: Transformer, count: int, batch: int, dtype: torch.dtype, num_slots: int = 0
) -> tuple[KVCache, ...]:
    """`count` caches of `num_slots` empty slots."""
    shape = (batch, model.config.num_key_value_heads, num_slots, model.config.head_dim)
    # A compiled function checks which tensors are shared, need a gradient and how they lie: the first mini-batch must
    # look like all others.
    requires_grad = num_slots > 0 and torch.is_grad_enabled()

    def empty() -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=model.embedding.device, requires_grad=requires_grad)

    return tuple(KVCache(empty(), empty()) for _ in range(count))
