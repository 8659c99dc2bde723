"""How a standard Transformer becomes one that learns while it reads: options, and the configuration that follows."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ttt_e2e.config.components import InnerLoopConfig, RopeScaling
from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.errors import UserError

FastInit = Literal["new", "split"]
SinkChoice = Literal["calibrate", "none"]

_WINDOW, _MINI_BATCH = 8192, 32


@dataclass(frozen=True)
class LearningOptions:
    """What can be chosen for a model that starts to learn while it reads."""

    sliding_window: int | None = None
    """Tokens that attention sees. None: 8192, or as many as the original can see."""
    suffix: float = 0.25
    """The part of the blocks, counted from the last, that get a fast MLP; at least one does."""
    mini_batch_size: int | None = None
    """Tokens per inner step. None: 32, or the window if that is shorter."""
    inner_lr: float = 0.05
    """Learning rate of the inner steps. With the defaults, reading was better with learning than without it on each of
    twelve texts before any training (docs/explanation/pretrained.md)."""
    fast: FastInit = "split"
    """"new": a new fast MLP before the static one. "split": a part of the pretrained MLP becomes the fast one."""
    fast_share: float = 0.25
    """Width of the fast MLP, as a part of that of the pretrained one."""
    fast_rank: int | None = None
    """Rank of what a sequence learns; None: the whole fast MLP. See `ModelConfig.fast_rank`."""
    sink: SinkChoice = "calibrate"
    """"calibrate": windowed attention gets sinks, unless the original was trained with this very window. Of a model
    without a tokenizer, and of one that was trained here, none are measured."""
    learned_lr: bool = False
    """Whether training also learns the inner learning rates; see `InnerLoopConfig.learned_lr`."""


class Factors(NamedTuple):
    """What a model multiplies by that ours do not: folded into weights when they are copied."""

    embedding: float = 1.0
    query: float = 1.0
    """Of queries, after their norm if they have one."""
    residual: float = 1.0
    """Of what attention and MLPs add to the residual stream."""
    head: float = 1.0


class SourceModel(NamedTuple):
    """A model to convert."""

    family: str
    settings: dict[str, Any]
    """The settings of `ModelConfig` that stay the same."""
    max_window: int
    """The longest window that the model can have."""
    max_window_reason: str
    """What limits it, for messages."""
    max_context: int = 0
    """The longest text that it can read, by its rotary positions."""
    trained_windows: tuple[int | None, ...] = ()
    """The sliding window that each of its layers was trained with; None for full attention."""
    has_tied_head: bool = False
    """Whether its output head is its embedding. With factors that differ it becomes a matrix of its own."""
    factors: Factors = Factors()
    norm_offset: float = 0.0
    """What is added to the weights of its norms."""
    short_rope: RopeScaling | None = None
    """The rotary scaling of a model whose window is within its original context, if that is another one (LongRoPE)."""


def full_attention_config(source: SourceModel) -> ModelConfig:
    """The original model itself, with full attention."""
    return ModelConfig(**source.settings, pattern=("full",), mini_batch_size=None)


def config_from_source(source: SourceModel, options: LearningOptions) -> ModelConfig:
    """The configuration of the converted model. Raises UserError for options that do not fit the original."""
    layers, mlp = source.settings["num_hidden_layers"], source.settings["intermediate_size"]
    window, mini_batch, share = options.sliding_window, options.mini_batch_size, options.fast_share
    limit, reason = source.max_window, source.max_window_reason
    if window is None:
        window = min(_WINDOW, limit)
    if mini_batch is None:
        mini_batch = min(_MINI_BATCH, window)
    if source.settings["post_norm"] and options.fast == "new":
        raise UserError(
            "This model has norms after its MLPs (post_norm), which would scale up what a new fast MLP adds at first; "
            "split the MLPs instead (--fast split)."
        )
    if window > limit:
        raise UserError(f"The window of {window} tokens is longer than {limit}, {reason}; choose a shorter one.")
    if not 0 < options.suffix <= 1:
        raise UserError(f"The suffix is a part of the blocks, above 0 and up to 1, not {options.suffix}.")
    if not 0 < share <= 1:
        raise UserError(f"The fast MLP's share of the pretrained one is above 0 and up to 1, not {share}.")
    fast_mlp = max(1, round(share * mlp))
    widths: dict[str, Any] = {"fast_intermediate_size": fast_mlp}
    if options.fast == "split":
        if fast_mlp >= mlp:
            raise UserError(f"A share of {share} leaves nothing of {mlp} hidden units; choose a smaller one.")
        widths |= {"suffix_intermediate_size": mlp - fast_mlp, "parallel_mlp": True}
    settings, short = source.settings, source.short_rope
    if short is not None and window <= (short.original_max_position_embeddings or 0):
        settings = {**settings, "rope_scaling": short}
    inner_loop = settings.get("inner_loop", InnerLoopConfig())
    inner_loop = dataclasses.replace(inner_loop, lr=options.inner_lr, learned_lr=options.learned_lr)
    sees_less = any(trained != window for trained in source.trained_windows)
    sink = settings.get("attention_sink", options.sink == "calibrate" and sees_less)
    return ModelConfig(
        **settings | widths | {"inner_loop": inner_loop, "attention_sink": sink},
        suffix_layers=max(1, round(options.suffix * layers)),
        sliding_window=window,
        mini_batch_size=mini_batch,
        fast_rank=options.fast_rank,
    )
