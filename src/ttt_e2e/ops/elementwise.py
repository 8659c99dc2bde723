"""The functions between matrix products that the inner loop is full of, first and second derivatives written out.

Each returns its value and its pull: the function that takes a gradient of the value back to one of the argument. A
pull is an ordinary function that can itself be differentiated (in the gradient, and in what the value was computed
from), so an inner gradient is written as a chain of pulls, and autograd differentiates the whole once.

PyTorch's own formulas give the same numbers, but their derivatives of derivatives are long chains of small operations;
in the loop those chains would take more time than some of the matrix products. `*_reference` are the plain twins, and
what a compiler is given: it fuses such chains by itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from ttt_e2e.ops.linear import OuterProductFactors

Vjp = Callable[[Tensor], Tensor]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, rotations and losses when the matrix products are in `dtype`: float32, or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# -- RMSNorm -----------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Vjp]:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 (float64 if x is), in x's dtype.

    weight broadcasts to x from the right.
    """
    if is_compiling():
        return rms_norm_reference(x, weight, eps)
    y, r = _RMSNorm.apply(x, weight, eps)
    return y, lambda g: _RMSNormBackward.apply(x, weight, g, r)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Vjp]:
    """The plain twin of `rms_norm`."""
    x_wide = x.to(accumulation_dtype(x.dtype))
    r = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    unit = x_wide * r

    def vjp(g: Tensor) -> Tensor:
        g_unit = g.to(x_wide.dtype) * weight
        return (r * (g_unit - unit * (g_unit * unit).mean(-1, keepdim=True))).to(x.dtype)

    return (unit * weight).to(x.dtype), vjp


class _RMSNorm(torch.autograd.Function):
    """y = r x w, and r = (|x|^2 / D + eps)^(-1/2), which takes no gradient: its effect is in that of y."""

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
    @once_differentiable
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


# -- SwiGLU ------------------------------------------------------------------------------------------------------------


def swiglu(hidden: Tensor) -> tuple[Tensor, Vjp]:
    """silu(gate) * value, gate and value being the halves of the last dimension."""
    if is_compiling():
        return swiglu_reference(hidden)
    return _SwiGLU.apply(hidden), lambda g: _SwiGLUBackward.apply(hidden, g)


def swiglu_reference(hidden: Tensor) -> tuple[Tensor, Vjp]:
    """The plain twin of `swiglu`."""
    gate, value = hidden.chunk(2, -1)

    def vjp(g: Tensor) -> Tensor:
        s = torch.sigmoid(gate)
        return torch.cat((g * value * s * (1 + gate * (1 - s)), g * gate * s), -1)

    return F.silu(gate) * value, vjp


class _SwiGLU(torch.autograd.Function):
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


# -- cross-entropy -----------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Vjp]:
    """Negative log-likelihood of the targets under softmax(logits [..., V]), in float32 (float64 if logits are).

    The pull takes a weight for every target, which is a constant, to a gradient of the logits, in their dtype.
    """
    if is_compiling():
        return cross_entropy_reference(logits, targets)
    nll, p = _CrossEntropy.apply(logits, targets)
    return nll, lambda g: _CrossEntropyBackward.apply(logits, p, targets, g)


def cross_entropy_reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, Vjp]:
    """The plain twin of `cross_entropy`."""
    log_p = logits.to(accumulation_dtype(logits.dtype)).log_softmax(-1)
    at = torch.arange(logits.shape[-1], device=logits.device) == targets[..., None]
    nll = -torch.where(at, log_p, 0.0).sum(-1)  # not gather, whose derivative a compiler cannot fuse
    return nll, lambda g: ((log_p.exp() - at.to(log_p.dtype)) * g[..., None]).to(logits.dtype)


