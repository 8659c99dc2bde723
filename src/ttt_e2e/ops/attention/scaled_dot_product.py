"""Attention through PyTorch's fused kernel, which has a first derivative only.

Over a whole sequence it works block by block, so that time and memory grow with T x window, not with T x T.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_e2e.ops import tuning
from ttt_e2e.ops.attention.inner_loop import inner_loop_attention
from ttt_e2e.ops.attention.mask import causal_window_mask, hidden_keys
from ttt_e2e.ops.attention.operators import attention_forward
from ttt_e2e.ops.attention.sink import SeenSink, Sink, add_sink, seen_sink
from ttt_e2e.ops.derivatives import last_derivative


def sdpa(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    window: int | None,
    num_empty_slots: Tensor | None = None,
    attn_mask_TS: Tensor | None = None,
    sink: Sink | None = None,
    cap: float | None = None,
) -> Tensor:
    """Softmax attention of T queries over S >= T keys, [B, H, T, K]; differentiable once.

    The arguments are those of `inner_loop_attention`, but `num_empty_slots` may also be [B], a number for every row.
    """
    if cap is not None:
        return _capped(q_BHTK, k_BGSK, v_BGSK, window, num_empty_slots, attn_mask_TS, sink, cap)
    queries, keys = q_BHTK.shape[2], k_BGSK.shape[2]
    seen = seen_sink(sink, q_BHTK, k_BGSK, window, num_empty_slots)
    if attn_mask_TS is None and num_empty_slots is not None and num_empty_slots.dim() == 1:
        attn_mask_TS = causal_window_mask(queries, keys, window, q_BHTK, num_empty_slots)
    if attn_mask_TS is not None:
        return _masked(q_BHTK, k_BGSK, v_BGSK, attn_mask_TS, seen)
    whole_text = queries == keys and num_empty_slots is None
    unwindowed = whole_text and (window is None or window >= keys)
    if q_BHTK.is_cuda and not unwindowed:
        # PyTorch's kernel knows no window, and reads a mask from memory.
        o_BHTK, lse_BHT = attention_forward(q_BHTK, k_BGSK, v_BGSK, window, num_empty_slots, "auto")
        return o_BHTK if seen is None else add_sink(o_BHTK, lse_BHT, seen)[0]
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    if unwindowed and grouped and q_BHTK.is_cuda and q_BHTK.dtype.itemsize > 2:
        k_BGSK, v_BGSK, grouped = *_every_head(q_BHTK, k_BGSK, v_BGSK), False
    if unwindowed:
        return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, is_causal=True, enable_gqa=grouped)
    if queries == 1 and num_empty_slots is None and window is not None:  # it sees all of the last keys
        return _masked(q_BHTK, k_BGSK[:, :, -window:], v_BGSK[:, :, -window:], None, seen)
    if whole_text and window is not None and keys > 2 * window:
        return _banded(q_BHTK, k_BGSK, v_BGSK, window, seen)
    mask = causal_window_mask(queries, keys, window, q_BHTK, num_empty_slots)
    return _masked(q_BHTK, k_BGSK, v_BGSK, mask, seen)


def _capped(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    window: int | None,
    num_empty_slots: Tensor | None,
    attn_mask_TS: Tensor | None,
    sink: Sink | None,
    cap: float,
) -> Tensor:
    """Attention with capped scores, which PyTorch's kernel does not have: for some queries after the others.

    Each time the keys are those that these queries see, and one before them, by which they know that the first token
    has left their window.
    """
    queries, keys = q_BHTK.shape[2], k_BGSK.shape[2]
    reach = keys if window is None else window
    outputs = []
    for start in range(0, max(queries, 1), tuning.TILE_QUERIES):
        stop = min(start + tuning.TILE_QUERIES, queries)
        first, last = max(0, keys - queries + start - reach), keys - queries + stop
        empty = None if num_empty_slots is None else num_empty_slots - first
        mask = None if attn_mask_TS is None else attn_mask_TS[..., start:stop, first:last]
        q, k, v = q_BHTK[:, :, start:stop], k_BGSK[:, :, first:last], v_BGSK[:, :, first:last]
        outputs.append(inner_loop_attention(q, k, v, window, empty, mask, sink, cap)[0])
    return torch.cat(outputs, 2)


def _masked(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Tensor | None, seen: SeenSink | None) -> Tensor:
    """Attention with `mask`, broadcast to [B, H, T, S], added to the scores; None for nothing."""
    groups = q_BHTK.shape[1] // k_BGSK.shape[1]
    scores = q_BHTK.shape[:3].numel() * k_BGSK.shape[2]
    if groups > 1 and q_BHTK.is_cuda:
        k_BGSK, v_BGSK, groups = *_every_head(q_BHTK, k_BGSK, v_BGSK), 1
    few = q_BHTK.device.type == "cpu" and q_BHTK.dtype == torch.bfloat16 and scores <= tuning.UNFUSED_SCORES
    # The kernel with a sink is one for CPUs, and divides by the number of scores.
    if few or (seen is not None and (q_BHTK.device.type != "cpu" or scores == 0)):
        # The queries of the heads that share a key head become its rows, so that no key is copied.
        q_BGRK = (q_BHTK * q_BHTK.shape[3] ** -0.5).unflatten(1, (-1, groups)).flatten(2, 3)
        scores_BHTS = (q_BGRK @ k_BGSK.transpose(-1, -2)).unflatten(2, (groups, -1)).flatten(1, 2)
        if mask is not None:
            scores_BHTS = scores_BHTS + mask.to(scores_BHTS.dtype)
        if seen is None:
            p_BHTS = scores_BHTS.softmax(-1)
            return _weighted(p_BHTS, v_BGSK)
        sink_BHT1 = seen.scores.to(scores_BHTS.dtype).expand(scores_BHTS.shape[:3])[..., None]
        p_BHTS = torch.cat((sink_BHT1, scores_BHTS), -1).softmax(-1)
        value_H1K = seen.values(q_BHTK.shape[1])[:, None].to(v_BGSK.dtype)
        return p_BHTS[..., :1] * value_H1K + _weighted(p_BHTS[..., 1:], v_BGSK)
    if seen is not None:
        return _FusedWithSink.apply(q_BHTK, k_BGSK, v_BGSK, mask, seen.seen_T, *seen.sink)
    return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, enable_gqa=groups > 1)


def _weighted(p_BHTS: Tensor, v_BGSK: Tensor) -> Tensor:
    """p @ v, [B, H, T, K], every key head multiplied once."""
    groups = p_BHTS.shape[1] // v_BGSK.shape[1]
    p_BGRS = p_BHTS.unflatten(1, (-1, groups)).flatten(2, 3)
    return (p_BGRS @ v_BGSK).unflatten(2, (groups, -1)).flatten(1, 2)


def _every_head(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, S, K], repeated for every query head.

    PyTorch's fused CUDA kernels take grouped heads in 16 bits and without a mask only; otherwise PyTorch would hold all
    scores (pytorch/pytorch#181528).
    """
    groups = q_BHTK.shape[1] // k_BGSK.shape[1]
    return k_BGSK.repeat_interleave(groups, 1), v_BGSK.repeat_interleave(groups, 1)


