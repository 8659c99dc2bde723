"""How much faster do many sessions read and write in one batch than one after the other?

    python benchmarks/pool.py                        # the shipped model, 16 sessions
    python benchmarks/pool.py --threads 1 --out benchmarks/results/pool.json
    python benchmarks/pool.py --dtype bfloat16       # matrix products in bfloat16, as `ttt-e2e serve --dtype` has it

Every session has read another part of Python's own library, and is at another position. Then all of them read further
(and learn), and all of them write, once in a `SessionPool`, which they join first, and once one after the other, each
by itself. The two take turns; the ratio is taken within a round, and the medians are printed. Processor time, which
other work on the machine disturbs less, is shown beside wall time.

A CPU computes a mini-batch's products with b rows at nearly its full speed already. So the ratio of reading has a
bound, which is printed too: the ratio if reading together took only its matrix products (without those of PyTorch's
fused attention), at the speed of products with the rows of all sessions, measured in the same round.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ttt_e2e.data.text import standard_library
from ttt_e2e.hardware import machine
from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.sampling import SamplingOptions
from ttt_e2e.inference.session import Session, SessionState
from ttt_e2e.inference.session_pool import SessionPool
from ttt_e2e.model.transformer import Transformer

Times = tuple[float, float]


def timed(work: Callable[[], None]) -> Times:
    """Wall time and processor time, in seconds."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def before_reading(text: SessionState) -> SessionState:
    return text._replace(pending=text.pending[:1])


def read_alone(model: Transformer, texts: list[SessionState], dtype: torch.dtype) -> None:
    template = Session(model, dtype=dtype)
    for text in texts:
        template.with_state(before_reading(text)).read(text.pending[1:])


def write_alone(model: Transformer, texts: list[SessionState], count: int, dtype: torch.dtype) -> None:
    template = Session(model, dtype=dtype)
    for seed, text in enumerate(texts):
        for _ in template.with_state(before_reading(text)).generate_tokens((), max_tokens=count, seed=seed):
            pass


def pool_of(model: Transformer, texts: list[SessionState], dtype: torch.dtype) -> SessionPool:
    template = Session(model, dtype=dtype)
    pool = SessionPool(template, max_batch=len(texts))
    for text in texts:
        pool.add(template.with_state(before_reading(text)))
    return pool


def read_together(model: Transformer, texts: list[SessionState], dtype: torch.dtype) -> None:
    pool = pool_of(model, texts, dtype)
    for id, text in enumerate(texts):
        pool.submit_read(id, text.pending[1:])
    while pool.busy:
        pool.step()


def write_together(model: Transformer, texts: list[SessionState], count: int, dtype: torch.dtype) -> None:
    pool = pool_of(model, texts, dtype)
    for id in range(len(texts)):
        pool.submit_generate(id, max_tokens=count, options=SamplingOptions(seed=id))
    while pool.busy:
        pool.step()


def products(model: Transformer, rows: int, dtype: torch.dtype) -> tuple[int, Callable[[], None]]:
    """The kinds of matrix products in a mini-batch, with `rows` rows: their operations, and what computes them."""
    config = model.config
    widths = (config.vocab_size, 2 * config.intermediate_size, 3 * config.hidden_size, config.hidden_size)
    x_ND = torch.randn(rows, config.hidden_size, dtype=dtype)
    weights = [torch.randn(width, config.hidden_size, dtype=dtype) for width in widths] * 4

    def work() -> None:
        for weight in weights:
            x_ND @ weight.T

    return 2 * rows * config.hidden_size * 4 * sum(widths), work


def operations(model: Transformer, texts: list[SessionState]) -> int:
    """Operations of the matrix products in reading these texts one after the other."""
    with FlopCounterMode(display=False) as counter:
        read_alone(model, texts, torch.float32)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder (default: the shipped model)")
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--mini-batches", type=int, default=64, help="that every session reads in a round")
    parser.add_argument("--write", type=int, default=32, help="tokens that every session writes in a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrix products")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model, torch.device("cpu"))
    dtype = getattr(torch, args.dtype)
    b, window = model.config.tokens_per_read, model.config.sliding_window

    # Sessions with a full window behind them, at positions of their own, and what they are to read next.
    before = [window + b * (i + 1) for i in range(args.sessions)]
    wanted = [length + b * args.mini_batches + 1 for length in before]
    chunks = itertools.chain.from_iterable(document.chunks() for document in standard_library())
    parts: list[np.ndarray] = []
    for part in tokenizer.encode_chunks(chunks):
        parts.append(part)
        if sum(map(len, parts)) >= sum(wanted):
            break
    starts = [0, *itertools.accumulate(wanted)]
    own = [np.concatenate(parts)[start : start + length] for start, length in zip(starts, wanted, strict=False)]
    pool = SessionPool(Session(model, dtype=dtype))
    for tokens, length in zip(own, before, strict=True):
        pool.submit_read(pool.add(), tokens[: length + 1])
    while pool.busy:
        pool.step()
    texts = [
        pool.peek(id).state()._replace(pending=tokens[length:])
        for id, (tokens, length) in enumerate(zip(own, before, strict=True))
    ]
    del pool

    work: dict[str, tuple[int, Callable[[], None], Callable[[], None]]] = {
        "read": (
            args.sessions * b * args.mini_batches,
            lambda: read_alone(model, texts, dtype),
            lambda: read_together(model, texts, dtype),
        ),
        "write": (
            args.sessions * args.write,
            lambda: write_alone(model, texts, args.write, dtype),
            lambda: write_together(model, texts, args.write, dtype),
        ),
    }
    needed = operations(model, texts)
    of_product, product = products(model, b * args.sessions, dtype)
    results, bound = {}, 0.0
    for name, (tokens, alone, together) in work.items():
        alone(), together()
        rounds = [(timed(alone), timed(together), timed(product)) for _ in range(args.rounds)]
        if name == "read":
            bound = statistics.median(a[0] / (needed / of_product * p[0]) for a, _, p in rounds)
        results[name] = {
            "tokens_per_second_alone": tokens / statistics.median(a[0] for a, _, _ in rounds),
            "tokens_per_second_together": tokens / statistics.median(t[0] for _, t, _ in rounds),
            "ratio": statistics.median(a[0] / t[0] for a, t, _ in rounds),
            "ratio_of_processor_time": statistics.median(a[1] / t[1] for a, t, _ in rounds),
        }

    result = {
        "sessions": args.sessions,
        "model": {"parameters": sum(p.numel() for p in model.parameters()), "b": b, "sliding_window": window},
        **results,
        "bound_on_the_ratio_of_reading": bound,
        "mini_batches": args.mini_batches,
        "written": args.write,
        "rounds": args.rounds,
        "threads": args.threads,
        "dtype": args.dtype,
        "machine": machine(),
    }
    print(f"| {args.sessions} sessions | one after the other | in one batch | ratio | ratio of processor time |")
    print("|---|---|---|---|---|")
    for name, label in (("read", "reading and learning"), ("write", "writing")):
        r = results[name]
        print(
            f"| {label} | {r['tokens_per_second_alone']:,.0f} tokens/s "
            f"| {r['tokens_per_second_together']:,.0f} tokens/s "
            f"| {r['ratio']:.2f} | {r['ratio_of_processor_time']:.2f} |"
        )
    print(f"\nReading together can be at most {bound:.2f} times as fast: its matrix products alone take that long.")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
