"""The functions of the inner loop between matrix products, with first and second derivatives written out.

Each returns its value and its vjp, the function from a gradient of the value to one of the argument. A vjp can be
differentiated itself, in the gradient and in what the value was computed from: so an inner gradient is written as a
chain of vjps, and autograd differentiates the whole once.

PyTorch's own formulas give the same numbers, but their second derivatives are long chains of small operations, which
in the loop would take more time than some of the matrix products. The functions named `*_reference` are the
definitions. A compiler is given these, because it fuses such chains by itself.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_e2e.ops.derivatives import last_derivative, wants_definition

Vjp = Callable[[Tensor], Tensor]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, rotations and losses if matrix products are in `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# -- RMSNorm -----------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Vjp]:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype, and its vjp.

    Computed in float32 (float64 if x is). `weight` broadcasts to x.
    """
    if wants_definition():
        return rms_norm_reference(x, weight, eps)
    y, r = _RMSNorm.apply(x, weight, eps)
    return y, lambda g: _RMSNormBackward.apply(x, weight, g, r)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Vjp]:
    """The definition of `rms_norm`."""
    x_wide = x.to(accumulation_dtype(x.dtype))
    r = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    unit = x_wide * r

    def vjp(g: Tensor) -> Tensor:
        g_unit = g.to(x_wide.dtype) * weight
        return (r * (g_unit - unit * (g_unit * unit).mean(-1, keepdim=True))).to(x.dtype)

    return (unit * weight).to(x.dtype), vjp


class _RMSNorm(torch.autograd.Function):
    """y = r x w and r = (|x|^2 / D + eps)^(-1/2). r takes no gradient: its effect is contained in that of y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x_wide = x.to(accumulation_dtype(x.dtype))
        norm = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True)
        r = torch.addcmul(norm.new_full((), eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        ctx.mark_non_differentiable(r)
        ctx.set_materialize_grads(False)
        return (x_wide * r).mul_(weight).to(x.dtype), r

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, r = ctx.saved_tensors
        g = grads[0]
        if g is None:
            return None, None, None
        grad_weight = (x.to(r.dtype) * r).mul_(g).sum_to_size(weight.shape) if ctx.needs_input_grad[1] else None
        return _RMSNormBackward.apply(x, weight, g, r), grad_weight, None


class _RMSNormBackward(torch.autograd.Function):
    """dx = r (u - n s), with n = r x, u = w g, s = <u, n> / D, as a function of x, w and g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, g: Tensor, r: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, g, r)
        n, u = x.to(r.dtype) * r, g.to(r.dtype) * weight
        return u.addcmul_(n, _dot(u, n), value=-1 / x.shape[-1]).mul_(r).to(x.dtype)

    @staticmethod
    @last_derivative
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, g, r = ctx.saved_tensors
        g, a, share = g.to(r.dtype), grads[0].to(r.dtype), 1 / x.shape[-1]
        n, u = x.to(r.dtype) * r, g * weight
        ds, dt = _dot(u, n), _dot(a, n)  # D s and D t
        # With phi = <a, dx> = r D (q - s t), q = <a, u> / D: the derivatives in u, and in x through n and r.
        along_u = torch.addcmul(a, n, dt, value=-share).mul_(r)
        bend = torch.addcmul(_dot(a, u), ds, dt, value=-3 * share)
        along_x = n.mul_(bend).addcmul_(u, dt).addcmul_(a, ds).mul_(r.square().mul_(-share))
        grad_weight = (along_u * g).sum_to_size(weight.shape) if ctx.needs_input_grad[1] else None
        return along_x.to(x.dtype), grad_weight, along_u.mul_(weight).to(grads[0].dtype), None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


# -- gated linear units -----------------------------------------------------------------------------------------------


def glu(hidden: Tensor, activation: str) -> tuple[Tensor, Vjp]:
    """f(gate) * value, where gate and value are the halves of the last dimension, and its vjp.

    activation: f, one of `ACTIVATIONS`.
    """
    f = ACTIVATIONS[activation]
    if wants_definition():
        return glu_reference(hidden, activation)
    return _GLU.apply(hidden, f), lambda g: _GLUBackward.apply(hidden, g, f)


