"""Sequence mixers, one interface for all; see `base`."""

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.model.mixers.attention import Attention, attention_cost
from ttt_e2e.model.mixers.base import Mixer, MixerCost
from ttt_e2e.model.mixers.gated_deltanet import GatedDeltaNet, gated_deltanet_cost
from ttt_e2e.model.mixers.mamba2 import Mamba2, mamba2_cost
from ttt_e2e.model.mixers.titans import Titans, titans_cost
from ttt_e2e.model.mixers.ttt_kvb import TTTKVB, ttt_kvb_cost


def make_mixer(name: str, config: ModelConfig) -> Mixer:
    """The mixer called `name`, one of `MIXERS`; its parameters are still to be drawn.

    Raises UserError if the configuration demands a library that is not installed.
    """
    match name:
        case "full":
            return Attention(config, None)
        case "window":
            return Attention(config, config.sliding_window)
        case "mamba2":
            return Mamba2(config)
        case "gated-deltanet":
            return GatedDeltaNet(config)
        case "ttt-kvb":
            return TTTKVB(config)
        case "titans":
            return Titans(config)
    raise ValueError(f"no mixer {name!r}")


def mixer_cost(name: str, config: ModelConfig, context: int) -> MixerCost:
    """What one mixer called `name` costs at `context` tokens."""
    match name:
        case "full":
            return attention_cost(config, None, context)
        case "window":
            return attention_cost(config, config.sliding_window, context)
        case "mamba2":
            return mamba2_cost(config, context)
        case "gated-deltanet":
            return gated_deltanet_cost(config, context)
        case "ttt-kvb":
            return ttt_kvb_cost(config, context)
        case "titans":
            return titans_cost(config, context)
    raise ValueError(f"no mixer {name!r}")
