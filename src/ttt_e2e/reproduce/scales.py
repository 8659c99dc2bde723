"""The scales that a comparison can be made at, with all their numbers."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ttt_e2e.errors import UserError
from ttt_e2e.model.checkpoint import load_config


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The numbers of a comparison, the same for every system. Lengths and amounts are in tokens."""

    name: str
    size: str  # of the presets: "tiny", "small", "3b"; "pretrained" if all systems start from a model
    sliding_window: int
    mini_batch_size: int

    pretrain_context: int  # length of the sequences in the first stage
    pretrain_tokens: int

    contexts: tuple[int, ...]
    """Lengths of the sequences in which held-out books are read. Up to `pretrain_context` the pretrained model reads
    them; beyond it, one that was trained further on sequences of that length."""

    extend_tokens: int  # of that further training; 0: there is none, and the pretrained model reads them all
    warm_start_tokens: int  # of a second stage at `pretrain_context`, for a system that starts from another one's model
    extend_lr: float = 4e-4  # outer learning rate of the further training; a second stage sweeps around it
    tokens_per_step: int  # of the first and the second stage
    extend_tokens_per_step: int
    micro_batch_tokens: int  # of a step, computed at once by a process

    sweep_factors: tuple[float, ...] = (0.25, 1.0, 4.0)
    """Factors of the preset's outer learning rate, each tried for `sweep_tokens`; then half and twice the best are."""

    second_round: bool = True
    """Whether these two are tried as well."""

    sweep_tokens: int

    inner_lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """Inner learning rates to try with a model that was trained without meta-learning, on `inner_lr_tokens` of the
    training text."""

    inner_lr_tokens: int
    eval_tokens: int  # read of each held-out book, from its start
    eval_batch_tokens: int  # read at once
    latency_contexts: tuple[int, ...]
    latency_seconds: float  # for each figure
    vocab_size: int
    requirements: str  # a sentence on the machine and the data that it takes
    settings: tuple[str, ...] = (
        "dtype=bfloat16",
        "checkpoint_every=200",
    )  # further settings, NAME=VALUE, in place of the presets'
    processes: int = 1  # that train one model together, each on its own GPU
    val_share: float = 0.1  # of the text, held out where the tokens are prepared here

    start_from: Path | None = None
    """The folder of the converted model that all systems start from. Windows, mini-batches and vocabulary are its own.
    None: every system starts from random weights."""


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="tiny",
            size="tiny",
            sliding_window=256,
            mini_batch_size=64,
            # At this size norms after the sub-layers hurt full attention and TTT-E2E, and do not help the window.
            settings=("dtype=bfloat16", "activation_checkpointing=none", "checkpoint_every=400", "post_norm=false"),
            pretrain_context=512,
            pretrain_tokens=2_621_440,
            contexts=(256, 512, 1024, 2048, 4096),
            extend_tokens=327_680,
            warm_start_tokens=262_144,
            extend_lr=1e-3,
            # Two sequences a step: with eight, 500,000 tokens teach a model little more than word frequencies.
            tokens_per_step=1024,
            extend_tokens_per_step=4096,
            micro_batch_tokens=4096,
            sweep_factors=(0.5, 2.0, 8.0),
            # In half of this no rate gets beyond word frequencies, and the sweep picks one that is too high.
            sweep_tokens=983_040,
            inner_lr_tokens=32_768,
            eval_tokens=16_384,
            eval_batch_tokens=8192,
            latency_contexts=(256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768),
            latency_seconds=1.0,
            vocab_size=4096,
            requirements="Runs on any computer: under three hours on two CPU cores that are fast in bfloat16.",
        ),
        Scale(
            name="small",
            size="small",
            sliding_window=1024,
            mini_batch_size=128,
            pretrain_context=1024,
            pretrain_tokens=524_288_000,
            contexts=(1024, 2048, 4096, 8192, 16_384, 32_768),
            extend_tokens=26_214_400,
            warm_start_tokens=52_428_800,
            tokens_per_step=131_072,
            extend_tokens_per_step=131_072,
            micro_batch_tokens=32_768,
            sweep_tokens=15_728_640,
            inner_lr_tokens=262_144,
            eval_tokens=65_536,
            eval_batch_tokens=65_536,
            latency_contexts=(1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072),
            latency_seconds=3.0,
            vocab_size=8192,
            requirements="Needs one GPU with 80 GB of memory, and a billion tokens of long texts or more.",
        ),
        # The paper's numbers: window and pre-training context of 8K, a fortieth of the steps for each extension.
        Scale(
            name="paper",
            size="3b",
            sliding_window=8192,
            mini_batch_size=1024,
            pretrain_context=8192,
            pretrain_tokens=52_000 * 128 * 8192,
            contexts=(8192, 16_384, 32_768, 65_536, 131_072),
            extend_tokens=1300 * 128 * 8192,
            warm_start_tokens=5200 * 128 * 8192,
            tokens_per_step=128 * 8192,
            extend_tokens_per_step=128 * 8192,
            micro_batch_tokens=8192,
            sweep_tokens=780 * 128 * 8192,
            inner_lr_tokens=1_048_576,
            eval_tokens=131_072,
            eval_batch_tokens=131_072,
            latency_contexts=(8192, 16_384, 32_768, 65_536, 131_072),
            latency_seconds=10.0,
            vocab_size=128_256,
            requirements="Needs eight GPUs or more with 80 GB each, for months: 54.5 billion tokens for every system. "
            "--data must be tokens of the Llama 3 vocabulary (128,256), --books long texts in the same tokens.",
            processes=8,
        ),
    )
}


