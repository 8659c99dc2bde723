"""Attention of the inner loop: it returns its vjp, and autograd differentiates both once more."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_e2e.ops import tuning
from ttt_e2e.ops.attention.mask import causal_window_mask
from ttt_e2e.ops.attention.operators import attention_backward, attention_forward
from ttt_e2e.ops.attention.sink import Sink, add_sink, seen_sink
from ttt_e2e.ops.derivatives import last_derivative, wants_definition
from ttt_e2e.ops.elementwise import Vjp, accumulation_dtype, softcap

AttentionVjp = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def inner_loop_attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    window: int | None,
    num_empty_slots: Tensor | None = None,
    attn_mask_TS: Tensor | None = None,
    sink: Sink | None = None,
    cap: float | None = None,
) -> tuple[Tensor, AttentionVjp]:
    """Softmax attention of T queries over S >= T keys, and its vjp.

    Up to `tuning.KEPT_SCORES` scores, the softmax is kept for the vjp; beyond, it is computed again in tiles. With a
    cap it is always kept, and autograd differentiates the definition.

    Args:
        q_BHTK: Queries [B, H, T, K], at the positions of the last T keys. H may be a multiple of G.
        k_BGSK: Keys [B, G, S, K].
        v_BGSK: Values, shaped as the keys.
        window: Number of keys that a query sees, its own included; None for all up to its own position.
        num_empty_slots: How many of the first keys hold nothing: a 0-dim int32 tensor, or None if there are none.
        attn_mask_TS: What `causal_window_mask` returns for these arguments, if it is known already.
        sink: What queries see in place of the first key when that has left their window; None for nothing.
        cap: Every score becomes cap * tanh(score / cap), but for the sink's; None for no cap.

    Returns:
        The output [B, H, T, K], and a function from its gradient to those of the queries and of the last T keys and
        values. The keys and values before these are constants to it, though not to autograd.
    """
    num_new_keys, groups = q_BHTK.shape[2], q_BHTK.shape[1] // k_BGSK.shape[1]
    seen = seen_sink(sink, q_BHTK, k_BGSK, window, num_empty_slots)
    kept_scores = tuning.KEPT_SCORES.get(q_BHTK.device.type, 0)
    if cap is None and q_BHTK.shape[:3].numel() * k_BGSK.shape[2] > kept_scores:
        o_BHTK, lse_BHT = attention_forward(q_BHTK, k_BGSK, v_BGSK, window, num_empty_slots, "auto")
        saved, settings = (q_BHTK, k_BGSK, v_BGSK, o_BHTK, lse_BHT), (num_new_keys, window, num_empty_slots, "auto")
        if seen is None:
            return o_BHTK, lambda g: attention_backward(*saved, g, None, *settings)
        y_BHTK, _, p_BHT = add_sink(o_BHTK, lse_BHT, seen)
        value_HK = seen.values(q_BHTK.shape[1])

        def vjp_beside_sink(g_BHTK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            dp_BHT = (g_BHTK * (value_HK[:, None] - o_BHTK)).sum(-1)
            do_BHTK = (g_BHTK * (1 - p_BHT[..., None])).to(g_BHTK.dtype)
            return attention_backward(*saved, do_BHTK, -p_BHT * (1 - p_BHT) * dp_BHT, *settings)

        return y_BHTK, vjp_beside_sink
    if attn_mask_TS is None:
        attn_mask_TS = causal_window_mask(num_new_keys, k_BGSK.shape[2], window, q_BHTK, num_empty_slots)
    mask_RS = torch.cat([attn_mask_TS] * groups, -2) if groups > 1 else attn_mask_TS
    # The queries of the heads that share a key head become its rows, so that each key head is multiplied once.
    q_BGRK = (q_BHTK * q_BHTK.shape[3] ** -0.5).unflatten(1, (-1, groups)).flatten(2, 3)
    sink_GR1 = None
    if seen is not None:  # one more key, of zeros, in front of the others
        k_BGSK = F.pad(k_BGSK, (0, 0, 1, 0))
        v_BGSK = torch.cat((seen.sink.value_GK[:, None].to(v_BGSK.dtype).expand_as(v_BGSK[:, :, :1]), v_BGSK), 2)
        mask_RS = F.pad(mask_RS, (1, 0))
        sink_HT = seen.scores  # or [B, H, T]
        sink_HT = sink_HT.expand(*sink_HT.shape[:-1], num_new_keys)
        sink_GR1 = sink_HT.reshape(*sink_HT.shape[:-2], k_BGSK.shape[1], -1, 1)
    if cap is not None or wants_definition():
        y_BGRK, inner_vjp = attend_reference(q_BGRK, k_BGSK, v_BGSK, mask_RS, num_new_keys, sink_GR1, cap)
    else:
        y_BGRK, inner_vjp = _attend(q_BGRK, k_BGSK, v_BGSK, mask_RS, num_new_keys, sink_GR1)

    def vjp(g_BHTK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dq_BGRK, dk_BGTK, dv_BGTK = inner_vjp(g_BHTK.unflatten(1, (-1, groups)).flatten(2, 3))
        dq_BHTK = dq_BGRK.unflatten(2, (groups, num_new_keys)).flatten(1, 2) * q_BHTK.shape[3] ** -0.5
        return dq_BHTK, dk_BGTK, dv_BGTK

    return y_BGRK.unflatten(2, (groups, num_new_keys)).flatten(1, 2), vjp


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    num_new_keys: int,
    sink_GR1: Tensor | None = None,
    cap: float | None = None,
) -> tuple[Tensor, AttentionVjp]:
    """softmax(q k^T + mask) v, and its vjp to q and to the last `num_new_keys` of k and v: what `_attend` computes.

    sink_GR1: what is added to the scores of the first key; None for nothing. cap: see `inner_loop_attention`.
    """
    scores = (q @ k.transpose(-1, -2)).to(accumulation_dtype(q.dtype))
    cap_vjp: Vjp | None = None
    if cap is not None:
        scores, cap_vjp = softcap(scores, cap)
    scores = scores + mask
    if sink_GR1 is not None:
        scores = torch.cat((scores[..., :1] + sink_GR1, scores[..., 1:]), -1)
    p = scores.softmax(-1)
    weights = p.to(q.dtype)

    def vjp(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dp = g @ v.transpose(-1, -2)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        ds = (ds if cap_vjp is None else cap_vjp(ds)).to(g.dtype)
        new = slice(k.shape[-2] - num_new_keys, None)
        return ds @ k, ds[..., new].transpose(-1, -2) @ q, weights[..., new].transpose(-1, -2) @ g

    return weights @ v, vjp


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, num_new_keys: int, sink_GR1: Tensor | None
) -> tuple[Tensor, AttentionVjp]:
    y, p = _Attend.apply(q, k, v, mask, sink_GR1)
    return y, lambda g: _AttendBackward.apply(p, q, k, v, g, num_new_keys)


class _Attend(torch.autograd.Function):
    """y = P v and P = softmax(q k^T + mask). The vjp is a function of P too, and sends a gradient back to it."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sink_GR1: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scores = (q @ k.transpose(-1, -2)).to(accumulation_dtype(q.dtype)).add_(mask)
        if sink_GR1 is not None:
            scores[..., :1].add_(sink_GR1)
        p = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        ctx.set_materialize_grads(False)
        return p.to(q.dtype) @ v, p

    @staticmethod
    @last_derivative
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        q, k, v, p = ctx.saved_tensors
        grad_y, grad_p = grads
        grad_v = None
        if grad_y is not None:
            grad_v = p.to(q.dtype).transpose(-1, -2) @ grad_y
            # In place: only the vjp makes this gradient, and only this function receives it.
            grad_p = _add_product(grad_p, grad_y, v.transpose(-1, -2))
        assert grad_p is not None
        grad_s = _softmax_backward(p, grad_p.to(p.dtype)).to(q.dtype)
        grad_sink = grad_s[..., :1].sum(0) if ctx.needs_input_grad[4] else None
        return grad_s @ k, grad_s.transpose(-1, -2) @ q, grad_v, None, grad_sink


