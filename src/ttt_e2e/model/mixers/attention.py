"""Causal attention, over the whole text or a sliding window of it.

The loop of `inner_loop` goes back through it at test time, so beside the mixer's `forward` there is `forward_with_vjp`,
which also returns the pull: the function that takes a gradient of the output back to one of the input.

Shapes: B sequences, T tokens, S keys (cached ones first), D width, H query heads, G key/value heads, K head width,
J = H + G, E = (H + 2 G) K.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.model.mixers.base import Mixer, Place
from ttt_e2e.ops.attention import attention, causal_window_mask, sdpa
from ttt_e2e.ops.elementwise import Vjp, accumulation_dtype, rms_norm, rotate
from ttt_e2e.ops.linear import linear, linear_vjp


class Cache(NamedTuple):
    """Keys (rotated) and values of the last tokens that attention may still see, oldest first."""

    k_BGSK: Tensor
    v_BGSK: Tensor


class Attention(Mixer):
    """Multi-head attention over the last `window` tokens (None: all), the query's own included.

    With grouped key/value heads, biases, RMSNorm on queries and keys per head, and rotary positions.
    """

    State = Cache

    def __init__(self, config: ModelConfig, window: int | None):
        super().__init__()
        self.config, self.window = config, window
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        rows = (self.heads + 2 * self.kv_heads) * config.head_dim
        self.w_qkv = nn.Parameter(torch.empty(rows, config.hidden_size))
        self.w_out = nn.Parameter(torch.empty(config.hidden_size, config.num_attention_heads * config.head_dim))
        if config.attention_bias:
            self.b_qkv = nn.Parameter(torch.zeros(rows))
        if config.attention_out_bias:
            self.b_out = nn.Parameter(torch.zeros(config.hidden_size))
        if config.qk_norm:
            self.q_norm = nn.Parameter(torch.ones(config.head_dim))
            self.k_norm = nn.Parameter(torch.ones(config.head_dim))

    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Draw every matrix from N(0, std^2), set norms to one and biases to zero."""
        super().reset_parameters(std, generator)
        with torch.no_grad():
            for name in ("b_qkv", "b_out"):
                if hasattr(self, name):
                    getattr(self, name).zero_()

    def forward(self, x_BTD: Tensor, place: Place, state: Cache | None) -> tuple[Tensor, Cache]:
        """Attend from x to the cached tokens and to x itself; the output, and the cache for what follows.

        None starts a text. Memory is linear in T.
        """
        y_BTD, cache, _ = self._attend(x_BTD, place, state, inner=False)
        return y_BTD, cache

    def forward_with_vjp(self, x_BTD: Tensor, place: Place, cache: Cache | None) -> tuple[Tensor, Cache, Vjp]:
        """The same with its pull, differentiable a second time. Cached keys are constants for the pull."""
        y_BTD, cache, vjp = self._attend(x_BTD, place, cache, inner=True)
        assert vjp is not None
        return y_BTD, cache, vjp

    def _attend(
        self, x_BTD: Tensor, place: Place, cache: Cache | None, inner: bool
    ) -> tuple[Tensor, Cache, Vjp | None]:
        heads, kv_heads, window = self.heads, self.kv_heads, self.window
        x_BTE = linear(x_BTD, self.w_qkv)
        if self.config.attention_bias:
            x_BTE = x_BTE + self.b_qkv.to(x_BTD.dtype)
        x_BTJK = x_BTE.unflatten(-1, (heads + 2 * kv_heads, -1))
        qk_BTJK, v_BTGK = x_BTJK.split((heads + kv_heads, kv_heads), 2)
        qk_BTJK = qk_BTJK.to(accumulation_dtype(x_BTD.dtype))
        if self.config.qk_norm:
            weight_JK = torch.cat((self.q_norm.expand(heads, -1), self.k_norm.expand(kv_heads, -1)))
            qk_BTJK, norm_vjp = rms_norm(qk_BTJK, weight_JK, self.config.rms_norm_eps)
        qk_BTJK, rotation_vjp = rotate(qk_BTJK, place.cos, place.sin)
        q_BHTK, k_BGTK = qk_BTJK.to(x_BTD.dtype).transpose(1, 2).split((heads, kv_heads), 1)
        own = Cache(k_BGTK, v_BTGK.transpose(1, 2))
        seen = own if cache is None else append(cache, own) if place.in_place else join([cache, own])
        if inner:
            assert place.seq_lens_B is None, "only what is not learned from can be read with caches of unequal length"
            y_BHTK, attention_vjp = attention(q_BHTK, *seen, window, place.empty, place.attn_mask_TS)
        else:
            bias = place.attn_mask_TS
            if place.seq_lens_B is not None and cache is not None:
                bias = unequal(q_BHTK, cache, window, place.seq_lens_B)
            y_BHTK = sdpa(q_BHTK, *seen, window, place.empty, bias)
        if cache is None or place.empty is None:
            kept = join([seen], window)
            if cache is None and not torch.is_grad_enabled():  # a view would keep the whole text
                kept = Cache(*(t.contiguous() for t in kept))
        else:  # a cache of fixed size keeps it, and its place in memory does not tell where it was cut from
            kept = Cache(*(t.contiguous() for t in join([seen], cache.k_BGSK.shape[2])))

        def vjp(g_BTD: Tensor) -> Tensor:
            dy_BTHK = linear_vjp(g_BTD, self.w_out).unflatten(-1, (heads, -1))
            dq_BHTK, dk_BGTK, dv_BGTK = attention_vjp(dy_BTHK.transpose(1, 2))
            dqk_BTJK = torch.cat((dq_BHTK, dk_BGTK), 1).transpose(1, 2)
            dqk_BTJK = rotation_vjp(dqk_BTJK.to(qk_BTJK.dtype))
            if self.config.qk_norm:
                dqk_BTJK = norm_vjp(dqk_BTJK)
            dx_BTJK = torch.cat((dqk_BTJK.to(g_BTD.dtype), dv_BGTK.transpose(1, 2)), 2)
            return linear_vjp(dx_BTJK.flatten(2), self.w_qkv)

        out_BTD = linear(y_BHTK.transpose(1, 2).flatten(2), self.w_out)
        if self.config.attention_out_bias:
            out_BTD = out_BTD + self.b_out.to(x_BTD.dtype)
        return out_BTD, kept, vjp if inner else None


