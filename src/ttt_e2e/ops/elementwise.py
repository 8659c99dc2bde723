"""The functions between matrix products that the inner loop is full of, first and second derivatives written out.

PyTorch's own formulas give the same numbers, but their derivatives of derivatives are long chains of small operations;
in the loop those chains would take more time than some of the matrix products. `*_reference` are the plain twins.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension: RMSNorm before its weight. Twice differentiable."""
    return _UnitRMS.apply(x, eps)[0]


def unit_rms_reference(x: Tensor, eps: float) -> Tensor:
    """The plain twin of `unit_rms`."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def swiglu(hidden: Tensor) -> Tensor:
    """silu(gate) * value, gate and value being the halves of the last dimension. Twice differentiable."""
    return _SwiGLU.apply(hidden)


def swiglu_reference(hidden: Tensor) -> Tensor:
    """The plain twin of `swiglu`."""
    gate, value = hidden.chunk(2, -1)
    return F.silu(gate) * value


def clipped_step(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], lr: float, clip: float
) -> tuple[list[Tensor], Tensor]:
    """One step of SGD on weights [B, ...], each sequence's gradients scaled to a joint norm of at most `clip`.

    Returns the new weights and the norms [B] before the clip, which take no gradient. Differentiable once in weights
    and gradients, the norm in the scale included, and finite at a gradient of zero.
    """
    *new, norm_B = _ClippedStep.apply(lr, clip, *weights, *gradients)
    return new, norm_B


def clipped_step_reference(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], lr: float, clip: float
) -> tuple[list[Tensor], Tensor]:
    """The plain twin of `clipped_step`."""
    norm_B = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dim=(1, 2)) for g in gradients]), dim=0)
    scale_B = torch.full_like(norm_B, clip) / norm_B.clamp(min=clip)
    return [w - lr * scale_B[:, None, None] * g for w, g in zip(weights, gradients, strict=True)], norm_B.detach()


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension where `mask`, broadcast to scores, is true; 0 elsewhere. Twice differentiable.

    At least one entry of every row must be allowed.
    """
    return _MaskedSoftmax.apply(scores, mask)


def masked_softmax_reference(scores: Tensor, mask: Tensor) -> Tensor:
    """The plain twin of `masked_softmax`."""
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair (i, i + K/2) of x [..., K] by an angle, its cosine and sine broadcast to [..., K/2].

    The angles take no gradient. Differentiable any number of times.
    """
    return _Rotate.apply(x, cos, sin)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The plain twin of `rotate`."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


class _ClippedStep(torch.autograd.Function):
    """W - lr min(1, c / n) g with n = |g|, over all tensors of a sequence jointly."""

    @staticmethod
    def forward(ctx: Any, lr: float, clip: float, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(tensors) // 2
        weights, gradients = tensors[:count], tensors[count:]
        norms = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients]
        norm_B = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        scale_B = torch.full_like(norm_B, clip) / norm_B.clamp(min=clip)  # exactly 1 below the clip
        ctx.save_for_backward(norm_B, scale_B, *gradients)
        ctx.lr, ctx.clip = lr, clip
        ctx.mark_non_differentiable(norm_B)
        step_B11 = scale_B[:, None, None]
        new = [torch.addcmul(w, g, step_B11, value=-lr) for w, g in zip(weights, gradients, strict=True)]
        return *new, norm_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        norm_B, scale_B, *gradients = ctx.saved_tensors
        *along, _ = grads
        # The scale's own part: d(c / n)/dg = -c g / n^3 where the clip is at work, 0 elsewhere.
        inner_B = sum((a * g).flatten(1).sum(1) for a, g in zip(along, gradients, strict=True))
        bend_B = torch.where(norm_B > ctx.clip, -scale_B * inner_B / norm_B.square().clamp(min=ctx.clip**2), 0.0)
        scale_B11, bend_B11 = (x[:, None, None] * -ctx.lr for x in (scale_B, bend_B))
        grad_g = [torch.addcmul(g * bend_B11, a, scale_B11) for a, g in zip(along, gradients, strict=True)]
        return None, None, *along, *grad_g


class _Rotate(torch.autograd.Function):
    """A rotation: its derivative is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        a, b = x.chunk(2, -1)
        out = torch.empty_like(x)
        torch.mul(a, cos, out=out[..., : a.shape[-1]]).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=out[..., a.shape[-1] :]).addcmul_(a, sin)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grads[0], cos, -sin), None, None


