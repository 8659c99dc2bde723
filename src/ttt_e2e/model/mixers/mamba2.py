"""Mamba 2 ("Transformers are SSMs", arXiv 2405.21060): a state space layer with one decay per head and token.

The layer is that of the paper's section 7 and its released code: one projection of x to a gate z, the values, B, C and
the step dt; a short convolution over values, B and C; the recurrence of `ops.ssd`; a skip around it; RMSNorm of the
gated result over the channels of each group; an output projection.

Shapes: B sequences, T tokens, D hidden size, I inner width, H heads, P head dimension, G groups of heads, N state
size, S = G N, C = I + 2 S channels of the convolution, W tokens that it sees, U = W - 1.
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
from ttt_e2e.ops.linear import linear
from ttt_e2e.ops.short_convolution import short_convolution
from ttt_e2e.ops.ssd import LIBRARY, ssd


class Mamba2State(NamedTuple):
    """The last inputs of the convolution, in x's dtype, and every head's state, in float32 (float64 if x is)."""

    conv_BUC: Tensor
    ssm_BHPN: Tensor


class Mamba2(Mixer):
    """Mamba 2 with `mamba2.expand` times the attention's heads, each of the same dimension.

    Raises UserError if `mamba2.kernels` is "fused" and mamba-ssm is not installed.
    """

    State = Mamba2State
    no_weight_decay = ("a_log", "dt_bias", "d_skip")

    def __init__(self, config: ModelConfig):
        super().__init__()
        LIBRARY.check(config.mamba2.kernels)
        self.config = config
        self.heads, self.groups = config.mamba2.expand * config.num_attention_heads, config.mamba2.n_groups
        self.inner = config.mamba2.expand * config.hidden_size
        self.shared = config.mamba2.n_groups * config.mamba2.state_size
        channels = self.inner + 2 * self.shared
        self.w_in = nn.Parameter(torch.empty(self.inner + channels + self.heads, config.hidden_size))
        self.conv_weight = nn.Parameter(torch.empty(channels, config.mamba2.conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        self.a_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.d_skip = nn.Parameter(torch.empty(self.heads))
        self.norm = nn.Parameter(torch.ones(self.inner))
        self.w_out = nn.Parameter(torch.empty(config.hidden_size, self.inner))

    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Draw decays, steps and convolution as the released code does, and everything else as every mixer."""
        super().reset_parameters(std, generator)
        bound = self.config.mamba2.conv_kernel**-0.5
        with torch.no_grad():
            for parameter in (self.conv_weight, self.conv_bias):
                parameter.uniform_(-bound, bound, generator=generator)
            self.a_log.uniform_(1.0, 16.0, generator=generator).log_()
            dt_H = self.dt_bias.uniform_(math.log(0.001), math.log(0.1), generator=generator).exp().clamp(min=1e-4)
            self.dt_bias.copy_(dt_H + (-torch.expm1(-dt_H)).log())  # softplus of it is dt

    def forward(
        self, x_BTD: Tensor, positions: Positions, state: Mamba2State | None = None, cache_view: CacheView = ALL_FILLED
    ) -> tuple[Tensor, Mamba2State]:
        """See `Mixer.forward`. Memory is linear in T."""
        conv_BUC, ssm_BHPN = (None, None) if state is None else state
        inner, shared, accurate = self.inner, self.shared, accumulation_dtype(x_BTD.dtype)
        z_BTI, convolved_BTC, dt_BTH = linear(x_BTD, self.w_in).split((inner, inner + 2 * shared, self.heads), -1)
        convolved_BTC, conv_BUC = short_convolution(convolved_BTC, self.conv_weight, self.conv_bias, conv_BUC)
        v_BTI, b_BTS, c_BTS = convolved_BTC.split((inner, shared, shared), -1)
        v_BTHP, a_H = v_BTI.unflatten(-1, (self.heads, -1)), -self.a_log.to(accurate).exp()
        b_BTGN, c_BTGN = (x_BTS.unflatten(-1, (self.groups, -1)) for x_BTS in (b_BTS, c_BTS))
        dt_BTH = F.softplus(dt_BTH.to(accurate) + self.dt_bias)
        y_BTHP, ssm_BHPN = ssd(v_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, ssm_BHPN, self.config.mamba2.kernels)
        y_BTHP = torch.addcmul(y_BTHP.to(accurate), v_BTHP.to(accurate), self.d_skip.to(accurate)[:, None])
        y_BTI = y_BTHP.flatten(2) * F.silu(z_BTI.to(accurate))
        # As in the released code, the norm is over a group's channels, not over all.
        y_BTGI, norm_GI = (t.unflatten(-1, (self.groups, -1)) for t in (y_BTI, self.norm))
        y_BTGI, _ = rms_norm(y_BTGI, norm_GI, self.config.rms_norm_eps)
        return linear(y_BTGI.flatten(2).to(x_BTD.dtype), self.w_out), Mamba2State(conv_BUC, ssm_BHPN)


def mamba2_cost(config: ModelConfig, context: int) -> MixerCost:
    """The cost of one mixer at `context` tokens; see `model.cost`."""
    width, states = config.hidden_size, config.mamba2.state_size
    heads = config.mamba2.expand * config.num_attention_heads
    inner, shared = config.mamba2.expand * width, config.mamba2.n_groups * states
    channels = inner + 2 * shared  # of the convolution
    projections = width * (2 * inner + 2 * shared + heads) + inner * width

    def chunks(length: int) -> int:
        # Scores and what they weigh, within the chunk; what the chunk adds to the state, and reads from it.
        return product_operations(length, length, shared + inner) + product_operations(length, states, 2 * inner)

    whole, rest = divmod(context, tuning.SSD_CHUNK)
    text = context * product_operations(1, 1, projections) + whole * chunks(tuning.SSD_CHUNK) + chunks(rest)
    return MixerCost(
        parameters=projections + channels * (config.mamba2.conv_kernel + 1) + 3 * heads + inner,
        cached=(config.mamba2.conv_kernel - 1) * channels,
        accumulated=inner * states,
        text=text,
        training=3 * text,
        token=product_operations(1, 1, projections) + product_operations(1, inner, states),
    )
