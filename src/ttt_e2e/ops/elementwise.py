"""The functions between matrix products that the inner loop is full of, first and second derivatives written out.

PyTorch's own formulas give the same numbers, but their derivatives of derivatives are long chains of small operations;
in the loop those chains would take more time than some of the matrix products. `*_reference` are the plain twins.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension: RMSNorm before its weight. Twice differentiable."""
    return _UnitRMS.apply(x, eps)


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
    """y = r x with r = (|x|^2 / D + eps)^(-1/2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        r = _dot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_()
        y = x * r
        ctx.save_for_backward(x, y, r)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _UnitRMSBackward.apply(*ctx.saved_tensors, *grads), None


class _UnitRMSBackward(torch.autograd.Function):
    """dx = r (g - y <g, y> / D), as a function of x and g; y and r are x's own and take no gradient of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, r: Tensor, g: Tensor) -> Tensor:
        gy = _dot(g, y)
        ctx.save_for_backward(y, r, g, gy)
        return torch.addcmul(g, y, gy, value=-1 / y.shape[-1]).mul_(r)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y, r, g, gy = ctx.saved_tensors
        (a,) = grads
        width = y.shape[-1]
        ay, ag = _dot(a, y), _dot(a, g)
        grad_g = torch.addcmul(a, y, ay, value=-1 / width).mul_(r)
        # r^2 / D times -gy a - ay g + y (3 gy ay / D - ag): from dr/dx = -r^2 y / D and dy/dx = r (1 - y y^T / D).
        across = torch.addcmul(ag, gy, ay, value=-3 / width).neg_()
        grad_x = (y * across).addcmul_(a, gy, value=-1).addcmul_(g, ay, value=-1).mul_(r.square().div_(width))
        return grad_x, None, None, grad_g


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
        return torch.cat((_times_slope(g * value, gate), F.silu(gate).mul_(g)), -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, g = ctx.saved_tensors
        gate, value = hidden.chunk(2, -1)
        a, b = grads[0].chunk(2, -1)
        grad_g = _times_slope(a * value, gate).addcmul_(b, F.silu(gate))
        s = torch.sigmoid(gate)
        slope_of_slope = torch.addcmul(gate, gate, s, value=-2).add_(2).mul_(s - s * s)
        ag = a * g
        grad_gate = slope_of_slope.mul_(ag).mul_(value).add_(_times_slope(b * g, gate))
        return torch.cat((grad_gate, _times_slope(ag, gate)), -1), grad_g


class _MaskedSoftmax(torch.autograd.Function):
    """P = softmax(S) over the allowed entries."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor) -> Tensor:
        p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        ctx.save_for_backward(scores, p)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _MaskedSoftmaxBackward.apply(*ctx.saved_tensors, *grads), None


class _MaskedSoftmaxBackward(torch.autograd.Function):
    """dS = P (g - rowsum(P g)), as a function of S and g; P is S's own and takes no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, p: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(p, g)
        return _softmax_backward(g, p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        p, g = ctx.saved_tensors
        (a,) = grads
        pg, pa = ((p * x).sum(-1, keepdim=True) for x in (g, a))
        # d<a, dS>/dP = a (g - rowsum(P g)) - g rowsum(P a), and from there to S as in the first derivative.
        grad_p = (g - pg).mul_(a).addcmul_(g, pa, value=-1)
        return _softmax_backward(grad_p, p), None, _softmax_backward(a, p)


def _softmax_backward(g: Tensor, p: Tensor) -> Tensor:
    """P (g - rowsum(P g))."""
    return torch.ops.aten._softmax_backward_data(g, p, -1, p.dtype)


def _times_slope(x: Tensor, gate: Tensor) -> Tensor:
    """x silu'(gate)."""
    return torch.ops.aten.silu_backward(x, gate)