class _UnitRMS(torch.autograd.Function):
    """(y, r) = (r x, r) with r = (|x|^2 / D + eps)^(-1/2). Only the outputs are kept: x is y / r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = torch.addcmul(norm.new_full((), eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()
        y = x * r
        ctx.save_for_backward(y, r)
        ctx.set_materialize_grads(False)
        return y, r

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        y, r = ctx.saved_tensors
        grad_y, grad_r = grads
        if grad_r is None:
            return (None if grad_y is None else _UnitRMSBackward.apply(y, r, grad_y)), None
        # Second order only: dr/dx = -r^2 y / D joins the part along y.
        along = grad_r * r if grad_y is None else torch.addcmul(_dot(grad_y, y), grad_r, r)
        start = torch.zeros_like(y) if grad_y is None else grad_y
        return torch.addcmul(start, y, along, value=-1 / y.shape[-1]).mul_(r), None


class _UnitRMSBackward(torch.autograd.Function):
    """dx = r (g - y <g, y> / D), as a function of y, r and g."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, r: Tensor, g: Tensor) -> Tensor:
        gy = _dot(g, y)
        ctx.save_for_backward(y, r, g, gy)
        return torch.addcmul(g, y, gy, value=-1 / y.shape[-1]).mul_(r)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y, r, g, gy = ctx.saved_tensors
        (a,) = grads
        share = -1 / y.shape[-1]
        ay = _dot(a, y)
        grad_y = (a * gy).addcmul_(g, ay).mul_(r * share)
        grad_r = torch.addcmul(_dot(a, g), ay, gy, value=share)
        return grad_y, grad_r, torch.addcmul(a, y, ay, value=share).mul_(r)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * value."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        gate, value = hidden.chunk(2, -1)
        return F.silu(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _SwiGLUBackward.apply(*ctx.saved_tensors, *grads)


class _SwiGLUBackward(torch.autograd.Function):
    """(d gate, d value) = (g value silu'(gate), g silu(gate)), as a function of hidden and g."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, g)
        gate, value = hidden.chunk(2, -1)
        out = torch.empty_like(hidden)
        d_gate, d_value = out.chunk(2, -1)
        _times_slope_(torch.mul(g, value, out=d_gate), gate)
        torch.ops.aten.silu.out(gate, out=d_value).mul_(g)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, g = ctx.saved_tensors
        gate, value = hidden.chunk(2, -1)
        a, b = grads[0].chunk(2, -1)
        out = torch.empty_like(hidden)
        grad_gate, grad_value = out.chunk(2, -1)
        ag = a * g
        _times_slope_(grad_value.copy_(ag), gate)
        _times_slope_(torch.mul(b, g, out=grad_gate), gate)
        s = torch.sigmoid(gate)
        slope_of_slope = torch.addcmul(gate, gate, s, value=-2).add_(2).mul_(s.addcmul_(s, s, value=-1))
        grad_gate.addcmul_(slope_of_slope.mul_(ag), value)
        grad_g = _times_slope_(torch.mul(a, value, out=ag), gate).addcmul_(b, F.silu(gate))
        return out, grad_g


def _times_slope_(x: Tensor, gate: Tensor) -> Tensor:
    """x silu'(gate), in the place of x."""
    return torch.ops.aten.silu_backward.grad_input(x, gate, grad_input=x)


class _MaskedSoftmax(torch.autograd.Function):
    """P = softmax(S) over the allowed entries. Only P is kept."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor) -> Tensor:
        p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _MaskedSoftmaxBackward.apply(*ctx.saved_tensors, *grads), None


class _MaskedSoftmaxBackward(torch.autograd.Function):
    """dS = P (g - rowsum(P g)), as a function of P and g."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(p, g)
        return _softmax_backward(g, p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        p, g = ctx.saved_tensors
        (a,) = grads
        buffer = p * g  # large, so one serves for all
        pg = buffer.sum(-1, keepdim=True)
        pa = torch.mul(p, a, out=buffer).sum(-1, keepdim=True)
        grad_p = torch.sub(g, pg, out=buffer).mul_(a).addcmul_(g, pa, value=-1)
        return grad_p, _softmax_backward(a, p)


def _softmax_backward(g: Tensor, p: Tensor) -> Tensor:
    """P (g - rowsum(P g))."""
    return torch.ops.aten._softmax_backward_data(g, p, -1, p.dtype)
