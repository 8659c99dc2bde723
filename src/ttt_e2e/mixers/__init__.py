"""Sequence mixers, one interface for all: `(x_BTD, place, state) -> (y_BTD, state)`. See `base`."""

from ttt_e2e.config import ModelConfig
from ttt_e2e.mixers.attention import Attention
from ttt_e2e.mixers.base import Mixer


def make_mixer(name: str, config: ModelConfig) -> Mixer:
    """The mixer called `name` (one of `config.MIXERS`), its parameters not yet drawn."""
    match name:
        case "full":
            return Attention(config, None)
        case "window":
            return Attention(config, config.window)
    raise ValueError(f"no mixer {name!r}")
