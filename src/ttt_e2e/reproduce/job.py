"""One job in a process of its own: `python -m ttt_e2e.reproduce.job FOLDER` does what FOLDER/job.json says.

Exit codes: 0, result.json is written (it may say that the job "failed": it diverged, and would again); 130,
interrupted, the next call continues; anything else, something was in the way (no disk, no memory), the next call tries
again.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from ttt_e2e.config.parse import from_dict
from ttt_e2e.config.schema import ModelConfig, RunConfig, replace
from ttt_e2e.convert.from_standard import warm_start
from ttt_e2e.errors import INTERRUPTED, Divergence, UserError
from ttt_e2e.files import read_json, with_digest, write_text
from ttt_e2e.hardware import choose_device, keep_freed_memory
from ttt_e2e.model.checkpoint import TOKENIZER, load_config, load_transformer, save_model
from ttt_e2e.reproduce import timing
from ttt_e2e.reproduce.held_out import evaluate_books
from ttt_e2e.reproduce.ngram import evaluate_floor
from ttt_e2e.reproduce.plan import JOB, RESULT, RUN
from ttt_e2e.reproduce.start import in_shape_of
from ttt_e2e.training.checkpoint import check_checkpoint, list_checkpoints
from ttt_e2e.training.metrics import read_metrics
from ttt_e2e.training.run_folder import MODEL
from ttt_e2e.training.trainer import train

_CONVERTED = "start"  # in the job's folder: the model to start from, in the shape that is trained


def main(folder: Path) -> int:
    """Do the job in `folder`; returns the exit code."""
    settings = read_json(folder / JOB)
    started = time.perf_counter()
    keep_freed_memory()
    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    result: dict[str, Any] | None
    try:
        work = {"evaluate": _evaluate, "ngram": _evaluate_floor, "latency": _measure_latency}
        result = work.get(settings["kind"], _train)(folder, settings)
    except Divergence as error:
        result = {"failed": " ".join(str(error).split())}
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    if result is None:
        return INTERRUPTED
    if _is_rank0():
        result = {"seconds": time.perf_counter() - started} | result
        write_text(folder / RESULT, json.dumps(with_digest(result), allow_nan=False) + "\n")
        # No other job needs checkpoints, converted models, or the model of a sweep.
        unneeded = [folder / _CONVERTED, folder / RUN / "checkpoints"]
        if settings["kind"] == "sweep":
            unneeded.append(folder / RUN / MODEL)
        for path in unneeded:
            shutil.rmtree(path, ignore_errors=True)
    return 0


def stop_with_parent() -> None:
    """Stop, as on SIGTERM, when standard input ends: when the process that started this one is gone."""

    def watch() -> None:
        while sys.stdin.buffer.read(1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _train(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    run = folder / RUN
    config = from_dict(RunConfig, settings["config"], str(folder / JOB))
    summary = train(
        config,
        Path(settings["data"]),
        run,
        resume=True,
        start_from=None if settings["start_from"] is None else _start(folder, Path(settings["start_from"]), config),
        cache=None if settings["cache"] is None else Path(settings["cache"]),
        device=settings["device"],
        progress=False,
        threads=settings["threads"],
        compile=settings["compile"],
    )
    if summary.interrupted:
        return None
    losses = [line["loss"] for line in read_metrics(run) if "loss" in line]
    if not losses:
        raise UserError(f"The metrics in {run} have no loss of training; remove the folder to train again.")
    last = losses[-max(1, len(losses) // 4) :]
    return {
        "loss": sum(last) / len(last),  # over the last quarter of the steps
        "tokens": summary.tokens,
        "seconds": summary.seconds,
        "lr": config.train.lr,
        # The loader's last position: with the digest of the data, it says which tokens were read.
        "loader": check_checkpoint(list_checkpoints(run)[0])["progress"]["loader"],
    }


def _start(folder: Path, model: Path, config: RunConfig) -> Path:
    """The model to start from: `model` if it has the shape that is trained, else a copy converted to that shape."""
    if replace(load_config(model), {"rope_theta": config.model.rope_theta}) == config.model:
        return model
    converted = folder / _CONVERTED
    while not converted.is_dir():
        if _is_rank0():
            source = load_transformer(model)
            changed = in_shape_of if source.suffix else warm_start
            save_model(changed(source, config.model), converted, model / TOKENIZER)
        else:
            time.sleep(0.2)
    return converted


def _is_rank0() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _evaluate(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    device = choose_device(settings["device"])
    rounds = settings["becomes"] is None  # a model that becomes another one is not yet the one that reads
    products = getattr(torch, settings["dtype"]) if rounds else torch.float32
    model = load_transformer(Path(settings["model"]), device, products)
    if settings["becomes"] is not None:
        becomes = from_dict(ModelConfig, settings["becomes"], str(folder / JOB))
        model = warm_start(model, replace(becomes, {"rope_theta": model.config.rope_theta}))
    return evaluate_books(model, settings)


def _evaluate_floor(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    return evaluate_floor(settings)


def _measure_latency(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    models = {name: from_dict(ModelConfig, model, str(folder / JOB)) for name, model in settings["models"].items()}
    how = {"seconds": settings["seconds"], "device": choose_device(settings["device"]), "dtype": settings["dtype"]}
    rows = [row for context in settings["contexts"] for row in timing.measure(models, context, train=False, **how)]
    return {"rows": rows}


if __name__ == "__main__":
    stop_with_parent()
    try:
        sys.exit(main(Path(sys.argv[1])))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
