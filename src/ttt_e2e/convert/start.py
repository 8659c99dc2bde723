"""How a standard Transformer comes to learn while it reads: what is chosen, and the configuration that follows."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.errors import UserError

Fast = Literal["new", "split"]

WINDOW, MINI_BATCH = 8192, 1024  # the published ones, where they fit


@dataclass(frozen=True)
class Start:
    """What is chosen for a model that begins to learn.

    window: tokens that attention sees; None: 8192, or as many as the original can see. suffix: the share of the blocks
    that get a fast MLP, at least one. mini_batch: tokens per inner step; None: an eighth of the window, at most 1024.
    fast: "new" puts a new fast MLP in front of the static one; "split" makes it of a part of the pretrained one.
    fast_share: how wide the fast MLP is, as a share of the pretrained one. fast_rank: None lets a sequence learn all of
    it, a number only an addition of that rank.
    """

    window: int | None = None
    suffix: float = 0.25
    mini_batch: int | None = None
    fast: Fast = "new"
    fast_share: float = 0.25
    fast_rank: int | None = None


class Source(NamedTuple):
    """What a configuration says of a model, and how far it can see at all.

    shape: the fields of `ModelConfig` that follow from it. layers, mlp_width: of the original. reach: the tokens that a
    window may have, and why.
    """

    family: str
    shape: dict[str, Any]
    layers: int
    mlp_width: int
    reach: int
    reason: str


def full_attention(source: Source) -> ModelConfig:
    """The original itself, with full attention."""
    return ModelConfig(**source.shape, pattern=("full",), mini_batch_size=None)


def model_config(source: Source, start: Start) -> ModelConfig:
    """The model of ours that a pretrained one becomes. Raises UserError for what does not fit."""
    window = min(WINDOW, source.reach) if start.window is None else start.window
    if window > source.reach:
        raise UserError(
            f"The window of {window} tokens is longer than {source.reach}, {source.reason}; choose a window up to that."
        )
    if not 0 < start.suffix <= 1:
        raise UserError(f"The suffix is a share of the blocks, above 0 and up to 1, not {start.suffix}.")
    share = start.fast_share
    if not 0 < share <= 1:
        raise UserError(f"The fast MLP's share of the pretrained one is above 0 and up to 1, not {share}.")
    fast_width = max(1, round(share * source.mlp_width))
    widths: dict[str, Any] = dict(fast_intermediate_size=fast_width, fast_rank=start.fast_rank)
    if start.fast == "split":
        if fast_width >= source.mlp_width:
            raise UserError(f"A share of {share} leaves nothing of {source.mlp_width} hidden units; take less.")
        widths |= dict(suffix_intermediate_size=source.mlp_width - fast_width, parallel_mlp=True)
    return ModelConfig(
        **source.shape,
        **widths,
        suffix_layers=max(1, round(start.suffix * source.layers)),
        sliding_window=window,
        mini_batch_size=min(MINI_BATCH, max(1, window // 8)) if start.mini_batch is None else start.mini_batch,
    )
