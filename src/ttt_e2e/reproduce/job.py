"""One job in a process of its own: `python -m ttt_e2e.reproduce.job FOLDER` does what FOLDER/job.json says.

Exit codes: 0, result.json stands (it may say that the job "failed": it diverged, and would again); 130, interrupted,
the next call goes on; anything else, something was in the way (no disk, no memory), and the next call tries again.
"""

import dataclasses
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from ttt_e2e.config.parse import from_dict
from ttt_e2e.config.schema import ModelConfig, RunConfig
from ttt_e2e.convert.from_standard import warm_start
from ttt_e2e.errors import INTERRUPTED, Divergence, UserError
from ttt_e2e.files import write_text
from ttt_e2e.inner_loop.step import sequence_loss
from ttt_e2e.model.checkpoint import TOKENIZER, load_config, load_model, read_json, save_model
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.reproduce import evaluate
from ttt_e2e.reproduce.plan import RESULT, RUN
from ttt_e2e.training.checkpoint import TRAINER, checkpoints
from ttt_e2e.training.metrics import read_metrics
from ttt_e2e.training.parallelize import choose_device
from ttt_e2e.training.trainer import MODEL, train

JOB = "job.json"
_START = "start"
_TAIL = 4  # a training loss is the mean over the last one in so many steps
_MEASURE_SECONDS = 1.0
_WARM_UP = 128


def main(folder: Path) -> int:
    """Do the job in `folder`; returns the exit code."""
    spec = read_json(folder / JOB)
    started = time.perf_counter()
    if spec["threads"] is not None:
        torch.set_num_threads(spec["threads"])
    result: dict[str, Any] | None
    try:
        result = _KINDS[spec["kind"]](folder, spec)
    except Divergence as error:
        result = {"failed": " ".join(str(error).split())}
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    if result is None:
        return INTERRUPTED
    if os.environ.get("RANK", "0") == "0":
        result = {"seconds": time.perf_counter() - started} | result
        write_text(folder / RESULT, json.dumps(result, allow_nan=False) + "\n")
        _clean(folder, spec["kind"])
    return 0


def end_with_parent() -> None:
    """Stop, as on SIGTERM, when standard input ends: when whoever started this process is gone."""

    def watch() -> None:
        while sys.stdin.buffer.read(1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _train(folder: Path, spec: dict[str, Any]) -> dict[str, Any] | None:
    run = folder / RUN
    config = from_dict(RunConfig, spec["config"], str(folder / JOB))
    start_from = None if spec["start_from"] is None else _start(folder, Path(spec["start_from"]), config)
    summary = train(
        config,
        Path(spec["data"]),
        run,
        resume=True,
        start_from=start_from,
        device=spec["device"],
        progress=False,
        threads=spec["threads"],
        compile=spec["compile"],
    )
    if summary.interrupted:
        return None
    losses = [line["loss"] for line in read_metrics(run) if "loss" in line]
    last = losses[-max(1, len(losses) // _TAIL) :]
    return {
        "loss": sum(last) / len(last),
        "tokens": summary.tokens,
        "seconds": summary.seconds,
        "lr": config.train.lr,
        # Where the loader stands at the end: with its seed and the data's digest, that is which tokens were read.
        "read": read_json(checkpoints(run)[0] / TRAINER)["progress"]["loader"],
    }


def _start(folder: Path, model: Path, config: RunConfig) -> Path:
    """The model to start from, in the shape that is to be trained: itself if it has it, else a copy that gets it."""
    theirs = load_config(model)
    if dataclasses.replace(theirs, rope_theta=config.model.rope_theta) == config.model:
        return model
    converted = folder / _START
    if os.environ.get("RANK", "0") != "0":
        while not converted.is_dir():  # the first process makes it
            time.sleep(0.2)
    if not converted.is_dir():
        save_model(warm_start(load_model(model), config.model), converted, model / TOKENIZER)
    return converted


def _clean(folder: Path, kind: str) -> None:
    """Remove what nothing will ask for again: checkpoints, converted models, and those of a sweep."""
    shutil.rmtree(folder / _START, ignore_errors=True)
    shutil.rmtree(folder / RUN / "checkpoints", ignore_errors=True)
    if kind == "sweep":
        shutil.rmtree(folder / RUN / MODEL, ignore_errors=True)


def _evaluate(folder: Path, spec: dict[str, Any]) -> dict[str, Any]:
    device = choose_device(spec["device"])
    model = load_model(Path(spec["model"]), device)
    if spec["becomes"] is not None:
        becomes = from_dict(ModelConfig, spec["becomes"], str(folder / JOB))
        model = warm_start(model, dataclasses.replace(becomes, rope_theta=model.config.rope_theta))
    return evaluate.evaluate(model, Path(spec["books"]), spec, getattr(torch, spec["dtype"]))


def _estimate(folder: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds per token of training and of evaluation at the shortest context and the longest; bytes at most."""
    device = choose_device(spec["device"])
    speeds = []
    for values in spec["configs"]:
        config = from_dict(RunConfig, values, str(folder / JOB))
        context = config.train.context
        model = Transformer(config.model).to(device)
        rows = config.train.batch // config.train.accumulate // spec["processes"]
        trains = _seconds_per_token(model, config, max(1, rows), learns=True)
        reads = _seconds_per_token(model, config, max(1, spec["batch_tokens"] // context), learns=False)
        speeds.append({"context": context, "train": trains, "read": reads})
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"speeds": speeds, "bytes": memory}


def _seconds_per_token(model: Transformer, config: RunConfig, rows: int, learns: bool) -> float:
    """Of a training step, or (if not `learns`) of an evaluation, on random tokens."""
    plan, device = config.train, model.embedding.device
    tokens_BT1 = torch.randint(config.model.vocab_size, (rows, plan.context + 1), device=device)

    def seconds(tokens_BT1: torch.Tensor) -> float:
        started = time.perf_counter()
        with torch.set_grad_enabled(learns):
            loss = sequence_loss(
                model,
                tokens_BT1,
                learn=plan.train_mode == "meta" or not learns,
                activation_checkpointing=plan.activation_checkpointing,
                dtype=getattr(torch, plan.dtype),
            ).loss
        if learns:
            loss.backward()
            model.zero_grad()
        float(loss.detach())  # waits for a GPU
        return time.perf_counter() - started

    seconds(tokens_BT1[:1, :_WARM_UP])  # what is loaded at the first call is not counted
    spent: list[float] = []
    while sum(spent) < _MEASURE_SECONDS:
        spent.append(seconds(tokens_BT1))
    return min(spent) / (rows * plan.context)


def _latency(folder: Path, spec: dict[str, Any]) -> dict[str, Any]:
    from ttt_e2e.reproduce.timing import measure

    configs = {name: from_dict(ModelConfig, values, str(folder / JOB)) for name, values in spec["configs"].items()}
    rows = measure(
        configs,
        spec["contexts"],
        seconds=spec["seconds"],
        threads=spec["threads"],
        device=spec["device"],
        dtype=spec["dtype"],
        train=False,
        progress=False,
    )
    return {"rows": [row._asdict() for row in rows]}


_KINDS = {
    "sweep": _train,
    "pretrain": _train,
    "extend": _train,
    "evaluate": _evaluate,
    "estimate": _estimate,
    "latency": _latency,
}


if __name__ == "__main__":
    end_with_parent()
    try:
        sys.exit(main(Path(sys.argv[1])))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