def glu_reference(hidden: Tensor, activation: str) -> tuple[Tensor, Vjp]:
    """The definition of `glu`."""
    gate, value = hidden.chunk(2, -1)
    if activation == "silu":

        def vjp(g: Tensor) -> Tensor:
            s = torch.sigmoid(gate)
            return torch.cat((g * value * s * (1 + gate * (1 - s)), g * gate * s), -1)

        return F.silu(gate) * value, vjp

    def gelu_vjp(g: Tensor) -> Tensor:
        t = torch.tanh(_GELU_SCALE * (gate + _GELU_CUBE * gate**3))
        slope = (1 + t) / 2 + gate / 2 * (1 - t * t) * _GELU_SCALE * (1 + 3 * _GELU_CUBE * gate * gate)
        return torch.cat((g * value * slope, g * gate * (1 + t) / 2), -1)

    return F.gelu(gate, approximate="tanh") * value, gelu_vjp


class _Activation(NamedTuple):
    """A function f of the gate and its first two derivatives."""

    f: Callable[[Tensor], Tensor]
    f_out: Callable[..., Tensor]  # f_out(gate, out=...)
    times_slope_: Callable[[Tensor, Tensor], Tensor]  # x f'(gate), in the memory of x
    slope_of_slope: Callable[[Tensor], Tensor]  # f''


def _silu_slope_of_slope(gate: Tensor) -> Tensor:
    s = torch.sigmoid(gate)
    return torch.addcmul(gate, gate, s, value=-2).add_(2).mul_(s.addcmul_(s, s, value=-1))


_GELU_SCALE, _GELU_CUBE = math.sqrt(2 / math.pi), 0.044715


def _gelu_slope_of_slope(gate: Tensor) -> Tensor:
    """With u = c (x + a x^3) and t = tanh u, f = x (1 + t) / 2, so f'' = (1 - t^2) (u' + x u'' / 2 - x t u'^2)."""
    x = gate.to(accumulation_dtype(gate.dtype))  # 1 - t^2 is a difference of numbers that are nearly equal
    square = x * x
    t = torch.addcmul(x, x, square, value=_GELU_CUBE).mul_(_GELU_SCALE).tanh_()
    u1 = torch.mul(square, 3 * _GELU_CUBE).add_(1).mul_(_GELU_SCALE)
    total = torch.add(u1, square, alpha=3 * _GELU_CUBE * _GELU_SCALE).sub_((x * t).mul_(u1).mul_(u1))
    return total.mul_(t.square_().neg_().add_(1)).to(gate.dtype)


