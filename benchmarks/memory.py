"""Peak memory of a meta-training step as the context grows, at the same number of tokens per step.

    python benchmarks/memory.py                       # prints the table
    python benchmarks/memory.py --out benchmarks/results/memory.json --plot docs/memory.png

Every point is measured in a process of its own: how far its resident set grew above its size before the first of two
steps (loss, backward pass, gradient clipping, AdamW). Standard is the sliding-window Transformer with as many
parameters.

The states between mini-batches (fast weights and caches) are counted, not estimated: each is followed until its memory
is released, and the most that are alive at once are printed. Every sequence of a batch has its own fast weights. With
N mini-batches in each of B sequences and N B constant, a context twice as long has half as many copies: storing every
state costs the same at every context, storing about sqrt(N) of them costs less the longer the context is. What grows,
as N or as sqrt(N), is the share of one sequence: the second panel of the picture.
"""

import argparse
import ctypes
import json
import math
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

# glibc returns freed blocks above a size to the system, and raises that size with every block that is freed. Fixed at
# 4 MiB (M_MMAP_THRESHOLD), the peak is closer to the memory that is in use.
if platform.libc_ver()[0] == "glibc":
    ctypes.CDLL(None).mallopt(-3, 4 << 20)

from ttt_e2e.config.schema import ModelConfig, TrainConfig
from ttt_e2e.hardware import machine
from ttt_e2e.inner_loop.functions import EAGER
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.inner_loop.step import InnerLoopState
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.training.optimizer import make_optimizer, optimizer_step

SHAPE = dict(
    vocab_size=1024, hidden_size=128, num_hidden_layers=4, num_attention_heads=2, sliding_window=256, mini_batch_size=64
)
META = ModelConfig(**SHAPE, intermediate_size=280, suffix_layers=2)
STANDARD = ModelConfig(**SHAPE, intermediate_size=350)
VARIANTS = {
    "standard": (STANDARD, "none", False),
    "meta": (META, "none", False),
    "meta, checkpointing by mini-batch": (META, "mini-batch", False),
    "meta, checkpointing by sqrt": (META, "sqrt", False),
    "meta, checkpointing by sqrt, prefix recomputed": (META, "sqrt", True),
}
MIB = 2**20


class Alive:
    """Which of the states that it was shown still take memory, and the most that ever did at once."""

    def __init__(self) -> None:
        self.states: list[list[tuple[StorageWeakRef, int]]] = []
        self.most_states = self.most_bytes = 0

    def show(self, state: InnerLoopState) -> None:
        # By storage: a cache may be a view of a longer tensor, which is kept whole. The parameters, which a text's fast
        # weights start from, are never shown.
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in state.tensors()}
        self.states.append([(StorageWeakRef(s), s.nbytes()) for s in storages.values()])
        self.states = [left for s in self.states if (left := [(ref, size) for ref, size in s if not ref.expired()])]
        self.most_states = max(self.most_states, len(self.states))
        self.most_bytes = max(self.most_bytes, sum(size for s in self.states for _, size in s))


def measure(variant: str, context: int, batch: int) -> dict[str, float]:
    """Peak growth in MiB, and the states that were alive. Call once in a fresh process."""
    config, checkpointing, recompute_prefix = VARIANTS[variant]
    generator = torch.Generator().manual_seed(0)
    model = Transformer(config, generator)
    optimizer = make_optimizer(model, TrainConfig())
    tokens = torch.randint(config.vocab_size, (batch, context + 1), generator=generator)
    alive = Alive()

    def inner_step(*args: Any) -> Any:
        result = EAGER.inner_step(*args)
        alive.show(result[0])
        return result

    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # loads the matrix library, which takes memory of its own
    before = int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x).split()[1])
    for _ in range(2):
        out = sequence_loss(
            model,
            tokens,
            activation_checkpointing=checkpointing,
            recompute_prefix=recompute_prefix,
            functions=EAGER._replace(inner_step=inner_step),
        )
        out.loss.backward()
        del out
        optimizer_step(model, optimizer, 1e-3, 1.0)
    return {
        "peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "states": alive.most_states,
        "kept_mib": alive.most_bytes / MIB,
    }