class _CrossEntropy(torch.autograd.Function):
    """-log p[target], and p, which takes no gradient: its effect is in those of the loss and of the pull."""

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
    """dz = (p - onehot) g, as a function of the logits z (of which only p is needed) and g."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, p: Tensor, targets: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(p, targets, g)
        g = g[..., None]
        return (p * g).scatter_add_(-1, targets[..., None], -g).to(logits.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        p, targets, g = ctx.saved_tensors
        a = grads[0].to(p.dtype)
        mean = _dot(p, a)
        grad_logits = (a - mean).mul_(p).mul_(g[..., None]).to(grads[0].dtype)
        grad_g = (mean - a.gather(-1, targets[..., None]))[..., 0] if ctx.needs_input_grad[3] else None
        return grad_logits, None, None, grad_g


# -- rotation ----------------------------------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Vjp]:
    """Turn every pair (i, i + K/2) of x [..., K] by an angle, its cosine and sine broadcast to [..., K/2].

    Cosine and sine of four dimensions are every sequence's own, tokens first, [T, B, 1, K/2], for x [B, T, J, K]. The
    angles take no gradient.
    """
    if cos.dim() == 4:
        cos, sin = cos.transpose(0, 1), sin.transpose(0, 1)
    if is_compiling():
        return rotate_reference(x, cos, sin)
    return _Rotate.apply(x, cos, sin), lambda g: _Rotate.apply(g, cos, -sin)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Vjp]:
    """The plain twin of `rotate`."""

    def turn(x: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    return turn(x, sin), lambda g: turn(g, -sin)


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


# -- the update --------------------------------------------------------------------------------------------------------


def clipped_step(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], lr: float | Tensor, clip: float
) -> tuple[list[Tensor], Tensor]:
    """One step of SGD on weights [B, ...], each sequence's gradients scaled to a joint norm of at most `clip`.

    Returns the new weights and the norms [B] before the clip, which take no gradient. Differentiable once in weights
    and gradients, the norm in the scale included, and finite at a gradient of zero. Where no gradient is recorded, the
    new weights take the gradients' memory: for many sequences fresh memory costs more than the sums.
    """
    if is_compiling():
        return clipped_step_reference(weights, gradients, lr, clip)
    if torch.is_grad_enabled():
        *new, norm_B = _ClippedStep.apply(lr, clip, *weights, *gradients)
        return new, norm_B
    new, norm_B, _ = _step(weights, gradients, lr, clip, gradients)
    return new, norm_B


def clipped_step_(
    weights: Sequence[Tensor], factors: Sequence[OuterProductFactors], lr: float | Tensor, clip: float
) -> Tensor:
    """`clipped_step` in place, by gradients that are never multiplied out; returns their norms [B]. Takes no gradient.

    With G = g^T x is |G|^2 = <g g^T, x x^T>, which takes T^2 (E + D) operations where G takes T E D.
    """
    pairs = [(g.to(w.dtype), x.to(w.dtype)) for w, (g, x) in zip(weights, factors, strict=True)]
    grams = [(g @ g.transpose(1, 2)) * (x @ x.transpose(1, 2)) for g, x in pairs]
    norm_B = torch.stack([gram.sum((1, 2)) for gram in grams]).sum(0).clamp(min=0).sqrt()
    step_B11 = (_scale(norm_B, clip) * -lr)[:, None, None]
    pairs = [(g * step_B11, x) for g, x in pairs]
    for w, (g, x) in zip(weights, pairs, strict=True):
        w.baddbmm_(g.transpose(1, 2), x)
    return norm_B


def _scale(norm_B: Tensor, clip: float) -> Tensor:
    """What gradients of these norms are multiplied by: exactly 1 below the clip."""
    return torch.full_like(norm_B, clip) / norm_B.clamp(min=clip)


def _step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    lr: float | Tensor,
    clip: float,
    into: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The new weights, in the given tensors' memory or in fresh one; the gradients' norms [B], and their scales."""
    # Row by row first: of a whole matrix at once, PyTorch's float32 sum on a CPU comes out too small by 1e-5.
    norms = [torch.linalg.vector_norm(torch.linalg.vector_norm(g, dim=2), dim=1) for g in gradients]
    norm_B = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    scale_B = _scale(norm_B, clip)
    step_B11 = (scale_B * -lr)[:, None, None]
    new = [torch.addcmul(w, g, step_B11, out=out) for w, g, out in zip(weights, gradients, into, strict=True)]
    return new, norm_B, scale_B


def clipped_step_reference(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], lr: float | Tensor, clip: float
) -> tuple[list[Tensor], Tensor]:
    """The plain twin of `clipped_step`."""
    square_B = torch.stack([g.square().flatten(1).sum(1) for g in gradients]).sum(0)
    # The larger of the two comes before the root, whose slope at zero is infinite.
    scale_B = clip * square_B.clamp(min=clip**2).rsqrt()
    new = [w - lr * scale_B[:, None, None] * g for w, g in zip(weights, gradients, strict=True)]
    return new, square_B.sqrt().detach()


class _ClippedStep(torch.autograd.Function):
    """W - lr min(1, c / n) g with n = |g|, over all tensors of a sequence jointly."""

    @staticmethod
    def forward(ctx: Any, lr: float | Tensor, clip: float, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(tensors) // 2
        weights, gradients = tensors[:count], tensors[count:]
        new, norm_B, scale_B = _step(weights, gradients, lr, clip, [None] * count)
        ctx.save_for_backward(norm_B, scale_B, *gradients)
        ctx.lr, ctx.clip = lr, clip
        ctx.mark_non_differentiable(norm_B)
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
