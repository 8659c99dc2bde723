"""Sequence mixers, one interface for all: `(x_BTD, place, state) -> (y_BTD, state)`. See `base`."""

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.model.mixers.attention import Attention
from ttt_e2e.model.mixers.base import Mixer
from ttt_e2e.model.mixers.gated_deltanet import GatedDeltaNet
from ttt_e2e.model.mixers.mamba2 import Mamba2
from ttt_e2e.model.mixers.titans import Titans
from ttt_e2e.model.mixers.ttt_kvb import TTTKVB


def make_mixer(name: str, config: ModelConfig) -> Mixer:
    """The mixer called `name` (one of `config.MIXERS`), its parameters not yet drawn.

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