ACTIVATIONS = {
    "silu": _Activation(
        F.silu,
        torch.ops.aten.silu.out,
        lambda x, gate: torch.ops.aten.silu_backward.grad_input(x, gate, grad_input=x),
        _silu_slope_of_slope,
    ),
    "gelu_pytorch_tanh": _Activation(
        partial(F.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu.out, approximate="tanh"),
        lambda x, gate: torch.ops.aten.gelu_backward.grad_input(x, gate, approximate="tanh", grad_input=x),
        _gelu_slope_of_slope,
    ),
}
"""The activations by the names that they have in config.json files: SwiGLU's, and GELU in its approximation by tanh."""


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, activation: _Activation) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.activation = activation
        gate, value = hidden.chunk(2, -1)
        return activation.f(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _GLUBackward.apply(*ctx.saved_tensors, *grads, ctx.activation), None


class _GLUBackward(torch.autograd.Function):
    """(d gate, d value) = (g value f'(gate), g f(gate)), as a function of hidden and g."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, g: Tensor, activation: _Activation) -> Tensor:
        ctx.save_for_backward(hidden, g)
        ctx.activation = activation
        gate, value = hidden.chunk(2, -1)
        out = torch.empty_like(hidden)
        d_gate, d_value = out.chunk(2, -1)
        activation.times_slope_(torch.mul(g, value, out=d_gate), gate)
        activation.f_out(gate, out=d_value).mul_(g)
        return out

    @staticmethod
    @last_derivative
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (hidden, g), activation = ctx.saved_tensors, ctx.activation
        gate, value = hidden.chunk(2, -1)
        a, b = grads[0].chunk(2, -1)
        out = torch.empty_like(hidden)
        grad_gate, grad_value = out.chunk(2, -1)
        ag = a * g
        activation.times_slope_(grad_value.copy_(ag), gate)
        activation.times_slope_(torch.mul(b, g, out=grad_gate), gate)
        grad_gate.addcmul_(activation.slope_of_slope(gate).mul_(ag), value)
        grad_g = activation.times_slope_(torch.mul(a, value, out=ag), gate).addcmul_(b, activation.f(gate))
        return out, grad_g, None


# -- soft cap ----------------------------------------------------------------------------------------------------------


def softcap(x: Tensor, cap: float) -> tuple[Tensor, Vjp]:
    """cap * tanh(x / cap), which lies between -cap and cap, and its vjp; differentiable any number of times."""
    t = torch.tanh(x / cap)
    return cap * t, lambda g: g * (1 - t * t)


# -- cross-entropy -----------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Vjp]:
    """Negative log-likelihood of the targets [...] under softmax(logits [..., V]), and its vjp.

    The losses are in float32 (float64 if the logits are), the gradient of the logits in their dtype.
    """
    if wants_definition():
        return cross_entropy_reference(logits, targets)
    nll, p = _CrossEntropy.apply(logits, targets)
    return nll, lambda g: _CrossEntropyBackward.apply(logits, p, targets, g)


def cross_entropy_reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, Vjp]:
    """The definition of `cross_entropy`."""
    log_p = logits.to(accumulation_dtype(logits.dtype)).log_softmax(-1)
    at = torch.arange(logits.shape[-1], device=logits.device) == targets[..., None]
    nll = -torch.where(at, log_p, 0.0).sum(-1)  # not gather: a compiler cannot fuse its derivative
    return nll, lambda g: ((log_p.exp() - at.to(log_p.dtype)) * g[..., None]).to(logits.dtype)


class _CrossEntropy(torch.autograd.Function):
    """-log p[target], and p. p takes no gradient: its effect is contained in those of the loss and of the vjp."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = logits.to(accumulation_dtype(logits.dtype)).log_softmax(-1)
        nll = log_p.gather(-1, targets[..., None])[..., 0].neg_()
        p = log_p.exp_()
        ctx.save_for_backward(logits, p, targets)
        ctx.mark_non_differentiable(p)
        ctx.set_materialize_grads(False)
        return nll, p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if grads[0] is None:
            return None, None
        return _CrossEntropyBackward.apply(*ctx.saved_tensors, grads[0]), None


class _CrossEntropyBackward(torch.autograd.Function):
    """dz = (p - onehot) g, as a function of the logits z (through p) and g."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, p: Tensor, targets: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(p, targets, g)
        g = g[..., None]
        return (p * g).scatter_add_(-1, targets[..., None], -g).to(logits.dtype)

    @staticmethod
    @last_derivative
    def backward(ctx: Any, *grads: Tensor) -> Any:
        p, targets, g = ctx.saved_tensors
        a = grads[0].to(p.dtype)
        mean = _dot(p, a)
        grad_logits = (a - mean).mul_(p).mul_(g[..., None]).to(grads[0].dtype)
        grad_g = (mean - a.gather(-1, targets[..., None]))[..., 0] if ctx.needs_input_grad[3] else None
        return grad_logits, None, None, grad_g


# -- rotary positions --------------------------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Vjp]:
    """Rotate each pair (i, i + K/2) of x [..., K] by an angle, and the vjp, which rotates back.

    `cos` and `sin` broadcast to [..., K/2]; or they are [T, B, 1, K/2], an angle for each sequence, for x [B, T, J, K].
    The angles take no gradient.
    """
    if cos.dim() == 4:
        cos, sin = cos.transpose(0, 1), sin.transpose(0, 1)
    if wants_definition():
        return rotate_reference(x, cos, sin)
    return _Rotate.apply(x, cos, sin), lambda g: _Rotate.apply(g, cos, -sin)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Vjp]:
    """The definition of `rotate`."""

    def rotated(x: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    return rotated(x, sin), lambda g: rotated(g, -sin)


class _Rotate(torch.autograd.Function):
    """A rotation. Its derivative is the rotation back."""

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
