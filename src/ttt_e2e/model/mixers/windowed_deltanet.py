"""Sliding-window attention with a Gated DeltaNet beside it, whose outputs are added: a memory for what left the window.

It is how a pretrained attention gets a memory without a change of what it computes: with `deltanet.w_out` at zero the
branch adds nothing yet.

Shapes: B sequences, W inputs that the convolution remembers, C channels of it, G key/value heads, S keys of the
attention, A value heads of the memory, K head dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.model.kv_cache import KVCache
from ttt_e2e.model.mixers.attention import Attention, attention_cost
from ttt_e2e.model.mixers.base import ALL_FILLED, CacheView, Mixer, MixerCost, Positions
from ttt_e2e.model.mixers.gated_deltanet import DeltaState, GatedDeltaNet, gated_deltanet_cost


class WindowedDeltaState(NamedTuple):
    """The attention's cache and the state of the Gated DeltaNet."""

    k_BGSK: Tensor
    v_BGSK: Tensor
    conv_BWC: Tensor
    rule_BAKK: Tensor


class WindowedDeltaNet(Mixer):
    """The sum of two mixers of the same inputs."""

    State = WindowedDeltaState

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention = Attention(config, config.sliding_window)
        self.deltanet = GatedDeltaNet(config)

    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Draw the parameters of both, as each does."""
        self.attention.reset_parameters(std, generator)
        self.deltanet.reset_parameters(std, generator)

    def forward(
        self,
        x_BTD: Tensor,
        positions: Positions,
        state: WindowedDeltaState | None = None,
        cache_view: CacheView = ALL_FILLED,
    ) -> tuple[Tensor, WindowedDeltaState]:
        """See `Mixer.forward`. Memory is linear in T."""
        cache, rule = (None, None) if state is None else (KVCache(*state[:2]), DeltaState(*state[2:]))
        y_BTD, cache = self.attention(x_BTD, positions, cache, cache_view)
        z_BTD, rule = self.deltanet(x_BTD, positions, rule, cache_view)
        return y_BTD + z_BTD, WindowedDeltaState(*cache, *rule)


def windowed_deltanet_cost(config: ModelConfig, context: int) -> MixerCost:
    """The cost of one mixer at `context` tokens; see `model.cost`."""
    parts = attention_cost(config, config.sliding_window, context), gated_deltanet_cost(config, context)
    return MixerCost(*map(sum, zip(*parts, strict=True)))
