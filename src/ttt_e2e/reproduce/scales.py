"""At what scale the comparison is made. All its numbers stand here."""

from dataclasses import dataclass

from ttt_e2e.errors import UserError


@dataclass(frozen=True)
class Scale:
    """A comparison's numbers, the same for every system.

    size: of the presets. window, mini_batch: k and b, in place of the presets'. settings: more of theirs, NAME=VALUE.
    pretrain_context, pretrain_tokens: of the first stage. contexts: lengths to evaluate at; up to the pre-training's
        context with that model itself, beyond with one that was trained on for that length with `extend_tokens` at
        `extend_lr`.
    warm_tokens: of a second stage at pretrain_context, where one model starts from another; its rates to try are
        factors of extend_lr.
    tokens_per_step, extend_tokens_per_step: of an optimiser step, in the first stage and at every longer context.
    piece_tokens: how many of them a process takes at once.
    sweep: factors of the preset's outer learning rate, each tried for `sweep_tokens`; then half and twice the best.
    inner_lrs: what a model that was trained without meta-learning may learn with at test time; the best is chosen on
        `choose_tokens` of the training text.
    eval_tokens: of each held-out book, from its start. eval_batch_tokens: how many of them are read at once.
    latency_contexts, latency_seconds: where latency is measured, and for how long at each.
    processes: that train one model together, each on a GPU where there is more than one. vocab_size, val_share: of the
        tokens, where they are prepared here. needs: what machine it takes, a sentence.
    """

    name: str
    size: str
    window: int
    mini_batch: int
    pretrain_context: int
    pretrain_tokens: int
    contexts: tuple[int, ...]
    extend_tokens: int
    warm_tokens: int
    extend_lr: float
    tokens_per_step: int
    extend_tokens_per_step: int
    piece_tokens: int
    sweep: tuple[float, ...]
    sweep_tokens: int
    inner_lrs: tuple[float, ...]
    choose_tokens: int
    eval_tokens: int
    eval_batch_tokens: int
    latency_contexts: tuple[int, ...]
    latency_seconds: float
    vocab_size: int
    needs: str
    settings: tuple[str, ...] = ()
    processes: int = 1
    val_share: float = 0.1


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="tiny",
            size="tiny",
            window=256,
            mini_batch=64,
            # Norms after the sub-layers make full attention and TTT-E2E worse at this size, and the window no better.
            settings=("dtype=bfloat16", "activation_checkpointing=none", "checkpoint_every=400", "post_norm=false"),
            pretrain_context=512,
            pretrain_tokens=2_621_440,
            contexts=(256, 512, 1024, 2048, 4096),
            extend_tokens=327_680,
            warm_tokens=262_144,
            extend_lr=1e-3,
            # Two sequences a step: with eight, 500,000 tokens do not lead beyond the words' frequencies.
            tokens_per_step=1024,
            extend_tokens_per_step=4096,
            piece_tokens=4096,
            sweep=(0.5, 2.0, 8.0),
            # With half of it, no rate leads beyond the words' frequencies, and the sweep takes one that is too high.
            sweep_tokens=983_040,
            inner_lrs=(0.01, 0.03, 0.1, 0.3, 1.0),
            choose_tokens=32_768,
            eval_tokens=16_384,
            eval_batch_tokens=8192,
            latency_contexts=(256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768),
            latency_seconds=1.0,
            vocab_size=4096,
            needs="Any computer; under three hours on two CPU cores that are fast in bfloat16.",
        ),
        Scale(
            name="small",
            size="small",
            window=1024,
            mini_batch=128,
            settings=("dtype=bfloat16", "checkpoint_every=200"),
            pretrain_context=1024,
            pretrain_tokens=524_288_000,
            contexts=(1024, 2048, 4096, 8192, 16_384, 32_768),
            extend_tokens=26_214_400,
            warm_tokens=52_428_800,
            extend_lr=4e-4,
            tokens_per_step=131_072,
            extend_tokens_per_step=131_072,
            piece_tokens=32_768,
            sweep=(0.25, 1.0, 4.0),
            sweep_tokens=15_728_640,
            inner_lrs=(0.01, 0.03, 0.1, 0.3, 1.0),
            choose_tokens=262_144,
            eval_tokens=65_536,
            eval_batch_tokens=65_536,
            latency_contexts=(1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072),
            latency_seconds=3.0,
            vocab_size=8192,
            needs="One GPU with 80 GB of memory; a billion tokens of long texts or more.",
        ),
        # The paper's: window = pre-training context = 8K, a fortieth of the steps for each extension.
        Scale(
            name="paper",
            size="3b",
            window=8192,
            mini_batch=1024,
            settings=("dtype=bfloat16", "checkpoint_every=200"),
            pretrain_context=8192,
            pretrain_tokens=52_000 * 128 * 8192,
            contexts=(8192, 16_384, 32_768, 65_536, 131_072),
            extend_tokens=1300 * 128 * 8192,
            warm_tokens=5200 * 128 * 8192,
            extend_lr=4e-4,
            tokens_per_step=128 * 8192,
            extend_tokens_per_step=128 * 8192,
            piece_tokens=8192,
            sweep=(0.25, 1.0, 4.0),
            sweep_tokens=780 * 128 * 8192,
            inner_lrs=(0.01, 0.03, 0.1, 0.3, 1.0),
            choose_tokens=1_048_576,
            eval_tokens=131_072,
            eval_batch_tokens=131_072,
            latency_contexts=(8192, 16_384, 32_768, 65_536, 131_072),
            latency_seconds=10.0,
            vocab_size=128_256,
            needs="Eight GPUs or more with 80 GB each, for months: 54.5 billion tokens for every system. --data "
            "must be tokens of the Llama 3 vocabulary (128,256), --books long texts in the same tokens.",
            processes=8,
        ),
    )
}


def scale(name: str) -> Scale:
    """The scale called `name`. Raises UserError if there is none."""
    if name not in SCALES:
        raise UserError(f"There is no scale {name!r}; there are: {', '.join(SCALES)}.")
    return SCALES[name]