def unequal(q_BHTK: Tensor, cache: Cache, window: int | None, seq_lens_B: Tensor) -> Tensor:
    """What `causal_window_mask` says, [B, 1, T, S], where the cache's last slots hold the tokens of a text, and the first none."""
    cached, own = cache.k_BGSK.shape[2], q_BHTK.shape[2]
    empty_BS = torch.arange(cached + own, device=seq_lens_B.device) < cached - seq_lens_B[:, None]
    return causal_window_mask(own, cached + own, window, q_BHTK).masked_fill(empty_BS[:, None, None], -torch.inf)


def append(cache: Cache, own: Cache) -> Cache:
    """`join([cache, own])` in the cache's own memory: behind its last slot, whatever else stands there.

    Where that has no room, in fresh memory with room for half as much again, so that few calls copy the cache.
    """
    return Cache(*(_append(old, new) for old, new in zip(cache, own, strict=True)))


def _append(old_BGSK: Tensor, new_BGTK: Tensor) -> Tensor:
    batch, heads, filled, width = old_BGSK.shape
    total, slots = filled + new_BGTK.shape[2], old_BGSK.stride(1) // width  # of each head, in memory
    first = old_BGSK.storage_offset() // width % max(1, slots)
    stride = (heads * slots * width, slots * width, width, 1)
    if filled == 0 or first + total > slots or old_BGSK.stride() != stride:
        room_BGSK = old_BGSK.new_empty(batch, heads, total + total // 2, width)[:, :, :total]
        room_BGSK[:, :, :filled] = old_BGSK
    else:
        room_BGSK = old_BGSK.as_strided((batch, heads, total, width), stride)
    room_BGSK[:, :, filled:] = new_BGTK
    return room_BGSK


def join(pieces: list[Cache], window: int | None = None) -> Cache:
    """The last `window` tokens (all if None) of caches that follow one another."""
    total = sum(piece.k_BGSK.shape[2] for piece in pieces)
    drop = 0 if window is None else max(0, total - window)
    kept = []
    for piece in pieces:
        length = piece.k_BGSK.shape[2]
        if drop < length:
            kept.append(Cache(*(t[:, :, drop:] if drop else t for t in piece)))
        drop = max(0, drop - length)
    return kept[0] if len(kept) == 1 else Cache(*(torch.cat(parts, 2) for parts in zip(*kept, strict=True)))
