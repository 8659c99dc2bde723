"""Causal attention, over the whole text or a sliding window of it.

Shapes: B sequences, T tokens, S keys (cached ones first), D hidden size, H query heads, G key/value heads, K head
dimension, J = H + G, E = (H + 2 G) K.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.model.counting import num_pairs, projection_operations, score_operations
from ttt_e2e.model.kv_cache import KVCache
from ttt_e2e.model.mixers.base import ALL_FILLED, CacheView, Mixer, MixerCost, Positions
from ttt_e2e.ops.attention import Sink, inner_loop_attention, sdpa
from ttt_e2e.ops.attention.inner_loop import AttentionVjp
from ttt_e2e.ops.elementwise import Vjp, accumulation_dtype, rms_norm, rotate, softcap
from ttt_e2e.ops.linear import linear, linear_vjp

Rope = Literal["global", "local", "none"]


class Attention(Mixer):
    """Multi-head attention over the last `window` tokens (None: all): grouped key/value heads, rotary positions.

    With a window it may have a sink; see `ops.attention.sink`. `rope` says which rotary positions it has: those of
    `rope_theta`, the local ones of `rope_local_base_freq`, or none.
    """

    State = KVCache

    def __init__(self, config: ModelConfig, window: int | None, rope: Rope = "global"):
        super().__init__()
        self.config, self.window, self.rope = config, window, rope
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        rows = (self.num_heads + 2 * self.num_kv_heads) * config.head_dim
        self.w_qkv = nn.Parameter(torch.empty(rows, config.hidden_size))
        self.w_out = nn.Parameter(torch.empty(config.hidden_size, self.num_heads * config.head_dim))
        if config.attention_bias:
            self.b_qkv = nn.Parameter(torch.zeros(rows))
        if config.attention_out_bias:
            self.b_out = nn.Parameter(torch.zeros(config.hidden_size))
        if config.qk_norm:
            q_heads, k_heads = (self.num_heads, self.num_kv_heads) if config.qk_norm_joint else (1, 1)
            self.q_norm = nn.Parameter(torch.ones(q_heads * config.head_dim))
            self.k_norm = nn.Parameter(torch.ones(k_heads * config.head_dim))
        if config.attention_sink and window is not None:
            self.sink_logit = nn.Parameter(torch.zeros(self.num_heads))
            self.sink_value = nn.Parameter(torch.zeros(self.num_kv_heads, config.head_dim))
            self.no_weight_decay = ("sink_logit", "sink_value")

    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Draw every matrix from N(0, std^2), set norms to one, biases and the sink to zero."""
        super().reset_parameters(std, generator)
        with torch.no_grad():
            for name in ("b_qkv", "b_out", "sink_logit", "sink_value"):
                if hasattr(self, name):
                    getattr(self, name).zero_()

    def forward(
        self,
        x_BTD: Tensor,
        positions: Positions,
        state: KVCache | None = None,
        cache_view: CacheView = ALL_FILLED,
        *,
        with_vjp: bool = False,
    ) -> tuple[Any, ...]:
        """See `Mixer.forward`. Memory is linear in T.

        `with_vjp` also returns the function from the output's cotangent to the input's, itself differentiable. Cached
        keys and values are constants for that function, as they are for the inner gradient.
        """
        w_out = self.w_out  # which may be parametrised, and otherwise when the vjp is called
        q_BHTK, new, projection_vjp = self.project(x_BTD, positions)
        seen, num_empty_slots, attn_mask_TS = new, None, None
        if state is not None:
            seen = state.append_(new) if cache_view.donated else state.append(new)
            attn_mask_TS = cache_view.attn_mask_TS
            if cache_view.seq_lens is not None:
                num_empty_slots = (state.num_slots - cache_view.seq_lens).clamp(min=0).to(torch.int32)
        cap = self.config.attn_logit_softcapping
        keys = (seen.k_BGSK, seen.v_BGSK, self.window, num_empty_slots, attn_mask_TS, self.sink, cap)
        attention_vjp: AttentionVjp | None = None
        if with_vjp:
            assert num_empty_slots is None or num_empty_slots.dim() == 0, "rows to learn from are of equal length"
            y_BHTK, attention_vjp = inner_loop_attention(q_BHTK, *keys)
        else:
            y_BHTK = sdpa(q_BHTK, *keys)
        kept = seen if cache_view.keep_all else seen.last(cache_view.max_slots if self.window is None else self.window)
        if state is None and not torch.is_grad_enabled():
            kept = kept.contiguous()  # a view would keep the keys and values of the whole text

        def vjp(g_BTD: Tensor) -> Tensor:
            dy_BTHK = linear_vjp(g_BTD, w_out).unflatten(-1, (self.num_heads, -1))
            assert attention_vjp is not None
            return projection_vjp(*attention_vjp(dy_BTHK.transpose(1, 2)))

        out_BTD = linear(y_BHTK.transpose(1, 2).flatten(2), w_out)
        if self.config.attention_out_bias:
            out_BTD = out_BTD + self.b_out.to(x_BTD.dtype)
        return (out_BTD, kept, vjp) if with_vjp else (out_BTD, kept)

    def capped(self, scores: Tensor) -> Tensor:
        """Scores after the cap of `attn_logit_softcapping`, if there is one."""
        cap = self.config.attn_logit_softcapping
        return scores if cap is None else softcap(scores, cap)[0]

    @property
    def sink(self) -> Sink | None:
        """What queries see in place of the text's first token when that has left their window."""
        return Sink(self.sink_logit, self.sink_value) if hasattr(self, "sink_logit") else None

    def project(
        self, x_BTD: Tensor, positions: Positions
    ) -> tuple[Tensor, KVCache, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """Queries [B, H, T, K], keys and values; and the vjp from cotangents of the three to one of the inputs."""
        config, num_heads, num_kv_heads = self.config, self.num_heads, self.num_kv_heads
        w_qkv = self.w_qkv
        x_BTE = linear(x_BTD, w_qkv)
        if config.attention_bias:
            x_BTE = x_BTE + self.b_qkv.to(x_BTD.dtype)
        x_BTJK = x_BTE.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
        qk_BTJK, v_BTGK = x_BTJK.split((num_heads + num_kv_heads, num_kv_heads), 2)
        qk_BTJK = qk_BTJK.to(accumulation_dtype(x_BTD.dtype))
        norm_vjp: Vjp | None = None
        rotation_vjp: Vjp | None = None
        if config.qk_norm_joint:
            qk_BTJK, norm_vjp = self._joint_norm(qk_BTJK)
        elif config.qk_norm:
            weight_JK = torch.cat((self.q_norm.expand(num_heads, -1), self.k_norm.expand(num_kv_heads, -1)))
            qk_BTJK, norm_vjp = rms_norm(qk_BTJK, weight_JK, config.rms_norm_eps)
        if self.rope != "none":
            angles = positions.local if self.rope == "local" else (positions.cos, positions.sin)
            assert angles is not None
            qk_BTJK, rotation_vjp = rotate(qk_BTJK, *angles)
        q_BHTK, k_BGTK = qk_BTJK.to(x_BTD.dtype).transpose(1, 2).split((num_heads, num_kv_heads), 1)

        def vjp(dq_BHTK: Tensor, dk_BGTK: Tensor, dv_BGTK: Tensor) -> Tensor:
            dqk_BTJK = torch.cat((dq_BHTK, dk_BGTK), 1).transpose(1, 2).to(qk_BTJK.dtype)
            if rotation_vjp is not None:
                dqk_BTJK = rotation_vjp(dqk_BTJK)
            if norm_vjp is not None:
                dqk_BTJK = norm_vjp(dqk_BTJK)
            dx_BTJK = torch.cat((dqk_BTJK.to(dq_BHTK.dtype), dv_BGTK.transpose(1, 2)), 2)
            return linear_vjp(dx_BTJK.flatten(2), w_qkv)

        return q_BHTK, KVCache(k_BGTK, v_BTGK.transpose(1, 2)), vjp

    def _joint_norm(self, qk_BTJK: Tensor) -> tuple[Tensor, Vjp]:
        """The RMSNorms of queries and of keys, each over all its heads."""
        q_BTHK, k_BTGK = qk_BTJK.split((self.num_heads, self.num_kv_heads), 2)
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        q_BTE, q_vjp = rms_norm(q_BTHK.flatten(2), self.q_norm, eps)
        k_BTE, k_vjp = rms_norm(k_BTGK.flatten(2), self.k_norm, eps)

        def vjp(g_BTJK: Tensor) -> Tensor:
            dq_BTHK, dk_BTGK = g_BTJK.split((self.num_heads, self.num_kv_heads), 2)
            d_BTE = torch.cat((q_vjp(dq_BTHK.flatten(2)), k_vjp(dk_BTGK.flatten(2))), 2)
            return d_BTE.unflatten(2, (-1, head_dim))

        return torch.cat((q_BTE, k_BTE), 2).unflatten(2, (-1, head_dim)), vjp


def attention_cost(config: ModelConfig, window: int | None, context: int) -> MixerCost:
    """The cost of attention over `window` tokens (None: all) at `context` tokens; see `model.cost`."""
    kept = context if window is None else min(window, context)
    seen = context + 1 if window is None else min(window, context + 1)
    pairs = num_pairs(context, window)
    norms = config.num_attention_heads + config.num_key_value_heads if config.qk_norm_joint else 2
    vectors = norms * config.head_dim if config.qk_norm else 0
    if config.attention_sink and window is not None:  # one more key, for the queries that do not see the first
        vectors += config.num_attention_heads + config.num_key_value_heads * config.head_dim
        pairs, seen = pairs + max(0, context - window), seen + (context + 1 > window)
    text = projection_operations(config, context) + score_operations(config, pairs)
    vectors += config.attention_bias * (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    vectors += config.attention_out_bias * config.hidden_size
    return MixerCost(
        parameters=projection_operations(config, 1) // 2 + vectors,
        cached=2 * config.num_key_value_heads * config.head_dim * kept,
        accumulated=0,
        text=text,
        training=3 * text,
        token=projection_operations(config, 1) + score_operations(config, seen),
    )
