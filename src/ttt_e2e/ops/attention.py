"""Causal attention, windowed or full, in two implementations that give the same numbers.

`attention` is plain arithmetic: it can be differentiated any number of times, and the inner loop uses it.
`attention_once` goes through PyTorch's fused kernel, which has a first derivative only; it serves everything that no
inner gradient passes through. Over a whole sequence it works block by block, so that time and memory grow with
T x window, not with T x T.

Shapes: B sequences, T queries, S keys (the last T of them at the queries' own positions), H query heads, G key/value
heads, K head width.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_e2e.ops.elementwise import masked_softmax


def attention(q_BHTK: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], window: int | None) -> Tensor:
    """Softmax attention of T queries over S >= T keys, as plain differentiable arithmetic; returns [B, H, T, K].

    Keys and values come in one or more pieces [B, G, S_i, K], oldest first: pieces are multiplied apart, so that a
    gradient that stops at one of them (the inner gradient stops at the cached ones) costs nothing for it. Query i
    stands at key S - T + i and sees the last `window` keys up to its own (all of them if None).
    """
    groups, lengths = q_BHTK.shape[1] // keys[0].shape[1], [k.shape[2] for k in keys]
    if groups > 1:
        keys, values = ([x.repeat_interleave(groups, 1) for x in pieces] for pieces in (keys, values))
    q_BHTK = q_BHTK * q_BHTK.shape[3] ** -0.5
    scores_BHTS = torch.cat([q_BHTK @ k.transpose(-1, -2) for k in keys], -1)
    scores_BHTS = scores_BHTS.to(torch.promote_types(scores_BHTS.dtype, torch.float32))
    mask_TS = visible(q_BHTK.shape[2], sum(lengths), window, q_BHTK.device)
    weights = masked_softmax(scores_BHTS, mask_TS).to(q_BHTK.dtype).split(lengths, -1)
    return functools.reduce(torch.add, [w @ v for w, v in zip(weights, values, strict=True)])


def attention_once(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, window: int | None) -> Tensor:
    """The same as `attention` through PyTorch's fused kernel: faster, linear in memory, differentiable once."""
    queries, keys = q_BHTK.shape[2], k_BGSK.shape[2]
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    if queries == keys and (window is None or window >= keys):
        return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, is_causal=True, enable_gqa=grouped)
    if queries == keys and window is not None and keys > 2 * window:
        return _banded(q_BHTK, k_BGSK, v_BGSK, window)
    return _masked(q_BHTK, k_BGSK, v_BGSK, visible(queries, keys, window, q_BHTK.device))


def _masked(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Tensor) -> Tensor:
    """Attention where `mask`, broadcast to [B, H, T, S], is true."""
    groups = q_BHTK.shape[1] // k_BGSK.shape[1]
    if q_BHTK.device.type == "cpu" and q_BHTK.dtype == torch.bfloat16:
        # Measured on a CPU with bfloat16 instructions, forward and backward: 2.5 to 2.9 times faster than the kernel,
        # which does its matrix products there without them.
        if groups > 1:
            k_BGSK, v_BGSK = (x.repeat_interleave(groups, 1) for x in (k_BGSK, v_BGSK))
        scores = (q_BHTK * q_BHTK.shape[3] ** -0.5) @ k_BGSK.transpose(-1, -2)
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v_BGSK
    return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, enable_gqa=groups > 1)


def visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each query may see, as a boolean [T, S]: 0 <= distance < window."""
    distance_TS = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance_TS >= 0) if window is None else (distance_TS >= 0) & (distance_TS < window)


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
    mask = (key >= 0) & (key <= query) & (query - key < window)
    out = _masked(own(q_BHTK), reachable(k_BGTK), reachable(v_BGTK), mask.repeat(batch, 1, 1)[:, None])
    return out.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]
