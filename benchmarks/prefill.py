"""Time to read a long text before the first word of an answer: full attention against TTT-E2E.

    python benchmarks/prefill.py --compile            # 32768 tokens, and shorter texts with fewer rounds
    python benchmarks/prefill.py --lengths 8192       # quicker

Full attention computes the least that it can: the keys and values of all tokens (its state) and the logits of the last
one, with PyTorch's fused kernel over the whole text. TTT-E2E computes the losses of all tokens, which it learns from,
in two ways:

    whole text      the prefix over the whole text at once, then one mini-batch after the other: `sequence_loss` without
                    a graph. The last mini-batch is not learned from, and no state is returned.
    mini-batches    `read_mini_batch` on each, with the prefix: memory does not grow with the text, and there is a state
                    to continue from. This is how a session reads.

Both models have as many parameters. All variants take turns in one process, round after round; the ratio is taken
within each round, and the median over rounds is printed. Compiled TTT-E2E is compared with compiled full attention.
"""

import argparse
import json
import os

# As in meta_step.py: a thread that sleeps between short operations costs more than it saves.
os.environ.setdefault("OMP_WAIT_POLICY", "active")

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.hardware import keep_freed_memory, machine
from ttt_e2e.inference.streaming import read_mini_batch, start_reading
from ttt_e2e.inner_loop.compiled import compiled_functions
from ttt_e2e.inner_loop.functions import EAGER, LoopFunctions
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.transformer import Transformer

SHAPE = dict(vocab_size=1024, hidden_size=256, num_hidden_layers=8, num_attention_heads=4)
TTT = ModelConfig(**SHAPE, intermediate_size=560, suffix_layers=2, sliding_window=512, mini_batch_size=128)
FULL = ModelConfig(**SHAPE, intermediate_size=700, pattern=("full",), mini_batch_size=None)
TARGETS = {32768: 4.5}  # by tokens: full attention's time over TTT-E2E's


def make_variants(length: int, compile: bool) -> dict[str, Callable[[], object]]:
    """By name, functions that read one random text of `length` tokens."""
    generator = torch.Generator().manual_seed(0)
    full, ttt = Transformer(FULL, generator), Transformer(TTT, generator)
    tokens = torch.randint(FULL.vocab_size, (1, length + 1), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    b = TTT.mini_batch_size
    assert b is not None

    def attend(functions: LoopFunctions) -> object:
        x_BTD = functions.forward_prefix(full, inputs, full.positions(0, length, torch.float32), torch.float32)
        return full.logits(x_BTD[:, -1:])

    def whole(functions: LoopFunctions) -> object:
        return sequence_loss(ttt, tokens, functions=functions)

    def read(functions: LoopFunctions) -> object:
        state = start_reading(ttt, 1)
        for i in range(0, length, b):
            state, _, _ = read_mini_batch(ttt, state, inputs[:, i : i + b], targets[:, i : i + b], functions=functions)
        return state

    kinds = {"full attention": attend, "TTT-E2E, whole text": whole, "TTT-E2E, mini-batches": read}
    variants = {name: lambda run=run: run(EAGER) for name, run in kinds.items()}
    if compile:
        functions = compiled_functions()
        variants |= {f"{name}, compiled": lambda run=run: run(functions) for name, run in kinds.items()}
    return variants


@torch.no_grad()
def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 16384, 32768])
    parser.add_argument("--rounds", type=int, default=5, help="for the longest text")
    parser.add_argument("--short-rounds", type=int, default=3, help="for the others")
    parser.add_argument("--compile", action="store_true", help="measure compiled variants too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as in meta_step.py

    rows = []
    print("| tokens | variant | s | full attention / it | target |\n|---|---|---|---|---|")
    for length in args.lengths:
        torch.compiler.reset()
        variants = make_variants(length, args.compile)
        for name, run in variants.items():
            if length < 16384 or name.endswith("compiled"):  # the others need no warm-up
                seconds(run)
        rounds = args.rounds if length == max(args.lengths) else args.short_rounds
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name, run in variants.items():
                times[name].append(seconds(run))
        for name in variants:
            full = times["full attention, compiled" if name.endswith("compiled") else "full attention"]
            row = {
                "tokens": length,
                "variant": name,
                "seconds": statistics.median(times[name]),
                "ratio": statistics.median(f / t for f, t in zip(full, times[name], strict=True)),
                "target": TARGETS.get(length) if name.startswith("TTT-E2E") else None,
                "rounds": rounds,
            }
            rows.append(row)
            target = f">= {row['target']}" if row["target"] else "-"
            print(f"| {length} | {name} | {row['seconds']:.3f} | {row['ratio']:.2f} | {target} |", flush=True)
    result = {
        "config": {"batch": 1, "dtype": "float32", "threads": args.threads, **SHAPE},
        "sliding_window": TTT.sliding_window,
        "mini_batch_size": TTT.mini_batch_size,
        "parameters": {
            n: sum(p.numel() for p in Transformer(c).parameters()) for n, c in (("full", FULL), ("ttt", TTT))
        },
        "machine": machine(),
        "seed": 0,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
