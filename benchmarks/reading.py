"""Is reading as fast, and does it take as little memory, at the end of a long text as at its beginning?

    python benchmarks/reading.py                                            # a million tokens of Python's own library
    python benchmarks/reading.py BOOKS.parquet --tokens 10000000 --compile --plot docs/stream.png

One session of the shipped model reads all documents, again and again if they are too short. Speed (by wall time, and by
processor time, which other work on the machine disturbs less) and resident memory are recorded every `--every` tokens.
After `--early` tokens and at the end a copy of the session is kept; then the two copies take turns to read the same
further tokens, and the median ratio of their times is printed.
"""

import argparse
import itertools
import json
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tqdm import tqdm

from ttt_e2e.data.text import documents, standard_library
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.hardware import machine
from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.session import Session


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def chunks_of(tokenizer: Tokenizer, files: list[Path], size: int) -> Iterator[np.ndarray]:
    """The texts' tokens, `size` at a time, endlessly."""
    while True:
        source = documents(files, "text", []) if files else standard_library()
        texts = itertools.chain.from_iterable(document.chunks() for document in source)
        rest = np.empty(0, np.int64)
        for tokens in tokenizer.encode_chunks(texts):
            rest = np.concatenate((rest, tokens))
            for start in range(0, len(rest) - size + 1, size):
                yield rest[start : start + size]
            rest = rest[len(rest) // size * size :]


def plot(rows: list[dict[str, float]], path: Path, title: str) -> None:
    """Speed and memory along the stream."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    speed, memory = figure.subplots(2, 1, sharex=True)
    millions = [row["tokens"] / 1e6 for row in rows]
    for key, label, colour in (
        ("tokens_per_second", "by wall time", "#9db2c9"),
        ("tokens_per_processor_second", "by processor time", "#1565c0"),
    ):
        speed.plot(millions, [row[key] for row in rows], label=label, color=colour)
    memory.plot(millions, [row["resident_mib"] for row in rows], color="#1565c0")
    for axes, label in ((speed, "tokens per second"), (memory, "resident memory (MiB)")):
        axes.set(ylabel=label, ylim=(0, None), xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    speed.legend(frameon=False, loc="lower right")
    speed.set_title(title, loc="left")
    memory.set_xlabel("tokens read by one session (millions)")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="texts, JSONL, parquet (default: Python's library)")
    parser.add_argument("--model", type=Path, help="a model folder (default: the shipped model)")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--early", type=int, default=50_000)
    parser.add_argument("--every", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--plot", type=Path, help="draw speed and memory along the stream")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model, torch.device("cpu"))
    chunk_size = 16 * model.config.tokens_per_read
    stream = chunks_of(tokenizer, args.files, chunk_size)
    process = psutil.Process()

    session, early, early_peak = Session(model, tokenizer, compile=args.compile), None, 0.0
    session.read(next(stream))  # compilation and loading are not counted
    rows: list[dict[str, float]] = []
    sums = {"tokens": 0, "loss": 0.0, "clock": 0.0, "processor": 0.0}
    so_far = dict(sums)
    total = 0
    with tqdm(total=args.tokens, unit="token", unit_scale=True) as bar:
        while total < args.tokens:
            ids = next(stream)
            clock, processor = time.perf_counter(), time.process_time()
            losses = session.read(ids)
            now = {
                "tokens": len(losses),
                "loss": float(losses.sum()),
                "clock": time.perf_counter() - clock,
                "processor": time.process_time() - processor,
            }
            for key in sums:
                sums[key] += now[key]
                so_far[key] += now[key]
            total += len(ids)
            bar.update(len(ids))
            if early is None and total >= args.early:
                early, early_peak = session.fork(), peak_mib()
            if so_far["tokens"] >= args.every:
                rows.append(
                    {
                        "tokens": total,
                        "tokens_per_second": so_far["tokens"] / so_far["clock"],
                        "tokens_per_processor_second": so_far["tokens"] / so_far["processor"],
                        "loss": so_far["loss"] / so_far["tokens"],
                        "resident_mib": process.memory_info().rss / 2**20,
                    }
                )
                so_far = dict.fromkeys(so_far, 0.0)
    late_peak = peak_mib()
    assert early is not None

    late = session.fork()
    times: dict[str, list[float]] = {"early": [], "late": []}
    for _ in range(args.rounds):
        ids = next(stream)
        for name, reader in (("early", early), ("late", late)):
            before = time.perf_counter()
            reader.read(ids)
            times[name].append((time.perf_counter() - before) / chunk_size)
    ratio = statistics.median(b / a for a, b in zip(times["early"], times["late"], strict=True))

    result: dict[str, Any] = {
        "tokens": total,
        "early": args.early,
        "model": {"parameters": sum(p.numel() for p in model.parameters()), "b": model.config.mini_batch_size},
        "compiled": session.compiled,
        "tokens_per_second_overall": sums["tokens"] / sums["clock"],
        "mean_loss": sums["loss"] / sums["tokens"],
        "microseconds_per_token": {name: 1e6 * statistics.median(t) for name, t in times.items()},
        "time_ratio_late_to_early": ratio,
        "peak_mib": {"early": early_peak, "late": late_peak},
        "peak_ratio_late_to_early": late_peak / early_peak,
        "rounds": args.rounds,
        "threads": args.threads,
        "along": rows,
        "machine": machine(),
    }
    print(f"| | after {args.early:,} | after {total:,} | ratio | target |\n|---|---|---|---|---|")
    a, b = result["microseconds_per_token"].values()
    print(f"| time per token | {a:.0f} us | {b:.0f} us | {ratio:.3f} | <= 1.10 |")
    print(f"| peak memory | {early_peak:.0f} MiB | {late_peak:.0f} MiB | {late_peak / early_peak:.3f} | <= 1.15 |")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot and rows:
        plot(rows, args.plot, f"One session, {total / 1e6:.3g} million tokens, always learning")


if __name__ == "__main__":
    main()
