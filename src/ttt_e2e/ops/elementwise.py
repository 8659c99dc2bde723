"""The two element-wise functions that the inner loop is full of, with first and second derivatives written out.

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


def _mean_product(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).mean(-1, keepdim=True)


class _UnitRMS(torch.autograd.Function):
    """y = r x with r = (mean(x^2) + eps)^(-1/2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        r = torch.rsqrt(_mean_product(x, x) + eps)
        y = x * r
        ctx.save_for_backward(x, y, r)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _UnitRMSBackward.apply(*ctx.saved_tensors, *grads), None


class _UnitRMSBackward(torch.autograd.Function):
    """dx = r (g - y mean(g y)), as a function of x and g; y and r are x's own and take no gradient of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, r: Tensor, g: Tensor) -> Tensor:
        gy = _mean_product(g, y)
        ctx.save_for_backward(y, r, g, gy)
        return torch.addcmul(g, y, gy, value=-1).mul_(r)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y, r, g, gy = ctx.saved_tensors
        (a,) = grads
        ay, ag = _mean_product(a, y), _mean_product(a, g)
        grad_g = torch.addcmul(a, y, ay, value=-1).mul_(r)
        # -gy a - ay g + y (3 gy ay - ag), times r^2: from dr/dx = -r^2 y / D and dy/dx = r (1 - y y^T / D).
        grad_x = (y * (3 * gy * ay - ag)).addcmul_(a, gy, value=-1).addcmul_(g, ay, value=-1).mul_(r * r)
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


def _times_slope(x: Tensor, gate: Tensor) -> Tensor:
    """x silu'(gate)."""
    return torch.ops.aten.silu_backward(x, gate)
