"""Configurations by name: every size with TTT-E2E and with each system that it is compared with.

Sources: the sizes and schedules of TTT-E2E and of full attention are those of the paper's configuration table (arXiv
2512.23675) as released with the official code. `tiny` and `small` are this project's, for a laptop and a single GPU,
with window, mini-batch and context in the published proportions, 8 : 1 : 8.

The other systems have the same blocks with other mixers. The recurrent mixers and those with a memory stand in every
other block, with a sliding window between, so that all systems see the last tokens exactly. The width of their MLPs is
chosen so that, to 2 percent, they have as many parameters as full attention of that size.
"""

import difflib
from typing import Any

from ttt_e2e.config.schema import ModelConfig, RunConfig, TrainConfig, replace
from ttt_e2e.errors import UserError

# vocab_size, num_hidden_layers, hidden_size, num_attention_heads, suffix_layers, sliding_window, mini_batch_size
_SHAPES = {
    "tiny": (4096, 8, 128, 4, 2, 512, 64),
    "small": (8192, 12, 384, 6, 3, 1024, 128),
    "125m": (128_256, 12, 768, 12, 3, 8192, 1024),
    "350m": (128_256, 24, 1024, 16, 6, 8192, 1024),
    "760m": (128_256, 24, 1536, 16, 6, 8192, 1024),
    "1b": (128_256, 24, 2048, 32, 6, 8192, 1024),
    "3b": (128_256, 32, 2560, 32, 8, 8192, 1024),
}
SIZES = tuple(_SHAPES)
# intermediate_size of TTT-E2E, full attention, Mamba 2, Gated DeltaNet, TTT-KVB and Titans
_INTERMEDIATE_SIZES = {
    "tiny": (288, 352, 256, 256, 208, 192),
    "small": (832, 1024, 848, 768, 640, 624),
    "125m": (1664, 2048, 1728, 1536, 1408, 1408),
    "350m": (2304, 2816, 2432, 2112, 1984, 1984),
    "760m": (3328, 4096, 3520, 3072, 2880, 2880),
    "1b": (4352, 5376, 4608, 3968, 3904, 3840),
    "3b": (5632, 6912, 6016, 5184, 5056, 4992),
}
# lr, steps, batch, context, dtype
_SCHEDULES: dict[str, tuple[float, int, int, int, Any]] = {
    "tiny": (3e-3, 1000, 4, 4096, "float32"),
    "small": (2e-3, 4000, 8, 8192, "float32"),
    "125m": (3e-3, 4800, 64, 8192, "bfloat16"),
    "350m": (1.5e-3, 13500, 64, 8192, "bfloat16"),
    "760m": (1.25e-3, 29000, 64, 8192, "bfloat16"),
    "1b": (1e-3, 50000, 64, 8192, "bfloat16"),
    "3b": (8e-4, 52000, 128, 8192, "bfloat16"),
}


def _variants(size: str) -> dict[str, RunConfig]:
    vocab_size, layers, hidden_size, heads, suffix, window, mini_batch = _SHAPES[size]
    ttt_mlp, full_mlp, mamba2_mlp, deltanet_mlp, kvb_mlp, titans_mlp = _INTERMEDIATE_SIZES[size]
    lr, steps, batch, context, dtype = _SCHEDULES[size]

    def variant(mlp: int, *pattern: str, train_mode: Any = "meta", **settings: Any) -> RunConfig:
        shape = (vocab_size, hidden_size, layers, heads, mlp)
        model = ModelConfig(*shape, pattern=pattern, sliding_window=window, **{"mini_batch_size": None, **settings})
        train = TrainConfig(context=context, batch=batch, steps=steps, lr=lr, dtype=dtype, train_mode=train_mode)
        return RunConfig(model, train)

    memory = {"mini_batch_size": mini_batch}
    fast = {"mini_batch_size": mini_batch, "suffix_layers": suffix}
    return {
        size: variant(ttt_mlp, "window", **fast),
        f"{size}-full": variant(full_mlp, "full"),
        f"{size}-window": variant(full_mlp, "window"),
        f"{size}-hybrid": variant(full_mlp, *("window",) * 5, "full"),
        f"{size}-mamba2": variant(mamba2_mlp, "mamba2", "window"),
        f"{size}-gated-deltanet": variant(deltanet_mlp, "gated-deltanet", "window"),
        f"{size}-ttt-kvb": variant(kvb_mlp, "ttt-kvb", "window", **memory),
        f"{size}-titans": variant(titans_mlp, "titans", "window", **memory),
        f"{size}-dynamic": variant(full_mlp, "window", **fast, static_mlp=False, train_mode="pretrain"),
        f"{size}-full-prefix": variant(ttt_mlp, *("full",) * (layers - suffix), *("window",) * suffix, **fast),
    }


PRESETS = {name: config for size in SIZES for name, config in _variants(size).items()}


def preset(name: str) -> RunConfig:
    """The configuration called `name`; raises UserError if there is none in `PRESETS`.

    A size ("tiny", "small", and the published "125m" to "3b") is TTT-E2E. With "-full", "-window", "-hybrid",
    "-mamba2", "-gated-deltanet", "-ttt-kvb", "-titans" or "-dynamic" it is a system that TTT-E2E is compared with; with
    "-full-prefix" it is TTT-E2E over full attention.
    """
    if name not in PRESETS:
        likeness = {known: difflib.SequenceMatcher(None, known, name).ratio() for known in PRESETS}
        near = max(PRESETS, key=lambda known: (likeness[known], -len(known)))
        hint = f" Did you mean {near!r}?" if likeness[near] >= 0.5 else ""
        raise UserError(f"There is no preset {name!r}.{hint} `ttt-e2e presets` lists them all.")
    return PRESETS[name]


def extend_training(train: TrainConfig, context: int, pretrain_steps: int) -> TrainConfig:
    """The published recipe for further training at a longer `context`.

    A learning rate of 4e-4, a fortieth of the steps of pretraining, as many tokens per step, and no inner warm-up.
    """
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


def extend_model(model: ModelConfig, context: int) -> ModelConfig:
    """`model` for training at a longer `context`: with full attention, `rope_theta` is raised to the published base."""
    if "full" not in model.mixers:
        return model
    return replace(model, {"rope_theta": max(model.rope_theta, rope_theta_for(context))})


def rope_theta_for(context: int) -> float:
    """The published base of the rotary positions of full attention: 5e5 up to 8K, 2e6 up to 32K, 1e7 beyond."""
    return 5e5 if context <= 8192 else 2e6 if context <= 32_768 else 1e7
