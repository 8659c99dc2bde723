"""Time and peak memory of a meta-training step that leaves a part of the model frozen, against full fine-tuning.

    python benchmarks/frozen_prefix.py                        # float32
    python benchmarks/frozen_prefix.py --dtype bfloat16
    python benchmarks/frozen_prefix.py --rounds 1 --only suffix "suffix, kept"

The model has the shape of SmolLM2-135M, random weights that are bfloat16 numbers, a window of 512 and mini-batches of
128; its last 8 blocks learn a quarter of their MLPs. Full fine-tuning is a step of `LlamaForCausalLM` of that shape in
`transformers`, its weights and AdamW's moments in the dtype that is named. A step is loss, backward pass, gradient
clipping and AdamW, for one sequence. "kept" is activation_checkpointing=none; the others have "mini-batch".

All variants take turns in one process, round after round; the ratio is taken within each round, and the median over
rounds is printed. Seconds are CPU seconds of the process, which other processes on a shared machine disturb less; with
one thread they are what a machine of one's own would take. Peak memory is measured in a process of its own for each
variant: the resident set's peak, and how far that is above the size before anything was built.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import torch

from ttt_e2e.config.schema import LoraConfig, ModelConfig, TrainConfig
from ttt_e2e.hardware import keep_freed_memory, machine
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.trainable import set_trainable, trained_weights
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.signals import GracefulStop
from ttt_e2e.training.distributed import DistributedContext
from ttt_e2e.training.optimizer import make_optimizer, optimizer_step
from ttt_e2e.training.parallelize import ParallelModel
from ttt_e2e.training.prefix_cache import digest_below_loop, fill_prefix_cache

SHAPE = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
)
MODEL = ModelConfig(
    **SHAPE,
    sliding_window=512,
    mini_batch_size=128,
    suffix_layers=8,
    parallel_mlp=True,
    fast_intermediate_size=384,
    suffix_intermediate_size=1152,
    qk_norm=False,
    post_norm=False,
)
FULL = "full fine-tuning"
VARIANTS: dict[str, dict[str, Any]] = {
    FULL: {},
    "all": {"trainable": "all"},
    "suffix": {"trainable": "suffix"},
    "suffix, kept": {"trainable": "suffix", "activation_checkpointing": "none"},
    "suffix, cached": {"trainable": "suffix", "cache_prefix": True},
    "suffix, cached, kept": {"trainable": "suffix", "cache_prefix": True, "activation_checkpointing": "none"},
    "lora": {"trainable": "lora", "lora": LoraConfig(r=16)},
    "lora, suffix": {"trainable": "lora", "lora": LoraConfig(r=16, layers="suffix")},
}


def make_step(variant: str, context: int, dtype: str) -> tuple[Callable[[], float], int]:
    """A function that makes one training step on random tokens and returns the loss; and how many numbers it trains."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(MODEL.vocab_size, (1, context + 1), generator=generator)
    if variant == FULL:
        return full_fine_tuning(tokens, getattr(torch, dtype))
    train = TrainConfig(context=context, batch=1, dtype=dtype, **VARIANTS[variant])
    model = Transformer(MODEL, generator)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    set_trainable(model, train)
    optimizer = make_optimizer(model, train)
    cache = None
    if train.cache_prefix:
        one = SimpleNamespace(
            windows=1, window=lambda index: tokens[0], context=context, seed=0, tokens=SimpleNamespace(digest="")
        )
        here, weights = ParallelModel(model, DistributedContext(0, 1, torch.device("cpu"))), digest_below_loop(model)
        cache = fill_prefix_cache(Path(mkdtemp()), here, weights, one, train, GracefulStop(), False)  # type: ignore[arg-type]

    def step() -> float:
        out = sequence_loss(
            model,
            tokens,
            activation_checkpointing=train.activation_checkpointing,
            dtype=getattr(torch, dtype),
            prefix_frozen=train.prefix_frozen,
            prefix_BTD=None if cache is None else cache.read([0]),
        )
        out.loss.backward()
        optimizer_step(model, optimizer, 1e-4, 1.0)
        return out.loss.item()

    return step, sum(weight.numel() for weight in trained_weights(model).values())


def full_fine_tuning(tokens: torch.Tensor, dtype: torch.dtype) -> tuple[Callable[[], float], int]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True, max_position_embeddings=8192))
    model = model.to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        loss = model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, sum(weight.numel() for weight in model.parameters())


def peak_mib(variant: str, context: int, dtype: str) -> tuple[float, float, int]:
    """This process's peak in MiB, how far that is above what it took before, and the numbers trained."""
    if variant == FULL:
        import transformers.models.llama.modeling_llama  # noqa: F401 - its code is not what is measured
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # loads the matrix library
    before = int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x).split()[1])
    step, trained = make_step(variant, context, dtype)
    for _ in range(2):
        step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024, (peak - before) / 1024, trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int, default=2048, help="tokens of the one sequence of a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS][1:], default=[*VARIANTS][1:], metavar="VARIANT")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--peak-of", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(json.dumps(peak_mib(args.peak_of, args.context, args.dtype)))
        return
    keep_freed_memory()  # as in meta_step.py

    names, peak = [FULL, *args.only], {}
    for name in names:
        command = [sys.executable, __file__, "--peak-of", name, "--context", str(args.context)]
        command += ["--dtype", args.dtype, "--threads", str(args.threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peak[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: peak {peak[name][0]:.0f} MiB", file=sys.stderr, flush=True)
    step_of = {name: make_step(name, args.context, args.dtype)[0] for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for round in range(args.rounds + 1):  # the first one fetches memory
        for name, step in step_of.items():
            start = time.process_time()
            step()
            if round:
                times[name].append(time.process_time() - start)
                print(f"{name}: {times[name][-1]:.1f} s", file=sys.stderr, flush=True)

    rows = []
    print("| trained | numbers | s per step | / full | peak MiB | above the start | / full |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        ratio = statistics.median(t / full for t, full in zip(times[name], times[FULL], strict=True))
        seconds, (whole, above, trained) = statistics.median(times[name]), peak[name]
        rows.append({"variant": name, "trained": trained, "seconds": times[name], "time_ratio": ratio})
        rows[-1] |= {"peak_mib": whole, "above_start_mib": above, "memory_ratio": above / peak[FULL][1]}
        print(
            f"| {name} | {trained / 1e6:.1f} M | {seconds:.1f} | {ratio:.2f} | {whole:.0f} | {above:.0f} "
            f"| {above / peak[FULL][1]:.2f} |"
        )
    if args.out:
        setting = {"context": args.context, "dtype": args.dtype, "threads": args.threads, "rounds": args.rounds}
        args.out.write_text(json.dumps(setting | {"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
