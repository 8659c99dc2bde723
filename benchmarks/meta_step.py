"""Time and peak memory of a meta-training step against a standard training step of the same size.

    python benchmarks/meta_step.py                 # the published table's rows, on this machine
    python benchmarks/meta_step.py --compile       # the same, all variants compiled
    python benchmarks/meta_step.py --rounds 3      # quicker
    python benchmarks/meta_step.py --truncated 1 4 # also with truncated backpropagation through time

Standard is the sliding-window Transformer with the same number of parameters (its MLPs are wider, since it has no fast
ones). A step is loss, backward pass, gradient clipping and AdamW. All variants take turns in one process, round after
round; the ratio is taken within each round, and the median over rounds is printed. Peak memory (eager only) is measured
in a process of its own for each variant: how far its resident set grew above its size before the first step.
"""

import argparse
import json
import os

# The loop consists of many short operations; a thread that sleeps between them costs more than it saves. This has to be
# set before torch is loaded, and applies to all variants alike.
os.environ.setdefault("OMP_WAIT_POLICY", "active")

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ttt_e2e.config.schema import ModelConfig, TrainConfig, replace
from ttt_e2e.hardware import keep_freed_memory, machine
from ttt_e2e.inner_loop.compiled import compiled_functions
from ttt_e2e.inner_loop.functions import EAGER
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.training.optimizer import make_optimizer, optimizer_step

SHAPE = dict(
    vocab_size=1024,
    hidden_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    sliding_window=512,
    mini_batch_size=128,
)
META = ModelConfig(**SHAPE, intermediate_size=560, suffix_layers=2)
STANDARD = ModelConfig(**SHAPE, intermediate_size=700)
VARIANTS: dict[str, tuple[ModelConfig, str, int | None]] = {  # model, activation_checkpointing, truncated_bptt_steps
    "standard": (STANDARD, "none", None),
    "standard, full attention": (replace(STANDARD, {"pattern": ("full",)}), "none", None),
    "meta": (META, "none", None),
    "meta, sinks": (replace(META, {"attention_sink": True}), "none", None),
    "meta, checkpointing by mini-batch": (META, "mini-batch", None),
    "meta, checkpointing by sqrt": (META, "sqrt", None),
}
TARGETS = {  # in standard steps, by whether all is compiled
    False: {"meta": 1.5, "meta, checkpointing by mini-batch": 1.7},
    True: {"meta": 1.35, "meta, checkpointing by mini-batch": 1.55},
}
# Seconds per step of the official JAX implementation (jax 0.5.3, meta-training, this configuration, 2 threads of a
# machine of this kind): without activation checkpointing (median of 3), and as released (median of 5).
OFFICIAL = {"meta": 4.663, "meta, checkpointing by mini-batch": 5.245}


def make_step(variant: str, context: int, compile: bool = False, seed: int = 0) -> Callable[[], float]:
    """A function that runs one training step on random tokens and returns the loss."""
    config, checkpointing, truncated = VARIANTS[variant]
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config, generator)
    optimizer = make_optimizer(model, TrainConfig())
    tokens = torch.randint(config.vocab_size, (1, context + 1), generator=generator)
    functions = compiled_functions() if compile else EAGER

    def step() -> float:
        out = sequence_loss(
            model,
            tokens,
            activation_checkpointing=checkpointing,
            truncated_bptt_steps=truncated,
            functions=functions,
        )
        out.loss.backward()
        optimizer_step(model, optimizer, 1e-3, 1.0)
        return out.loss.item()

    return step


def seconds(step: Callable[[], float]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def peak_growth(variant: str, context: int) -> float:
    """MiB by which this process's peak exceeds its size before the first step. Call once in a fresh process."""
    step = make_step(variant, context)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # loads the matrix library, which takes memory of its own
    before = int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x).split()[1])
    for _ in range(3):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--context", type=int, default=2048, help="tokens of the one sequence of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="compile all variants, the standard ones too")
    parser.add_argument("--truncated", type=int, nargs="+", default=[], metavar="N", help="truncated_bptt_steps to add")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # Variants that take turns would fetch their memory anew each time; a process that trains one model keeps it.
    keep_freed_memory()
    for steps in args.truncated:
        VARIANTS[f"meta, {steps} mini-batches at a time"] = (META, "none", steps)
    if args.peak_of:
        print(peak_growth(args.peak_of, args.context))
        return

    peak = {}
    for name in () if args.compile else VARIANTS:  # the compiler takes far more memory than the step
        command = [sys.executable, __file__, "--peak-of", name, "--context", str(args.context)]
        command += ["--threads", str(args.threads)]
        command += ["--truncated", *map(str, args.truncated)] if args.truncated else []
        peak[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    torch._dynamo.config.recompile_limit = 64  # the variants' models share the functions that are compiled
    step_of = {name: make_step(name, args.context, args.compile) for name in VARIANTS}
    for step in step_of.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(args.rounds):
        for name, step in step_of.items():
            times[name].append(seconds(step))

    rows = []
    official = OFFICIAL if (args.context, args.threads) == (2048, 2) else {}
    for name in VARIANTS:
        ratios = [t / s for t, s in zip(times[name], times["standard"], strict=True)]
        rows.append(
            {
                "variant": name,
                "seconds": statistics.median(times[name]),
                "time_ratio": statistics.median(ratios),
                "time_target": TARGETS[args.compile].get(name),
                "official_jax_seconds": official.get(name),
                "times_official": official[name] / statistics.median(times[name]) if name in official else None,
                "peak_mib": peak.get(name),
                "peak_ratio": peak[name] / peak["standard"] if peak else None,
            }
        )
    result = {
        "config": {"context": args.context, "batch": 1, "dtype": "float32", "threads": args.threads, **SHAPE},
        "compiled": args.compile,
        "parameters": {n: sum(p.numel() for p in Transformer(VARIANTS[n][0]).parameters()) for n in VARIANTS},
        "machine": machine(),
        "rounds": args.rounds,
        "seed": 0,
        "rows": rows,
    }
    print("| variant | s per step | / standard | target | official JAX / this | peak MiB | / standard |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        target = f"<= {r['time_target']}" if r["time_target"] else "-"
        times_official = f"{r['times_official']:.1f}" if r["times_official"] else "-"
        print(
            f"| {r['variant']} | {r['seconds']:.3f} | {r['time_ratio']:.2f} | {target} | {times_official} "
            + (f"| {r['peak_mib']:.0f} | {r['peak_ratio']:.2f} |" if peak else "| - | - |")
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
