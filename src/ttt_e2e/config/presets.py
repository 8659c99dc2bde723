"""Configurations by name: every size with TTT-E2E and with each system that it is compared with.

Sources: the sizes and schedules of TTT-E2E and of full attention are those of the paper's configuration table (arXiv
2512.23675) as released with the official code. `tiny` and `small` are ours, for a laptop and a single GPU: window,
mini-batch and context in the published proportions, 8 : 1 : 8, at a smaller scale.

The other systems have the same blocks with other mixers: the recurrent ones and those with a memory in every other
block, with a sliding window between, so that all of them see the last tokens exactly. Mixers have parameters of their
own, so the width of these models' MLPs is set to what gives as many parameters as full attention has at that size, to
2 percent.
"""

import dataclasses
import difflib
from typing import Any

from ttt_e2e.config.schema import ModelConfig, RunConfig, TrainConfig, replace
from ttt_e2e.errors import UserError
from ttt_e2e.model.cost import parameters

# name: vocabulary, layers, width, heads, MLP width with full attention, with TTT-E2E, suffix, window, mini-batch
_SHAPES = {
    "tiny": (4096, 8, 128, 4, 352, 288, 2, 512, 64),
    "small": (8192, 12, 384, 6, 1024, 832, 3, 1024, 128),
    "125m": (128_256, 12, 768, 12, 2048, 1664, 3, 8192, 1024),
    "350m": (128_256, 24, 1024, 16, 2816, 2304, 6, 8192, 1024),
    "760m": (128_256, 24, 1536, 16, 4096, 3328, 6, 8192, 1024),
    "1b": (128_256, 24, 2048, 32, 5376, 4352, 6, 8192, 1024),
    "3b": (128_256, 32, 2560, 32, 6912, 5632, 8, 8192, 1024),
}
SIZES = tuple(_SHAPES)
# name: outer learning rate, steps, batch, context
_SCHEDULES = {
    "tiny": (3e-3, 1000, 4, 4096),
    "small": (2e-3, 4000, 8, 8192),
    "125m": (3e-3, 4800, 64, 8192),
    "350m": (1.5e-3, 13500, 64, 8192),
    "760m": (1.25e-3, 29000, 64, 8192),
    "1b": (1e-3, 50000, 64, 8192),
    "3b": (8e-4, 52000, 128, 8192),
}
_HYBRID = ("window",) * 5 + ("full",)


def _presets() -> dict[str, RunConfig]:
    presets = {}
    for size, (vocab, layers, width, heads, full_mlp, ttt_mlp, suffix, window, mini_batch) in _SHAPES.items():
        lr, steps, batch, context = _SCHEDULES[size]
        dtype: Any = "float32" if size in ("tiny", "small") else "bfloat16"
        train = TrainConfig(lr=lr, steps=steps, batch=batch, context=context, dtype=dtype)
        shape: dict[str, Any] = dict(
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            sliding_window=window,
        )
        standard: dict[str, Any] = dict(intermediate_size=full_mlp, mini_batch_size=None)
        learning: dict[str, Any] = dict(intermediate_size=ttt_mlp, mini_batch_size=mini_batch, suffix_layers=suffix)
        memory: dict[str, Any] = dict(intermediate_size=full_mlp, mini_batch_size=mini_batch)
        models = {
            "": ModelConfig(**shape, **learning),
            "-full": ModelConfig(**shape, **standard, pattern=("full",)),
            "-window": ModelConfig(**shape, **standard),
            "-hybrid": ModelConfig(**shape, **standard, pattern=_HYBRID),
            "-mamba2": ModelConfig(**shape, **standard, pattern=("mamba2", "window")),
            "-gated-deltanet": ModelConfig(**shape, **standard, pattern=("gated-deltanet", "window")),
            "-ttt-kvb": ModelConfig(**shape, **memory, pattern=("ttt-kvb", "window")),
            "-titans": ModelConfig(**shape, **memory, pattern=("titans", "window")),
            "-dynamic": ModelConfig(
                **shape, intermediate_size=full_mlp, mini_batch_size=mini_batch, suffix_layers=suffix, static_mlp=False
            ),
            "-full-prefix": ModelConfig(
                **shape, **learning, pattern=("full",) * (layers - suffix) + ("window",) * suffix
            ),
        }
        count = parameters(models["-full"])
        for variant, model in models.items():
            plan = dataclasses.replace(train, train_mode="pretrain") if variant == "-dynamic" else train
            presets[size + variant] = RunConfig(_of_size(model, count), plan)
    return presets


def _of_size(model: ModelConfig, count: int) -> ModelConfig:
    """`model` itself if it has `count` parameters to 2 percent; else with MLPs as wide, in steps of 16 or 64."""
    if abs(parameters(model) / count - 1) <= 0.02:
        return model
    return with_parameters(model, count, 16 if model.hidden_size < 512 else 64)


def with_parameters(model: ModelConfig, count: int, step: int) -> ModelConfig:
    """`model` with MLPs as wide as `count` parameters want them, to a multiple of `step`."""
    one, two = (parameters(replace(model, {"intermediate_size": width})) for width in (1, 2))
    return replace(model, {"intermediate_size": max(step, round((count - one) / (two - one) / step) * step)})


PRESETS = _presets()


def preset(name: str) -> RunConfig:
    """The configuration called `name`; raises UserError for a name that is not in `PRESETS`.

    A size ("tiny", "small", and the published "125m" to "3b") is TTT-E2E; with "-full", "-window", "-hybrid",
    "-mamba2", "-gated-deltanet", "-ttt-kvb", "-titans" or "-dynamic" it is what TTT-E2E is compared with, and with
    "-full-prefix" TTT-E2E over full attention.
    """
    if name not in PRESETS:
        likeness = {known: difflib.SequenceMatcher(None, known, name).ratio() for known in PRESETS}
        near = max(PRESETS, key=lambda known: (likeness[known], -len(known)))
        hint = f" Did you mean {near!r}?" if likeness[near] >= 0.5 else ""
        raise UserError(f"There is no preset {name!r}.{hint} `ttt-e2e presets` lists them all.")
    return PRESETS[name]


def extension(train: TrainConfig, context: int, pretrain_steps: int) -> TrainConfig:
    """The published recipe to extend a pre-trained model to a longer `context`: lr 4e-4, a fortieth of the
    pre-training's steps at the same tokens per step, no inner warm-up."""
    batch = max(1, train.batch * train.context // context)
    return replace(
        train,
        {
            "context": context,
            "batch": batch,
            "accumulate": train.accumulate if batch % train.accumulate == 0 else 1,
            "lr": 4e-4,
            "steps": max(1, pretrain_steps // 40),
            "warmup_steps": None,
            "inner_warmup_steps": 0,
            "eval_tokens": max(train.eval_tokens, 8 * context),
        },
    )


def at_context(model: ModelConfig, context: int) -> ModelConfig:
    """`model` as it is extended to `context`: full attention turns its positions more slowly there."""
    if "full" not in model.mixers:
        return model
    return dataclasses.replace(model, rope_theta=max(model.rope_theta, rope_theta_for(context)))


def rope_theta_for(context: int) -> float:
    """The published rotary base of full attention by context: 5e5 up to 8K, 2e6 up to 32K, 1e7 beyond."""
    return 5e5 if context <= 8192 else 2e6 if context <= 32_768 else 1e7
