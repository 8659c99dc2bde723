"""Sequence mixers, one interface for all; see `base`."""

from collections.abc import Callable

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.model.mixers.attention import Attention, attention_cost
from ttt_e2e.model.mixers.base import Mixer, MixerCost
from ttt_e2e.model.mixers.gated_deltanet import GatedDeltaNet, gated_deltanet_cost
from ttt_e2e.model.mixers.mamba2 import Mamba2, mamba2_cost
from ttt_e2e.model.mixers.titans import Titans, titans_cost
from ttt_e2e.model.mixers.ttt_kvb import TTTKVB, ttt_kvb_cost
from ttt_e2e.model.mixers.windowed_deltanet import WindowedDeltaNet, windowed_deltanet_cost

MIXER_TYPES: dict[str, Callable[..., Mixer]] = {
    "full": lambda config, rope="global": Attention(config, None, rope),
    "window": lambda config, rope="global": Attention(config, config.sliding_window, rope),
    "mamba2": Mamba2,
    "gated-deltanet": GatedDeltaNet,
    "ttt-kvb": TTTKVB,
    "titans": Titans,
    "window+gated-deltanet": WindowedDeltaNet,
}
"""Every mixer by its name in `MIXERS`, from a `ModelConfig`; the parameters are still to be drawn.

Attentions take `rope`, too; see `Attention`.
Raises UserError if the configuration demands a library that is not installed.
"""

MIXER_COSTS: dict[str, Callable[[ModelConfig, int], MixerCost]] = {
    "full": lambda config, context: attention_cost(config, None, context),
    "window": lambda config, context: attention_cost(config, config.sliding_window, context),
    "mamba2": mamba2_cost,
    "gated-deltanet": gated_deltanet_cost,
    "ttt-kvb": ttt_kvb_cost,
    "titans": titans_cost,
    "window+gated-deltanet": windowed_deltanet_cost,
}
"""What one mixer costs at a number of tokens, by its name."""
