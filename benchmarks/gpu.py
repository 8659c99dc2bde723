"""All figures that need a GPU: meta-training steps of the published sizes, attention's double backward and memory.

    python benchmarks/gpu.py --rows 125m --out benchmarks/results/gpu.json     # a group of rows at a time
    python benchmarks/gpu.py --rows 760m --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --rows 3b --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --rows double-backward --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --rows materialised --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --tiny                                            # all of them in toy sizes on a CPU

Results are merged into the JSON file, and a table of all that it contains is printed.

125m, 760m, 3b. A meta-training step of the preset against a step of full attention with as many parameters (PyTorch's
fused attention), both compiled, in bfloat16, on 8192 random tokens of the whole vocabulary. A step is loss, backward
pass, gradient clipping and AdamW; at 3b only loss and backward pass, on both sides: parameters and AdamW's moments in
float32 would fill most of a GPU, and since the optimiser takes as long on both sides, leaving it out makes the ratio
larger, not smaller. The variants take turns in one process, and the ratio is taken within each round; if they do not
fit together, each runs in a process of its own, and the ratio is that of medians ("interleaved": false).

double-backward. A mini-batch's queries attend to a full window of cached keys and to their own. Counted are the
products that the mathematics needs per visible pair of query and key if no [T, S] matrix is kept: with cached keys
(constants of the inner gradient) and with own keys, forward 2 and 2, inner backward 3 and 5, backward over all keys 5
and 5, double backward 10 and 15: 5 for the rows' statistics (q k, a k, q b, px v, p c), 10 for the gradients (q k,
do v, a k, q b, do c, G k, dS b, G q, dS a, P' do), without those of b and c for cached keys (q b, p c; q b, do c,
dS b). A product is 2 K operations per pair. The share is relative to a large matrix product measured in the same
rounds. The "executed" share counts what our kernels compute, with separate passes over rows and columns: inner backward
3 and 7, backward 7, double backward 13 and 20.

materialised. The meta-training step at 8192 tokens, without activation checkpointing, with attention that materialises
[T, S] in the loop, against our kernel; then, each alone and not compiled, the longest context that fits, by doubling.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttt_e2e.config.presets import preset
from ttt_e2e.config.schema import ModelConfig, TrainConfig, replace
from ttt_e2e.hardware import machine
from ttt_e2e.inner_loop.compiled import compiled_functions
from ttt_e2e.inner_loop.functions import EAGER, LoopFunctions
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.ops import tuning
from ttt_e2e.ops.attention import operators
from ttt_e2e.training.optimizer import make_optimizer, optimizer_step

# preset: sequences per step, whether AdamW is part of the step, the target of the ratio
SIZES = {"125m": (2, True, 2.0), "760m": (1, True, 1.8), "3b": (1, False, 1.7)}
GROUPS = (*SIZES, "double-backward", "materialised")
TARGET_SHARE = 0.4
TOO_LONG = 120.0  # seconds per step that end the search for the longest context
Variant = dict[str, Any]  # what `make_step` takes


# -- tools -------------------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], object], device: str) -> float:
    """Time of one call, by the device's clock."""
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start_event.record()
    run()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1000


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error).lower()


def card() -> dict[str, str]:
    """The GPU's present clocks and power, if nvidia-smi is installed."""
    fields = "pstate,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields.split(","), (x.strip() for x in text.split(",")), strict=False))


def machine_and_card(device: str) -> dict[str, Any]:
    known = machine(device)
    if device == "cuda":
        import triton

        memory = torch.cuda.get_device_properties(0).total_memory
        known |= {"memory_gib": round(memory / 2**30, 1), "triton": triton.__version__, "card": card()}
    return known


KEPT_SCORES = dict(tuning.KEPT_SCORES)


def set_attention(name: str) -> None:
    """Choose the attention inside the loop: "materialised" keeps all scores, "auto" is the default, others none."""
    everything = dict.fromkeys(("cpu", "cuda"), 2**62)
    tuning.KEPT_SCORES = {"materialised": everything, "auto": dict(KEPT_SCORES)}.get(name, {})


# -- steps of training -------------------------------------------------------------------------------------------------


def configuration(name: str, tiny: bool) -> ModelConfig:
    config = preset(name).model
    if not tiny:
        return config
    full = name.endswith("-full")
    shape = dict(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=176 if full else 144,
    )
    if not full:
        shape |= dict(suffix_layers=2, sliding_window=64, mini_batch_size=32)
    return replace(config, shape)


def loop_functions(mode: str) -> LoopFunctions:
    """`mode`: "graphs" (compiled, CUDA graphs on a GPU), "compiled" (without them), "eager"."""
    if mode == "eager":
        return EAGER
    return compiled_functions(
        "cuda" if mode == "graphs" else "cpu"
    )  # the device only determines whether CUDA graphs are used


