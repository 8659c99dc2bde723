"""The update of the inner loop: SGD with gradients clipped by their norm, for every sequence by itself.

The learning rate is one for all weights, or a tensor [M] with one for each of the M weights; such a tensor gets a
gradient. The norm that is clipped is that of the gradients, whatever the rates.

Shapes: B sequences, M weights.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ttt_e2e.ops.derivatives import last_derivative, wants_definition
from ttt_e2e.ops.linear import OuterProductFactors


def clipped_step_reference(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], lr: float | Tensor, max_norm: float
) -> tuple[list[Tensor], Tensor]:
    """The definition of `clipped_step`."""
    # Not `vector_norm`: PyTorch 2.13's inductor gets the gradient through it wrong, and the slope of a root at zero is
    # infinite.
    square_B = torch.stack([g.square().flatten(1).sum(1) for g in gradients]).sum(0)
    scale_B = _scale(square_B.clamp(min=torch.finfo(square_B.dtype).tiny).sqrt(), max_norm)
    rates = lr if isinstance(lr, Tensor) and lr.dim() else [lr] * len(weights)
    new = [w - rate * scale_B[:, None, None] * g for w, g, rate in zip(weights, gradients, rates, strict=True)]
    return new, square_B.sqrt().detach()


def clipped_step(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], lr: float | Tensor, max_norm: float
) -> tuple[list[Tensor], Tensor]:
    """The new weights [B, ..., ...] after one step of SGD, and the norms [B] of the gradients, which take no gradient.

    Each sequence's gradients are scaled to a joint norm of at most `max_norm`. Differentiable once in weights,
    gradients and rates [M], through the norm too, and finite at a gradient of zero. If autograd records nothing, the
    new weights take the gradients' memory: for many sequences, fresh memory costs more than the arithmetic.
    """
    if wants_definition():
        return clipped_step_reference(weights, gradients, lr, max_norm)
    if torch.is_grad_enabled():
        *new, norm_B = _ClippedStep.apply(lr, max_norm, *weights, *gradients)
        return new, norm_B
    new, norm_B, _ = _step(weights, gradients, lr, max_norm, gradients)
    return new, norm_B


def clipped_step_(
    weights: Sequence[Tensor], factors: Sequence[OuterProductFactors], lr: float | Tensor, max_norm: float
) -> Tensor:
    """`clipped_step` in place and without autograd, by gradients g^T x given as their factors; returns their norms [B].

    For G = g^T x, |G|^2 = <g g^T, x x^T>, which takes T^2 (E + D) operations where G itself takes T E D.
    """
    pairs = [(g.to(w.dtype), x.to(w.dtype)) for w, (g, x) in zip(weights, factors, strict=True)]
    grams = [(g @ g.transpose(1, 2)) * (x @ x.transpose(1, 2)) for g, x in pairs]
    norm_B = torch.stack([gram.sum((1, 2)) for gram in grams]).sum(0).clamp(min=0).sqrt()
    steps = _steps(_scale(norm_B, max_norm), lr, len(pairs))
    pairs = [(g * step_B11, x) for (g, x), step_B11 in zip(pairs, steps, strict=True)]
    for w, (g, x) in zip(weights, pairs, strict=True):
        w.baddbmm_(g.transpose(1, 2), x)
    return norm_B


def _scale(norm_B: Tensor, max_norm: float) -> Tensor:
    """The factor for gradients of these norms: exactly 1 up to `max_norm`, where its slope is that beyond."""
    max_norm = min(max_norm, torch.finfo(norm_B.dtype).max)
    return torch.full_like(norm_B, max_norm) / norm_B.clamp(min=max_norm)


def _steps(scale_B: Tensor, lr: float | Tensor, count: int) -> Sequence[Tensor]:
    """What each of `count` weights' gradients is multiplied by, M x [B, 1, 1]."""
    if isinstance(lr, Tensor) and lr.dim():
        return (scale_B * -lr[:, None])[:, :, None, None].unbind()
    return [(scale_B * -lr)[:, None, None]] * count


def _step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    lr: float | Tensor,
    max_norm: float,
    into: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The new weights, in the memory of `into` or in fresh memory; the gradients' norms [B], and the factors [B]."""
    # By rows first: over a whole matrix at once, PyTorch's float32 sum on a CPU is too small by 1e-5.
    norms = [torch.linalg.vector_norm(torch.linalg.vector_norm(g, dim=2), dim=1) for g in gradients]
    norm_B = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    scale_B = _scale(norm_B, max_norm)
    steps = _steps(scale_B, lr, len(weights))
    new = [torch.addcmul(w, g, s, out=out) for w, g, s, out in zip(weights, gradients, steps, into, strict=True)]
    return new, norm_B, scale_B


class _ClippedStep(torch.autograd.Function):
    """W - lr min(1, c / n) g with n = |g|, over all tensors of a sequence jointly, lr being a scalar or [M]."""

    @staticmethod
    def forward(ctx: Any, lr: float | Tensor, max_norm: float, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(tensors) // 2
        weights, gradients = tensors[:count], tensors[count:]
        new, norm_B, scale_B = _step(weights, gradients, lr, max_norm, [None] * count)
        ctx.has_rates = isinstance(lr, Tensor) and lr.dim() > 0
        ctx.save_for_backward(norm_B, scale_B, *([lr] if ctx.has_rates else []), *gradients)
        ctx.lr, ctx.max_norm = None if ctx.has_rates else lr, max_norm
        ctx.mark_non_differentiable(norm_B)
        return *new, norm_B

    @staticmethod
    @last_derivative
    def backward(ctx: Any, *grads: Tensor) -> Any:
        norm_B, scale_B, *gradients = ctx.saved_tensors
        *along, _ = grads
        lr, grad_lr = ctx.lr, None
        if ctx.has_rates:
            lr, *gradients = gradients
        inner = [(a * g).flatten(1).sum(1) for a, g in zip(along, gradients, strict=True)]
        if ctx.has_rates:
            inner_MB = torch.stack(inner)
            grad_lr = -(scale_B * inner_MB).sum(1)
            inner_B, lr_of_bend = (lr[:, None] * inner_MB).sum(0), 1.0
        else:
            inner_B, lr_of_bend = sum(inner), lr
        # Through the scale: d(c / n)/dg = -c g / n^3 where gradients are clipped, at n = c too; 0 elsewhere.
        bend_B = torch.where(norm_B >= ctx.max_norm, -scale_B * inner_B / norm_B / norm_B, 0.0)
        bend_B11 = bend_B[:, None, None] * -lr_of_bend
        steps = _steps(scale_B, lr, len(gradients))
        grad_g = [torch.addcmul(g * bend_B11, a, s) for a, g, s in zip(along, gradients, steps, strict=True)]
        return grad_lr, None, *along, *grad_g