class _FusedWithSink(torch.autograd.Function):
    """PyTorch's kernel for CPUs, which returns the logsumexp, and a sink beside it.

    The kernel's backward pass finds every weight from the logsumexp, and D = rowsum(do o) from the output. Given those
    over all columns, the sink's too, it is right for the columns that it knows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        seen_T: Tensor | None,
        logit_H: Tensor,
        value_GK: Tensor,
    ) -> Tensor:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
        y, lse, p = add_sink(o, lse, SeenSink(Sink(logit_H, value_GK), seen_T))
        ctx.save_for_backward(q, k, v, mask, y, lse, p, value_GK)
        return y

    @staticmethod
    @last_derivative
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy_BHTK,) = grads
        q, k, v, mask, y, lse, p_BHT, value_GK = ctx.saved_tensors
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = flash_backward(dy_BHTK, q, k, v, y, lse, 0.0, False, attn_mask=mask)
        dy_BGHTK = dy_BHTK.to(p_BHT.dtype).unflatten(1, (len(value_GK), -1))
        dvalue_GK = torch.einsum("bght,bghtk->gk", p_BHT.unflatten(1, (len(value_GK), -1)), dy_BGHTK)
        dscore_BGHT = ((value_GK[:, None, None] - y.unflatten(1, (len(value_GK), -1))) * dy_BGHTK).sum(-1)
        dlogit_H = (p_BHT * dscore_BGHT.flatten(1, 2)).sum((0, 2))
        return dq, dk, dv, None, None, dlogit_H, dvalue_GK


def _banded(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, window: int, seen: SeenSink | None) -> Tensor:
    """Windowed attention over a whole sequence: blocks of half a window, each over itself and the keys it can reach."""
    batch, length = q_BHTK.shape[0], q_BHTK.shape[2]
    block = max(1, (window + 1) // 2)
    reach = -(-(window - 1) // block)  # number of blocks that a block's first query looks back
    blocks = -(-length // block)
    tail = blocks * block - length

    def queries(x: Tensor) -> Tensor:  # [B, H, T, K] -> [B * blocks, H, block, K]
        return F.pad(x, (0, 0, 0, tail)).unflatten(2, (blocks, block)).transpose(1, 2).flatten(0, 1)

    def reachable(x: Tensor) -> Tensor:  # [B, G, T, K] -> [B * blocks, G, (reach + 1) * block, K]
        padded = F.pad(x, (0, 0, reach * block, tail)).unflatten(2, (blocks + reach, block))
        shifted = torch.cat([padded[:, :, i : i + blocks] for i in range(reach + 1)], 3)
        return shifted.transpose(1, 2).flatten(0, 1)

    start_Z1 = block * torch.arange(blocks, device=q_BHTK.device)[:, None]  # Z blocks
    key_ZS = start_Z1 + torch.arange(-reach * block, block, device=start_Z1.device)
    hidden_ZTS = hidden_keys(key_ZS[:, -block:], key_ZS, window, first_key=0)
    mask_ZTS = torch.zeros(hidden_ZTS.shape, dtype=q_BHTK.dtype, device=start_Z1.device)
    mask_ZTS = mask_ZTS.masked_fill_(hidden_ZTS, -torch.inf).repeat(batch, 1, 1)
    if seen is not None:
        assert seen.seen_T is not None, "the first queries of a whole text see its first token"
        seen = seen._replace(seen_T=F.pad(seen.seen_T, (0, tail)).view(blocks, 1, block).repeat(batch, 1, 1))
    out = _masked(queries(q_BHTK), reachable(k_BGTK), reachable(v_BGTK), mask_ZTS[:, None], seen)
    return out.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]