def make_step(
    *,
    preset: str,
    tiny: bool,
    device: str,
    dtype: str,
    mode: str,
    batch: int,
    context: int,
    optimizer: bool,
    checkpointing: str = "none",
    attention: str = "auto",
) -> Callable[[], float]:
    """A function that runs one training step on random tokens and returns the loss."""
    config = configuration(preset, tiny)
    with torch.device(device):
        model = Transformer(config, torch.Generator(device).manual_seed(0))
        tokens = torch.randint(config.vocab_size, (batch, context + 1))
    adam = make_optimizer(model, TrainConfig()) if optimizer else None
    functions = loop_functions(mode)

    def step() -> float:
        set_attention(attention)
        out = sequence_loss(
            model, tokens, activation_checkpointing=checkpointing, dtype=getattr(torch, dtype), functions=functions
        )
        out.loss.backward()
        loss = out.loss.item()
        if adam is not None:
            optimizer_step(model, adam, 1e-3, 1.0)
        else:
            model.zero_grad()
        return loss

    return step


def time_steps(variants: dict[str, Variant], rounds: int, warm_up: int) -> dict[str, Any]:
    """The seconds of every round and the first loss, by variant; the variants take turns."""
    result: dict[str, Any] = {}
    device = next(iter(variants.values()))["device"]
    steps = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, variant in variants.items():
            steps[name] = make_step(**variant)
            started = time.perf_counter()
            result[name] = {"loss": steps[name](), "first_step_seconds": time.perf_counter() - started, "seconds": []}
            for _ in range(warm_up):
                steps[name]()
        for _ in range(rounds):
            for name, step in steps.items():
                result[name]["seconds"].append(seconds(step, device))
    failed = [str(w.message) for w in caught if "without compilation" in str(w.message)]
    peak = torch.cuda.max_memory_reserved() / 2**30 if device == "cuda" else None
    return {"variants": result, "compilation_failed": failed, "peak_gib": peak}


def longest_context(variant: Variant, limit: int) -> dict[str, Any]:
    """Double the context while it fits; the longest one, and the peak memory at each."""
    tried: list[dict[str, Any]] = []
    device, reason = variant["device"], "limit"
    while variant["context"] <= limit:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            started = time.perf_counter()
            make_step(**variant)()
            spent = time.perf_counter() - started
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            reason = "out of memory"
            break
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
        tried.append({"context": variant["context"], "peak_gib": peak, "first_step_seconds": spent})
        if spent > TOO_LONG:
            reason = "time"
            break
        variant = {**variant, "context": 2 * variant["context"]}
    return {"longest": tried[-1]["context"] if tried else None, "ended_by": reason, "tried": tried}


# -- attention alone ---------------------------------------------------------------------------------------------------


