"""Linear layers with one weight for all sequences, which may have a low-rank addition, and with a weight for each.

The weight gradients of the latter have the weights' layout in memory. PyTorch's own derivative of x @ w.transpose(1, 2)
is the transpose of a contiguous tensor; added to contiguous ones, it would make every operation on the fast weights'
gradients stride through memory.

Shapes: B sequences, T tokens, D inputs, E outputs, R rank.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class OuterProductFactors(NamedTuple):
    """The factors of a weight gradient g^T @ x for every sequence; `weight_gradient` multiplies them."""

    g_BTE: Tensor
    x_BTD: Tensor


class LowRankSum(NamedTuple):
    """The matrix w + scaling * up @ down, which is never formed: x goes through `down`, then through `up`."""

    w_ED: Tensor
    down_RD: Tensor
    up_ER: Tensor
    scaling: float


def linear(x: Tensor, weight: Tensor | LowRankSum) -> Tensor:
    """x @ weight.T in x's dtype."""
    if isinstance(weight, LowRankSum):
        addition = linear(linear(x, weight.down_RD), weight.up_ER)
        return torch.add(linear(x, weight.w_ED), addition, alpha=weight.scaling)
    return F.linear(x, weight.to(x.dtype))


def linear_vjp(g: Tensor, weight: Tensor | LowRankSum) -> Tensor:
    """The gradient of `linear` in x, from a gradient g of its output."""
    if isinstance(weight, LowRankSum):
        addition = linear_vjp(linear_vjp(g, weight.up_ER), weight.down_RD)
        return torch.add(linear_vjp(g, weight.w_ED), addition, alpha=weight.scaling)
    return g @ weight.to(g.dtype)


def batched_linear(x_BTD: Tensor, w_BED: Tensor) -> Tensor:
    """x @ w^T for every sequence, [B, T, E]; differentiable any number of times."""
    return _BatchedLinear.apply(x_BTD, w_BED)


def weight_gradient(g_BTE: Tensor, x_BTD: Tensor) -> Tensor:
    """g^T @ x for every sequence, [B, E, D], the weight gradient of `batched_linear`; differentiable like it."""
    return _WeightGradient.apply(g_BTE, x_BTD)


class _BatchedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        # For one sequence a product of matrices: a CPU's batched product in bfloat16 takes 2 to 6 times as long.
        return F.linear(x, w[0]) if len(w) == 1 else x @ w.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grads[0] @ w, _WeightGradient.apply(grads[0], x)


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        return g.transpose(1, 2) @ x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        g, x = ctx.saved_tensors
        return _BatchedLinear.apply(x, grads[0]), g @ grads[0]