class _AttendBackward(torch.autograd.Function):
    """(dq, dk, dv), dk and dv of the last `num_new_keys`, as a function of P, q, k, v and g."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, num_new_keys: int) -> Any:
        dp = (g @ v.transpose(-1, -2)).to(p.dtype)
        ds = _softmax_backward(p, dp).to(q.dtype)
        ctx.save_for_backward(p, q, k, v, g, dp, ds)
        ctx.new = new = slice(k.shape[-2] - num_new_keys, None)
        return ds @ k, ds[..., new].transpose(-1, -2) @ q, p[..., new].to(q.dtype).transpose(-1, -2) @ g

    @staticmethod
    @last_derivative
    def backward(ctx: Any, *grads: Tensor) -> Any:
        p, q, k, v, g, dp, ds = ctx.saved_tensors
        new = ctx.new
        a, b, c = grads
        grad_ds = a @ k.transpose(-1, -2)
        _add_product(grad_ds[..., new], q, b.transpose(-1, -2))
        grad_q, grad_k = ds[..., new] @ b, ds.transpose(-1, -2) @ a
        grad_p, grad_dp = _softmax_backward_backward(p, dp, grad_ds.to(p.dtype))
        _add_product(grad_p[..., new], g, c.transpose(-1, -2))
        grad_dp = grad_dp.to(q.dtype)
        grad_g = _add_product(grad_dp @ v, p[..., new].to(q.dtype), c)
        return grad_p, grad_q, grad_k, grad_dp.transpose(-1, -2) @ g, grad_g, None


def _add_product(x: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """x + a @ b, in the memory of x; None stands for zeros."""
    if x is None:
        return a @ b
    if x.dtype != a.dtype:
        return x.add_(a @ b)
    x.view(x.shape[:2].numel(), *x.shape[2:]).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))  # a view, never a copy
    return x


def _softmax_backward(p: Tensor, g: Tensor) -> Tensor:
    """P (g - rowsum(P g)): the gradient of the scores, P = softmax(scores), from a gradient g of P."""
    return torch.ops.aten._softmax_backward_data(g, p, -1, p.dtype)


def _softmax_backward_backward(p: Tensor, g: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of <a, _softmax_backward(p, g)> in p and g."""
    buffer = p * g  # large, so one serves for all
    pg = buffer.sum(-1, keepdim=True)
    pa = torch.mul(p, a, out=buffer).sum(-1, keepdim=True)
    grad_p = torch.sub(g, pg, out=buffer).mul_(a).addcmul_(g, pa, value=-1)
    return grad_p, _softmax_backward(p, a)