def time_attention(device: str, tiny: bool, rounds: int) -> dict[str, Any]:
    """Shares of the measured rate of a matrix product, for each pass, by head dimension."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    own, cached, batch, heads = (32, 96, 1, 2) if tiny else (1024, 8192, 4, 16)
    side, window, repeats = (256 if tiny else 8192), cached, 5
    # Query i sees `window` keys, i + 1 of them from its own mini-batch.
    own_pairs = own * (own + 1) // 2
    cached_pairs = own * window - own_pairs
    products = {  # with cached and own keys: what the mathematics needs, what the kernels compute
        "forward": ((2, 2), (2, 2)),
        "inner backward": ((3, 5), (3, 7)),
        "backward": ((5, 5), (7, 7)),
        "double backward": ((10, 15), (13, 20)),
    }
    square = torch.randn(2, side, side, device=device, dtype=dtype)
    result: dict[str, Any] = {"shape": dict(batch=batch, heads=heads, queries=own, cached=cached, window=window)}
    result |= {"pairs": {"own": own_pairs, "cached": cached_pairs}, "products": products, "head_dims": []}
    for head_dim in (16, 32) if tiny else (64, 128):
        generator = torch.Generator(device).manual_seed(0)

        def random(length: int, head_dim: int = head_dim, generator: torch.Generator = generator) -> Tensor:
            shape = (batch, heads, length, head_dim)
            return torch.randn(shape, device=device, generator=generator).to(dtype)

        q, do, a, b, c = (random(own) for _ in range(5))
        k, v = (random(cached + own) for _ in range(2))
        how = dict(window=window, num_empty_slots=None, implementation="auto")
        o, lse = operators.attention_forward(q, k, v, **how)
        known = (q, k, v, o, lse, do, None)
        calls: dict[str, Callable[[], object]] = {
            "matrix": partial(torch.mm, square[0], square[1]),
            "forward": partial(operators.attention_forward, q, k, v, **how),
            "inner backward": partial(operators.attention_backward, *known, num_new_keys=own, **how),
            "backward": partial(operators.attention_backward, *known, num_new_keys=cached + own, **how),
            "double backward": partial(operators.attention_double_backward, *known, a, b, c, num_new_keys=own, **how),
        }

        def repeated(call: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                for _ in range(repeats):
                    call()

            return run

        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(3):
            for call in calls.values():
                call()
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(seconds(repeated(call), device) / repeats)
        rate = 2 * side**3 / statistics.median(times["matrix"])
        entry: dict[str, Any] = {"head_dim": head_dim, "matrix_tflops": rate / 1e12, "calls": {}}
        for name, (needed, executed) in products.items():
            spent = statistics.median(times[name])
            flops = [
                2 * head_dim * batch * heads * (with_cached * cached_pairs + with_own * own_pairs)
                for with_cached, with_own in (needed, executed)
            ]
            shares = [
                statistics.median(f / t / (2 * side**3 / m) for t, m in zip(times[name], times["matrix"], strict=True))
                for f in flops
            ]
            entry["calls"][name] = {"seconds": spent, "flops": flops[0], "tflops": flops[0] / spent / 1e12}
            entry["calls"][name] |= {"share": shares[0], "executed_share": shares[1]}
        result["head_dims"].append(entry)
    return result


# -- groups of rows: all work in processes of its own, since running out of memory leaves a process unusable ----------

WORK: dict[str, Callable[..., dict[str, Any]]] = {
    "time_steps": time_steps,
    "longest_context": longest_context,
    "time_attention": time_attention,
}


def in_process(work: str, timeout: float, **arguments: Any) -> dict[str, Any]:
    """WORK[work](**arguments) in a fresh process; {"failed": reason} if it ran out of memory or time, or crashed."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        job = json.dumps({"work": work, "arguments": arguments, "answer": str(answer)})
        # No CUDA graphs are captured there, so fragmentation can be avoided.
        extra = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if work == "longest_context" else {}
        command = [sys.executable, __file__, "--job", job]
        try:
            done = subprocess.run(command, timeout=timeout, env=os.environ | extra)
        except subprocess.TimeoutExpired:
            return {"failed": "time ran out"}
        if not answer.exists():
            return {"failed": "out of memory" if done.returncode == -9 else f"exit status {done.returncode}"}
        return json.loads(answer.read_text())


def do_job(text: str) -> None:
    job = json.loads(text)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # toy sizes: two threads would only wait for each other
    try:
        answer = WORK[job["work"]](**job["arguments"])
    except Exception as error:
        if not out_of_memory(error):
            raise
        answer = {"failed": "out of memory"}
    Path(job["answer"]).write_text(json.dumps(answer))


def together_or_alone(variants: dict[str, Variant], args: argparse.Namespace) -> dict[str, Any]:
    """Time the variants in turn, or each alone if they do not fit together, with ratios to the first."""
    timing = dict(rounds=args.rounds, warm_up=1 if args.tiny else 4)
    names = list(variants)
    run = {} if args.alone else in_process("time_steps", args.timeout, variants=variants, **timing)
    interleaved = "variants" in run
    notes = {} if interleaved or args.alone else {"together": run["failed"]}
    runs = dict.fromkeys(names, run)
    if not interleaved:
        runs = {n: in_process("time_steps", args.timeout, variants={n: variants[n]}, **timing) for n in names}
    times = {n: runs[n]["variants"][n]["seconds"] for n in names if "variants" in runs[n]}
    steps: dict[str, Any] = {}
    for name in names:
        if name not in times:
            steps[name] = {"failed": runs[name]["failed"]}
            continue
        of = runs[name]
        steps[name] = {"seconds": statistics.median(times[name]), **{k: of["variants"][name][k] for k in ("loss",)}}
        steps[name]["first_step_seconds"] = of["variants"][name]["first_step_seconds"]
        steps[name]["compilation_failed"] = of["compilation_failed"]
        if not interleaved:
            steps[name]["peak_gib"] = of["peak_gib"]
        if names[0] in times:
            pairs = list(zip(times[name], times[names[0]], strict=True))
            ratio = statistics.median(t / s for t, s in pairs)
            if not interleaved:
                ratio = statistics.median(times[name]) / statistics.median(times[names[0]])
            steps[name]["ratio"] = ratio
    return {"interleaved": interleaved, "notes": notes, "rounds": args.rounds, "steps": steps}


def base(args: argparse.Namespace, **fields: Any) -> Variant:
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    return {"tiny": args.tiny, "device": args.device, "dtype": dtype, "mode": args.mode, **fields}


