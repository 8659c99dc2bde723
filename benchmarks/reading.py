"""Does reading stay as fast and as small at the end of a million tokens as after the first fifty thousand?

    python benchmarks/reading.py                     # the shipped model on Python's own library
    python benchmarks/reading.py --tokens 200000     # quicker

One session reads on and on. At the early mark and at the end a copy of it is kept (states are values); then the two
copies read the same further tokens in turn, piece after piece, and the median ratio of their times is printed. Peak
memory is the process's own, at the early mark and at the end.
"""

import argparse
import itertools
import json
import platform
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ttt_e2e.data.text import standard_library
from ttt_e2e.session import Session, load_reader


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder (default: the shipped model)")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--early", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_reader(args.model, torch.device("cpu"))
    piece = 16 * (model.config.mini_batch or 256)
    texts = itertools.chain.from_iterable(document.pieces() for document in standard_library())
    wanted = args.tokens + args.rounds * piece + 1
    parts, count = [], 0
    for part in tokenizer.encode_pieces(texts):
        parts.append(part)
        count += len(part)
        if count >= wanted:
            break
    tokens = np.concatenate(parts)[:wanted]
    reading, rest = tokens[: args.tokens], tokens[args.tokens :]

    session, early, early_peak = Session(model, tokenizer), None, 0.0
    started = time.perf_counter()
    losses, losses_count = 0.0, 0
    for start in tqdm(range(0, len(reading), piece), unit_scale=piece, unit="token"):
        scored = session.read(reading[start : start + piece])
        losses, losses_count = losses + float(scored.sum()), losses_count + len(scored)
        if early is None and session.position >= args.early:
            early, early_peak = session.fork(), peak_mib()
    seconds = time.perf_counter() - started
    late_peak = peak_mib()
    assert early is not None

    late = session.fork()
    times: dict[str, list[float]] = {"early": [], "late": []}
    for i in range(args.rounds):
        for name, reader in (("early", early), ("late", late)):
            before = time.perf_counter()
            reader.read(rest[i * piece : (i + 1) * piece])
            times[name].append((time.perf_counter() - before) / piece)
    ratio = statistics.median(b / a for a, b in zip(times["early"], times["late"], strict=True))

    result = {
        "tokens": len(reading),
        "early": args.early,
        "model": {"parameters": sum(p.numel() for p in model.parameters()), "b": model.config.mini_batch},
        "tokens_per_second_overall": len(reading) / seconds,
        "mean_loss": losses / losses_count,
        "microseconds_per_token": {name: 1e6 * statistics.median(t) for name, t in times.items()},
        "time_ratio_late_to_early": ratio,
        "peak_mib": {"early": early_peak, "late": late_peak},
        "peak_ratio_late_to_early": late_peak / early_peak,
        "rounds": args.rounds,
        "threads": args.threads,
        "machine": {"processor": platform.machine(), "torch": torch.__version__, "python": platform.python_version()},
    }
    print("| | after 50k | at the end | ratio | asked |\n|---|---|---|---|---|")
    a, b = result["microseconds_per_token"].values()
    print(f"| time per token | {a:.0f} us | {b:.0f} us | {ratio:.3f} | <= 1.10 |")
    print(f"| peak memory | {early_peak:.0f} MiB | {late_peak:.0f} MiB | {late_peak / early_peak:.3f} | <= 1.15 |")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
