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
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from ttt_e2e.ops.elementwise import accumulation_dtype
from ttt_e2e.ops.windowed_attention import attention_backward, attention_forward

# Up to this many scores (B H T S) `attention` keeps them, by the kind of device: 64 MiB in float32. Nothing is then
# computed again. On a GPU memory traffic costs more than products.
KEPT_SCORES = {"cpu": 2**24}
_FEW_SCORES = 2**26  # in bfloat16: 128 MiB

AttentionVjp = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    window: int | None,
    empty: Tensor | None = None,
    attn_mask_TS: Tensor | None = None,
) -> tuple[Tensor, AttentionVjp]:
    """Softmax attention of T queries over S >= T keys; returns [B, H, T, K] and its pull.

    Query i stands at key S - T + i and sees the last `window` keys up to its own (all of them if None), but not the
    first `empty` ones (0-dim int32 tensor; None for none), which are no keys yet. bias_TS: what `causal_window_mask` says of
    these, if it is known already. The pull gives the gradients of the queries and of the last T keys and values: those
    before are constants to the inner gradient (not to the outer one).
    """
    own, groups = q_BHTK.shape[2], q_BHTK.shape[1] // k_BGSK.shape[1]
    if q_BHTK.shape[:3].numel() * k_BGSK.shape[2] > KEPT_SCORES.get(q_BHTK.device.type, 0):
        o_BHTK, lse_BHT = attention_forward(q_BHTK, k_BGSK, v_BGSK, window, empty, "auto")
        saved = (q_BHTK, k_BGSK, v_BGSK, o_BHTK, lse_BHT)
        return o_BHTK, lambda g: attention_backward(*saved, g, own, window, empty, "auto")
    bias = causal_window_mask(own, k_BGSK.shape[2], window, q_BHTK, empty) if attn_mask_TS is None else attn_mask_TS
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


def sdpa(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    window: int | None,
    empty: Tensor | None = None,
    attn_mask_TS: Tensor | None = None,
) -> Tensor:
    """The same as `attention` through PyTorch's fused kernel: faster, linear in memory, differentiable once."""
    if attn_mask_TS is not None:
        return _masked(q_BHTK, k_BGSK, v_BGSK, attn_mask_TS)
    queries, keys = q_BHTK.shape[2], k_BGSK.shape[2]
    whole = queries == keys and (window is None or window >= keys)
    if q_BHTK.is_cuda and not whole:
        # PyTorch's kernel knows no window, and reads a mask from memory.
        return attention_forward(q_BHTK, k_BGSK, v_BGSK, window, empty, "auto")[0]
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    if whole and grouped and q_BHTK.is_cuda and q_BHTK.dtype.itemsize > 2:
        k_BGSK, v_BGSK, grouped = *_every_head(q_BHTK, k_BGSK, v_BGSK), False
    if whole:
        return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, is_causal=True, enable_gqa=grouped)
    if queries == keys and window is not None and keys > 2 * window:
        return _banded(q_BHTK, k_BGSK, v_BGSK, window)
    return _masked(q_BHTK, k_BGSK, v_BGSK, causal_window_mask(queries, keys, window, q_BHTK, empty))


def _masked(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias: Tensor) -> Tensor:
    """Attention with `bias`, broadcast to [B, H, T, S], added to the scores."""
    groups = q_BHTK.shape[1] // k_BGSK.shape[1]
    scores = q_BHTK.shape[:3].numel() * k_BGSK.shape[2]
    if groups > 1 and q_BHTK.is_cuda:
        k_BGSK, v_BGSK, groups = *_every_head(q_BHTK, k_BGSK, v_BGSK), 1
    if q_BHTK.device.type == "cpu" and q_BHTK.dtype == torch.bfloat16 and scores <= _FEW_SCORES:
        # Measured on a CPU with bfloat16 instructions, forward and backward: 2.5 to 2.9 times faster than the kernel,
        # which does its matrix products there without them.
        if groups > 1:
            k_BGSK, v_BGSK = _every_head(q_BHTK, k_BGSK, v_BGSK)
        scores_BHTS = (q_BHTK * q_BHTK.shape[3] ** -0.5) @ k_BGSK.transpose(-1, -2)
        return (scores_BHTS + bias.to(scores_BHTS.dtype)).softmax(-1) @ v_BGSK
    return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, attn_mask=bias, enable_gqa=groups > 1)


def _every_head(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values for every query head: PyTorch's fused CUDA kernels know grouped ones in 16 bits, unmasked, only.

    (pytorch/pytorch#181528.) Otherwise it would hold all scores.
    """
    groups = q_BHTK.shape[1] // k_BGSK.shape[1]
    return k_BGSK.repeat_interleave(groups, 1), v_BGSK.repeat_interleave(groups, 1)


def causal_window_mask(
    queries: int, keys: int, window: int | None, like: Tensor, empty: Tensor | None = None
) -> Tensor:
    """[T, S]: 0 where a query may see a key (0 <= distance < window, and not the first `empty`), else minus infinity.

    Of `like`'s dtype and device. Added to scores, it costs less than a mask that is to be filled in.
    """
    key_S = torch.arange(keys, device=like.device)
    distance_TS = torch.arange(keys - queries, keys, device=like.device)[:, None] - key_S
    hidden_TS = distance_TS < 0
    if window is not None and window < keys:
        hidden_TS = hidden_TS | (distance_TS >= window)
    if empty is not None:
        hidden_TS = hidden_TS | (key_S < empty)
    return torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill_(hidden_TS, -torch.inf)


def _banded(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, window: int) -> Tensor:
    """Windowed attention over a whole sequence: blocks of half a window, each against itself and what it can reach."""
    batch, length = q_BHTK.shape[0], q_BHTK.shape[2]
    block = max(1, (window + 1) // 2)
    reach = -(-(window - 1) // block)  # blocks that a block's first query looks back
    blocks = -(-length // block)
    tail = blocks * block - length

    def own(x: Tensor) -> Tensor:  # [B, H, T, K] -> [B * blocks, H, block, K]
        return F.pad(x, (0, 0, 0, tail)).unflatten(2, (blocks, block)).transpose(1, 2).flatten(0, 1)

    def reachable(x: Tensor) -> Tensor:  # [B, G, T, K] -> [B * blocks, G, (reach + 1) * block, K]
        padded = F.pad(x, (0, 0, reach * block, tail)).unflatten(2, (blocks + reach, block))
        shifted = torch.cat([padded[:, :, i : i + blocks] for i in range(reach + 1)], 3)
        return shifted.transpose(1, 2).flatten(0, 1)

    at = torch.arange(block, device=q_BHTK.device)
    query = at[None, :, None] + block * torch.arange(blocks, device=at.device)[:, None, None]
    key = query[:, :1] + torch.arange(-reach * block, block, device=at.device)
    hidden = (key < 0) | (key > query) | (query - key >= window)
    bias = torch.zeros(hidden.shape, dtype=q_BHTK.dtype, device=at.device).masked_fill_(hidden, -torch.inf)
    out = _masked(own(q_BHTK), reachable(k_BGTK), reachable(v_BGTK), bias.repeat(batch, 1, 1)[:, None])
    return out.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]
