"""The update of the inner loop: SGD with gradients clipped by their norm, for every sequence by itself."""

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
    new = [w - lr * scale_B[:, None, None] * g for w, g in zip(weights, gradients, strict=True)]
    return new, square_B.sqrt().detach()


def clipped_step(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], lr: float | Tensor, max_norm: float
) -> tuple[list[Tensor], Tensor]:
    """The new weights [B, ..., ...] after one step of SGD, and the norms [B] of the gradients, which take no gradient.

    Each sequence's gradients are scaled to a joint norm of at most `max_norm`. Differentiable once in weights and
    gradients, through the norm too, and finite at a gradient of zero. If autograd records nothing, the new weights take
    the gradients' memory: for many sequences, fresh memory costs more than the arithmetic.
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
    step_B11 = (_scale(norm_B, max_norm) * -lr)[:, None, None]
    pairs = [(g * step_B11, x) for g, x in pairs]
    for w, (g, x) in zip(weights, pairs, strict=True):
        w.baddbmm_(g.transpose(1, 2), x)
    return norm_B


def _scale(norm_B: Tensor, max_norm: float) -> Tensor:
    """The factor for gradients of these norms: exactly 1 up to `max_norm`, where its slope is that beyond."""
    max_norm = min(max_norm, torch.finfo(norm_B.dtype).max)
    return torch.full_like(norm_B, max_norm) / norm_B.clamp(min=max_norm)


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
    step_B11 = (scale_B * -lr)[:, None, None]
    new = [torch.addcmul(w, g, step_B11, out=out) for w, g, out in zip(weights, gradients, into, strict=True)]
    return new, norm_B, scale_B


class _ClippedStep(torch.autograd.Function):
    """W - lr min(1, c / n) g with n = |g|, over all tensors of a sequence jointly."""

    @staticmethod
    def forward(ctx: Any, lr: float | Tensor, max_norm: float, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(tensors) // 2
        weights, gradients = tensors[:count], tensors[count:]
        new, norm_B, scale_B = _step(weights, gradients, lr, max_norm, [None] * count)
        ctx.save_for_backward(norm_B, scale_B, *gradients)
        ctx.lr, ctx.max_norm = lr, max_norm
        ctx.mark_non_differentiable(norm_B)
        return *new, norm_B

    @staticmethod
    @last_derivative
    def backward(ctx: Any, *grads: Tensor) -> Any:
        norm_B, scale_B, *gradients = ctx.saved_tensors
        *along, _ = grads
        # Through the scale: d(c / n)/dg = -c g / n^3 where gradients are clipped, at n = c too; 0 elsewhere.
        inner_B = sum((a * g).flatten(1).sum(1) for a, g in zip(along, gradients, strict=True))
        bend_B = torch.where(norm_B >= ctx.max_norm, -scale_B * inner_B / norm_B / norm_B, 0.0)
        scale_B11, bend_B11 = (x[:, None, None] * -ctx.lr for x in (scale_B, bend_B))
        grad_g = [torch.addcmul(g * bend_B11, a, scale_B11) for a, g in zip(along, gradients, strict=True)]
        return None, None, *along, *grad_g