def size_rows(name: str, args: argparse.Namespace) -> dict[str, Any]:
    batch, optimizer, target = SIZES[name]
    settings = base(args, batch=args.batch or batch, context=128 if args.tiny else args.context, optimizer=optimizer)
    variants = {"standard, full attention": {**settings, "preset": f"{name}-full"}}
    variants |= {
        f"meta, checkpointing {kind}": {**settings, "preset": name, "checkpointing": kind}
        for kind in ("none", "mini-batch")
    }
    return {"settings": settings, "target": target, **together_or_alone(variants, args)}


def materialised_rows(args: argparse.Namespace) -> dict[str, Any]:
    ours = "tiled" if args.device == "cpu" else "triton"
    context, limit = (64, 256) if args.tiny else (args.context, 2**20)
    settings = base(args, preset="125m", batch=1, context=context, optimizer=True, checkpointing="none")
    kinds = {"our kernel": {**settings, "attention": ours}, "materialised": {**settings, "attention": "materialised"}}
    result: dict[str, Any] = {"settings": settings}
    result |= together_or_alone(kinds, args)
    result["longest"] = {
        f"{name}, checkpointing {r}": in_process(
            "longest_context", args.timeout, variant={**kind, "mode": "eager", "checkpointing": r}, limit=limit
        )
        for name, kind in kinds.items()
        for r in ("none", "mini-batch")
    }
    return result


def attention_rows(args: argparse.Namespace) -> dict[str, Any]:
    return in_process("time_attention", args.timeout, device=args.device, tiny=args.tiny, rounds=args.rounds)


# -- the table ---------------------------------------------------------------------------------------------------------


def table(groups: dict[str, Any]) -> str:
    lines = ["| group | row | time | ratio or share | target | |", "|---|---|---|---|---|---|"]

    def add(group: str, row: str, spent: float | None, figure: str, target: str = "-", note: str = "") -> None:
        shown = "-" if spent is None else f"{spent:.3f} s" if spent > 0.1 else f"{1000 * spent:.3f} ms"
        lines.append(f"| {group} | {row} | {shown} | {figure} | {target} | {note} |")

    for group, rows in groups.items():
        if "failed" in rows:
            add(group, "-", None, "-", note=rows["failed"])
        for name, step in rows.get("steps", {}).items():
            target = f"<= {rows['target']}" if "target" in rows and name.startswith("meta") else "-"
            if "failed" in step:
                add(group, name, None, "-", target, "does not fit" if "memory" in step["failed"] else step["failed"])
                continue
            notes = [] if rows["interleaved"] else ["alone"]
            notes += ["not compiled"] if step["compilation_failed"] else []
            ratio = f"{step['ratio']:.2f}" if "ratio" in step else "-"
            add(group, name, step["seconds"], ratio, target, ", ".join(notes))
        for name, found in rows.get("longest", {}).items():
            longest = found.get("longest")
            words = f"{longest} tokens fit" if longest else "does not fit"
            if "failed" in found:
                words = found["failed"]
            elif found["ended_by"] != "out of memory":
                words += f" (ended by {found['ended_by']})"
            add(group, f"longest context: {name}", None, "-", note=words)
        for entry in rows.get("head_dims", []):
            for name, call in entry["calls"].items():
                target = f">= {TARGET_SHARE:.0%}" if name == "double backward" else "-"
                note = f"executed {call['executed_share']:.0%}; matrix rate {entry['matrix_tflops']:.2f} TFLOP/s"
                add(group, f"{name}, K = {entry['head_dim']}", call["seconds"], f"{call['share']:.0%}", target, note)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU, to try the script")
    parser.add_argument("--mode", choices=("graphs", "compiled", "eager"), help="default: graphs; with --tiny, eager")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=int, help="sequences per step (default: by the size)")
    parser.add_argument("--rounds", type=int, help="default: 11; with --tiny, 2")
    parser.add_argument("--alone", action="store_true", help="run each variant in a process of its own")
    parser.add_argument("--timeout", type=float, default=550, help="most seconds for each process")
    parser.add_argument("--out", type=Path, help="merge the numbers into this JSON file")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        do_job(args.job)
        return
    args.device = "cpu" if args.tiny else "cuda"
    args.mode = args.mode or ("eager" if args.tiny else "graphs")
    args.rounds = args.rounds or (2 if args.tiny else 11)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --tiny tries the script on a CPU")
    result: dict[str, Any] = {"seed": 0, "groups": {}}
    if args.out and args.out.exists():
        result = json.loads(args.out.read_text())
    special: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "double-backward": attention_rows,
        "materialised": materialised_rows,
    }
    for group in args.rows:
        started = time.perf_counter()
        rows = special[group](args) if group in special else size_rows(group, args)
        result["groups"][group] = {
            "machine": machine_and_card(args.device),
            "wall_seconds": time.perf_counter() - started,
            **rows,
        }
        if args.out:
            args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result["groups"]))


if __name__ == "__main__":
    main()