def plot(rows: list[dict[str, Any]], tokens: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for i, name in enumerate(VARIANTS):
        of = [r for r in rows if r["variant"] == name]
        left.plot([r["context"] for r in of], [r["peak_mib"] for r in of], "o-", color=f"C{i}", label=name)
        if name != "standard":
            share = [r["kept_mib"] / r["batch"] for r in of]
            right.plot([r["mini_batches"] for r in of], share, "o-", color=f"C{i}", label=name)
    left.set(xscale="log", ylim=(0, None), xlabel="context (tokens)", ylabel="peak memory of a step (MiB)")
    contexts = sorted({r["context"] for r in rows})
    left.set_xticks(contexts, [f"{c:,}" for c in contexts], rotation=30)
    left.minorticks_off()
    left.set_title(f"a step of {tokens:,} tokens")
    kept = [r for r in rows if "checkpointing" in r["variant"] and "prefix" not in r["variant"]]
    for name, power, style in (("by mini-batch", 1.0, "--"), ("by sqrt", 0.5, ":")):
        of = [r for r in kept if r["variant"].endswith(name)]
        first = of[0]
        line = [first["kept_mib"] / first["batch"] * (r["mini_batches"] / first["mini_batches"]) ** power for r in of]
        label = "as N" if power == 1 else "as sqrt(N)"
        right.plot([r["mini_batches"] for r in of], line, style, color="0.5", zorder=0, label=label)
    right.set(xscale="log", yscale="log", xlabel="mini-batches N", ylabel="states alive at once (MiB per sequence)")
    counts = sorted({r["mini_batches"] for r in rows})
    right.set_xticks(counts, [str(c) for c in counts])
    right.minorticks_off()
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter("{x:g}")
    right.set_title("fast weights and caches between mini-batches")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="per step: batch times context")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--plot", type=Path, help="draw them")
    parser.add_argument("--point", nargs=3, metavar=("VARIANT", "CONTEXT", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.point:
        variant, context, batch = args.point
        print(json.dumps(measure(variant, int(context), int(batch))))
        return

    rows: list[dict[str, Any]] = []
    print("| context | batch | N | step | peak MiB | / standard | states alive | MiB of states | per sequence |")
    print("|---|---|---|---|---|---|---|---|---|")
    for context in args.contexts:
        batch, count = max(1, args.tokens // context), math.ceil(context / META.mini_batch_size)
        for name in VARIANTS:
            command = [sys.executable, __file__, "--threads", str(args.threads), "--point", name]
            command += [str(context), str(batch)]
            point = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            row = {"context": context, "batch": batch, "mini_batches": count, "variant": name, **point}
            standard = row if name == "standard" else rows[len(rows) // len(VARIANTS) * len(VARIANTS)]
            row["peak_ratio"] = row["peak_mib"] / standard["peak_mib"]
            rows.append(row)
            states = "- | - | -"
            if row["states"]:
                states = f"{row['states']} | {row['kept_mib']:.1f} | {row['kept_mib'] / batch:.1f}"
            peak = f"{row['peak_mib']:.0f} | {row['peak_ratio']:.2f}"
            print(f"| {context} | {batch} | {count} | {name} | {peak} | {states} |", flush=True)
    result = {
        "config": {"tokens": args.tokens, "dtype": "float32", "threads": args.threads, **SHAPE},
        "parameters": {n: sum(p.numel() for p in Transformer(c).parameters()) for n, (c, *_) in VARIANTS.items()},
        "machine": machine(),
        "seed": 0,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot(rows, args.tokens, args.plot)


if __name__ == "__main__":
    main()