def find_scale(name: str) -> Scale:
    """The scale called `name`. Raises UserError if it does not exist."""
    if name not in SCALES:
        raise UserError(f"There is no scale {name!r}; there are: {', '.join(SCALES)}.")
    return SCALES[name]


_PRETRAINED = Scale(
    name="pretrained",
    size="pretrained",
    sliding_window=0,
    mini_batch_size=0,
    vocab_size=0,
    settings=(
        *("dtype=bfloat16", "trainable=suffix", "cache_prefix=true", "checkpoint_every=10"),
        *("activation_checkpointing=mini-batch", "inner_warmup_steps=0", "inner_lr_lr=0.03"),
    ),
    pretrain_context=8192,
    pretrain_tokens=2_097_152,
    contexts=(8192, 32_768),
    extend_tokens=0,
    warm_start_tokens=0,
    extend_lr=3e-4,
    tokens_per_step=8192,
    extend_tokens_per_step=8192,
    micro_batch_tokens=8192,
    sweep_factors=(1 / 3, 1.0, 3.0),
    second_round=False,
    sweep_tokens=262_144,
    inner_lrs=(0.02, 0.05, 0.1, 0.2, 0.5),
    inner_lr_tokens=65_536,
    eval_tokens=32_768,
    eval_batch_tokens=8192,
    latency_contexts=(),
    latency_seconds=0.0,
    requirements="The whole of it takes days on two CPU cores.",
)


def pretrained_scale(model: Path, tokens: int | None = None) -> Scale:
    """The scale of `reproduce pretrained`, where all systems start from the converted model in a folder.

    tokens: that every system is trained on; None: 2,097,152. Raises UserError if the model has no suffix.
    """
    config = load_config(model)
    if not config.suffix_layers:
        raise UserError(f"{model} is not a model that learns while it reads; make one with `ttt-e2e convert`.")
    assert config.mini_batch_size is not None, "ModelConfig lets no suffix through without a mini-batch"
    return dataclasses.replace(
        _PRETRAINED,
        start_from=model,
        sliding_window=config.sliding_window,
        mini_batch_size=config.mini_batch_size,
        vocab_size=config.vocab_size,
        pretrain_tokens=tokens or _PRETRAINED.pretrain_tokens,
    )
