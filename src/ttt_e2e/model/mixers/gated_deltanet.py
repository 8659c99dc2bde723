"""Gated DeltaNet (arXiv 2412.06464), with the layer of Qwen3-Next.

Shapes: B sequences, T tokens, D hidden size, H key heads, K head dimension, A = expand_v H value heads,
C = (2 H + A) K channels of the convolution, W inputs that it remembers.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.model.counting import product_operations
from ttt_e2e.model.mixers.base import ALL_FILLED, CacheView, Mixer, MixerCost, Positions
from ttt_e2e.ops import tuning
from ttt_e2e.ops.elementwise import accumulation_dtype, rms_norm
from ttt_e2e.ops.gated_delta_rule import LIBRARY, gated_delta_rule
from ttt_e2e.ops.linear import linear
from ttt_e2e.ops.short_convolution import short_convolution

UNIT_EPS = 1e-6  # added to the squared norm of queries and keys


class DeltaState(NamedTuple):
    """The convolution's last inputs, and the memory of every value head, in float32 (float64 if the inputs are)."""

    conv_BWC: Tensor
    rule_BAKK: Tensor


class GatedDeltaNet(Mixer):
    """A linear memory per value head, which decays and is corrected by the delta rule at every token.

    A short convolution and SiLU over queries, keys and values; queries and keys of unit length, the queries then times
    K^(-1/2); the decay exp(-exp(a_log) softplus(a + dt_bias)); RMSNorm per value head, times silu of a gate.
    Every `expand_v` consecutive value heads share the queries and keys of one head.

    Raises UserError if `gated_deltanet.kernels` is "fused" and flash-linear-attention is not installed.
    """

    State = DeltaState
    no_weight_decay = ("a_log", "dt_bias")

    def __init__(self, config: ModelConfig):
        super().__init__()
        LIBRARY.check(config.gated_deltanet.kernels)
        self.kernels, self.norm_eps = config.gated_deltanet.kernels, config.rms_norm_eps
        self.heads = config.num_attention_heads
        self.value_heads = config.gated_deltanet.expand_v * self.heads
        self.head_width = config.head_dim
        keys, values = self.heads * self.head_width, self.value_heads * self.head_width
        self.w_in = nn.Parameter(torch.empty(2 * keys + 2 * values, config.hidden_size))  # rows: q, k, v, gate
        self.w_ba = nn.Parameter(torch.empty(2 * self.value_heads, config.hidden_size))  # rows: beta, a
        self.w_conv = nn.Parameter(torch.empty(2 * keys + values, config.gated_deltanet.conv_size))
        self.a_log = nn.Parameter(torch.empty(self.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads))
        self.norm = nn.Parameter(torch.ones(self.head_width))
        self.w_out = nn.Parameter(torch.empty(config.hidden_size, values))

    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Draw matrices from N(0, std^2), and the rest as the authors' released code does."""
        super().reset_parameters(std, generator)
        with torch.no_grad():
            bound = self.w_conv.shape[1] ** -0.5
            self.w_conv.uniform_(-bound, bound, generator=generator)
            self.a_log.uniform_(0, 16, generator=generator).clamp_(min=0.01).log_()  # zero has no logarithm
            dt_A = self.dt_bias.uniform_(math.log(0.001), math.log(0.1), generator=generator).exp_()
            self.dt_bias.copy_(dt_A + torch.log(-torch.expm1(-dt_A)))  # the inverse of softplus

    def forward(
        self, x_BTD: Tensor, positions: Positions, state: DeltaState | None = None, cache_view: CacheView = ALL_FILLED
    ) -> tuple[Tensor, DeltaState]:
        """See `Mixer.forward`. Memory is linear in T."""
        conv_BWC, rule_BAKK = (None, None) if state is None else state
        keys, values = self.heads * self.head_width, self.value_heads * self.head_width
        qkv_BTC, gate_BTE = linear(x_BTD, self.w_in).split((2 * keys + values, values), 2)
        qkv_BTC, conv_BWC = short_convolution(qkv_BTC, self.w_conv, None, conv_BWC)
        qk_BTE, v_BTE = qkv_BTC.split((2 * keys, values), 2)
        q_BTHK, k_BTHK = self._unit(qk_BTE.unflatten(2, (2, self.heads, -1))).unbind(2)

        beta_BTA, a_BTA = linear(x_BTD, self.w_ba).to(accumulation_dtype(x_BTD.dtype)).chunk(2, -1)
        g_BTA = -self.a_log.to(a_BTA.dtype).exp() * F.softplus(a_BTA + self.dt_bias)
        v_BTAK, beta_BTA = v_BTE.unflatten(2, (self.value_heads, -1)), beta_BTA.sigmoid()
        o_BTAK, rule_BAKK = gated_delta_rule(q_BTHK, k_BTHK, v_BTAK, g_BTA, beta_BTA, rule_BAKK, self.kernels)
        o_BTAK, _ = rms_norm(o_BTAK, self.norm, self.norm_eps)
        return linear(o_BTAK.flatten(2) * F.silu(gate_BTE), self.w_out), DeltaState(conv_BWC, rule_BAKK)

    def _unit(self, qk_BT2HK: Tensor) -> Tensor:
        """x / sqrt(|x|^2 + eps), and K^(-1/2) times that for the queries: an RMSNorm, up to factors of K."""
        qk_BT2HK = qk_BT2HK.to(accumulation_dtype(qk_BT2HK.dtype))
        width = self.head_width
        scale_211 = torch.stack([qk_BT2HK.new_full((1, 1), factor) for factor in (1 / width, width**-0.5)])
        return rms_norm(qk_BT2HK, scale_211, UNIT_EPS / width)[0]


def gated_deltanet_cost(config: ModelConfig, context: int) -> MixerCost:
    """The cost of one mixer at `context` tokens; see `model.cost`."""
    keys, head_width = config.hidden_size, config.head_dim
    heads = config.gated_deltanet.expand_v * config.num_attention_heads
    values = heads * head_width
    channels = 2 * keys + values  # of the convolution
    projections = keys * (2 * keys + 2 * values + 2 * heads) + values * keys

    count = -(-context // tuning.DELTA_RULE_CHUNK)
    length = -(-context // count)  # chunks are of one length; the last is filled up with zeros
    # Per chunk: keys and queries against keys, for every key head; the corrections, and what queries see of them; and
    # three products with the memory.
    chunk = product_operations(length, length, 2 * (keys + values)) + product_operations(length, head_width, 3 * values)
    text = context * product_operations(1, 1, projections) + count * chunk
    return MixerCost(
        parameters=projections + channels * config.gated_deltanet.conv_size + 2 * heads + head_width,
        cached=(config.gated_deltanet.conv_size - 1) * channels,
        accumulated=values * head_width,
        text=text,
        training=3 * text,
        token=product_operations(1, 1, projections) + product_operations(2, values, head_width),
    )
