"""Causal attention, windowed or full: for the inner loop with its pull, and for everything that is differentiated once.

`attention` is for the inner loop: its gradient is written out, and differentiable itself. Where the scores are few it
keeps them, else it goes through `windowed_attention`'s operators, which compute them again and again in tiles.
`sdpa` goes through PyTorch's fused kernel, which has a first derivative only; it serves everything that no
inner gradient passes through. Over a whole sequence it works block by block, so that time and memory grow with
T x window, not with T x T.

Shapes: B sequences, T queries, S keys (the last T of them at the queries' own positions), H query heads, G key/value
heads, K head width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from ttt_e2e.ops import tuning
from ttt_e2e.ops.attention.mask import causal_window_mask
from ttt_e2e.ops.attention.operators import attention_backward, attention_forward
from ttt_e2e.ops.elementwise import accumulation_dtype

AttentionVjp = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def inner_loop_attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    window: int | None,
    num_empty_slots: Tensor | None = None,
    attn_mask_TS: Tensor | None = None,
) -> tuple[Tensor, AttentionVjp]:
    """Softmax attention of T queries over S >= T keys; returns [B, H, T, K] and its pull.

    Query i stands at key S - T + i and sees the last `window` keys up to its own (all of them if None), but not the
    first `num_empty_slots` ones (0-dim int32 tensor; None for none), which are no keys yet. attn_mask_TS: what `causal_window_mask` says of
    these, if it is known already. The pull gives the gradients of the queries and of the last T keys and values: those
    before are constants to the inner gradient (not to the outer one).
    """
    own, groups = q_BHTK.shape[2], q_BHTK.shape[1] // k_BGSK.shape[1]
    if q_BHTK.shape[:3].numel() * k_BGSK.shape[2] > tuning.KEPT_SCORES.get(q_BHTK.device.type, 0):
        o_BHTK, lse_BHT = attention_forward(q_BHTK, k_BGSK, v_BGSK, window, num_empty_slots, "auto")
        saved = (q_BHTK, k_BGSK, v_BGSK, o_BHTK, lse_BHT)
        return o_BHTK, lambda g: attention_backward(*saved, g, own, window, num_empty_slots, "auto")
    bias = (
        causal_window_mask(own, k_BGSK.shape[2], window, q_BHTK, num_empty_slots)
        if attn_mask_TS is None
        else attn_mask_TS
    )
    bias = bias.repeat(groups, 1) if groups > 1 else bias
    # The query heads of a group stand below one another, so that each key head is multiplied once.
    q_BGRK = (q_BHTK * q_BHTK.shape[3] ** -0.5).unflatten(1, (-1, groups)).flatten(2, 3)
    forward = attend_reference if is_compiling() else _attend
    y_BGRK, inner_vjp = forward(q_BGRK, k_BGSK, v_BGSK, bias, own)

    def vjp(g_BHTK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dq_BGRK, dk_BGTK, dv_BGTK = inner_vjp(g_BHTK.unflatten(1, (-1, groups)).flatten(2, 3))
        dq_BHTK = dq_BGRK.unflatten(2, (groups, own)).flatten(1, 2) * q_BHTK.shape[3] ** -0.5
        return dq_BHTK, dk_BGTK, dv_BGTK

    return y_BGRK.unflatten(2, (groups, own)).flatten(1, 2), vjp


def attend_reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, own: int) -> tuple[Tensor, AttentionVjp]:
    """softmax(q k^T + bias) v, and its pull, which gives the last `own` keys and values their gradients."""
    scores = q @ k.transpose(-1, -2)
    p = (scores.to(accumulation_dtype(q.dtype)) + bias).softmax(-1)
    weights = p.to(q.dtype)

    def vjp(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dp = g @ v.transpose(-1, -2)
        ds = (p * (dp - (p * dp).sum(-1, keepdim=True))).to(g.dtype)
        return ds @ k, ds[..., -own:].transpose(-1, -2) @ q, weights[..., -own:].transpose(-1, -2) @ g

    return weights @ v, vjp


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, own: int) -> tuple[Tensor, AttentionVjp]:
    y, p = _Attend.apply(q, k, v, bias)
    return y, lambda g: _AttendBackward.apply(p, q, k, v, g, own)


class _Attend(torch.autograd.Function):
    """y = P v and P = softmax(q k^T + bias), wide: the pull is a function of P too, and sends a gradient back to it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(-1, -2)
        p = scores.to(accumulation_dtype(q.dtype)).add_(bias).softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        ctx.set_materialize_grads(False)
        return p.to(q.dtype) @ v, p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        q, k, v, p = ctx.saved_tensors
        grad_y, grad_p = grads
        grad_v = None
        if grad_y is not None:
            grad_v = p.to(q.dtype).transpose(-1, -2) @ grad_y
            # In place: nobody but the pull makes this gradient, and nobody but this function is given it.
            grad_p = _add_product(grad_p, grad_y, v.transpose(-1, -2))
        assert grad_p is not None
        grad_s = _softmax_backward(p, grad_p.to(p.dtype)).to(q.dtype)
        return grad_s @ k, grad_s.transpose(-1, -2) @ q, grad_v, None


class _AttendBackward(torch.autograd.Function):
    """(dq, dk, dv), of the last `own` keys and values, as a function of P, q, k, v and g."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, own: int) -> Any:
        dp = (g @ v.transpose(-1, -2)).to(p.dtype)
        ds = _softmax_backward(p, dp).to(q.dtype)
        ctx.save_for_backward(p, q, k, v, g, dp, ds)
        ctx.own = own
        return ds @ k, ds[..., -own:].transpose(-1, -2) @ q, p[..., -own:].to(q.dtype).transpose(-1, -2) @ g

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        p, q, k, v, g, dp, ds = ctx.saved_tensors
        own = ctx.own
        a, b, c = grads
        grad_ds = a @ k.transpose(-1, -2)
        _add_product(grad_ds[..., -own:], q, b.transpose(-1, -2))
        grad_q, grad_k = ds[..., -own:] @ b, ds.transpose(-1, -2) @ a
        grad_p, grad_dp = _softmax_backward_backward(p, dp, grad_ds.to(p.dtype))
        _add_product(grad_p[..., -own:], g, c.transpose(-1, -2))
        grad_dp = grad_dp.to(q.dtype)
        grad_g = _add_product(grad_dp @ v, p[..., -own:].to(q.dtype), c)
        return grad_p, grad_q, grad_k, grad_dp.transpose(-1, -2) @ g, grad_g, None


def _add_product(x: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """x + a @ b, in the place of x."""
    if x is None:
        return a @ b
    a, b = a.flatten(0, 1), b.flatten(0, 1)
    rows = x.view(-1, *x.shape[2:])  # a view, or an error: never a copy
    if x.dtype == a.dtype:
        rows.baddbmm_(a, b)
    else:
        rows.add_(a @ b)
    return x


def _softmax_backward(p: Tensor, g: Tensor) -> Tensor:
    """P (g - rowsum(P g)): the derivative of the scores, P = softmax(scores), for a gradient g of P."""
    return torch.ops.aten._softmax_backward_data(g, p, -1, p.dtype)


def _softmax_backward_backward(p: Tensor, g: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of <a, _softmax_backward(p, g)> in p and g."""
    buffer = p * g  # large, so one serves for all
    pg = buffer.sum(-1, keepdim=True)
    pa = torch.mul(p, a, out=buffer).sum(-1, keepdim=True)
    grad_p = torch.sub(g, pg, out=buffer).mul_(a).addcmul_(g, pa, value=-1)
    return grad_p, _softmax_backward(p, a)
