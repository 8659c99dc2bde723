"""Checkpoints: everything that a run needs to go on as if it had never stopped.

A checkpoint RUN/checkpoints/step-00000100 is a model folder with two more files: optimizer.safetensors
(AdamW's moments by parameter name) and trainer.json (how far the run is, its configuration, and the digest of
every other file). It is written beside its place and renamed into it, so that it is whole or not there.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ttt_e2e.config.parse import to_dict
from ttt_e2e.config.schema import RunConfig
from ttt_e2e.errors import UserError
from ttt_e2e.files import atomic_path
from ttt_e2e.model.checkpoint import (
    load_safetensors,
    read_json,
    read_weights,
    save_safetensors,
    write_model_files,
)
from ttt_e2e.model.transformer import Transformer

FORMAT = "ttt-e2e checkpoint"
VERSION = 2
OPTIMIZER, TRAINER = "optimizer.safetensors", "trainer.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """How far a run is: finished steps, tokens read, seconds spent, and where the data loader stands."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loader: dict[str, Any] = dataclasses.field(default_factory=dict)


def save_checkpoint(
    run: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: RunConfig,
    tokenizer_json: Path | None,
) -> Path:
    """Write the checkpoint of `progress.step`, then remove those beyond `keep_checkpoints`; returns its folder.

    Raises UserError if the disk is full; what was there before is then still there.
    """
    folder = run / "checkpoints" / f"step-{progress.step:08d}"
    with atomic_path(folder) as part:
        part.mkdir()
        write_model_files(model, part, tokenizer_json, notes={"step": progress.step, "tokens": progress.tokens})
        moments = {
            # A weight that no loss has depended on yet has none: a memory's step in texts of one mini-batch.
            f"{moment}.{name}": optimizer.state[weight].get(moment, torch.zeros_like(weight)).to("cpu")
            for name, weight in model.named_parameters()
            for moment in _MOMENTS
        }
        save_safetensors(moments, part / OPTIMIZER, {"format": "pt"})
        content = {
            "format": FORMAT,
            "version": VERSION,
            "progress": dataclasses.asdict(progress),
            "config": to_dict(config),
            "files": {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in part.iterdir()},
        }
        (part / TRAINER).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    older = [other for other in checkpoints(run) if other.name < folder.name]
    for other in older[config.train.keep_checkpoints - 1 :]:
        hidden = other.with_name(f".{other.name}.old")
        other.rename(hidden)  # so that nobody meets a checkpoint of which half is removed
        shutil.rmtree(hidden)
    return folder


def load_checkpoint(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> Progress:
    """Fill `model` and `optimizer` from `folder`. Raises UserError if that is not whole, or another's."""
    content = check_checkpoint(folder)
    read_weights(model, folder)
    shapes = {
        f"{moment}.{name}": tuple(weight.shape) for name, weight in model.named_parameters() for moment in _MOMENTS
    }
    moments, _ = load_safetensors(folder / OPTIMIZER, shapes)
    progress = Progress(**content["progress"])
    for name, weight in model.named_parameters():
        optimizer.state[weight] = {
            "step": torch.tensor(float(progress.step), device=weight.device),
            **{moment: moments[f"{moment}.{name}"].to(weight.device) for moment in _MOMENTS},
        }
    return progress


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """What trainer.json in `folder` says, if every file is there and unaltered; else UserError."""
    content = read_json(folder / TRAINER)
    if content.get("format") != FORMAT:
        raise UserError(f"{folder} is not a checkpoint of ttt-e2e; give a folder that its training has written.")
    if content.get("version") != VERSION:
        raise UserError(
            f"{folder} has checkpoint format {content.get('version')!r}, this version of ttt-e2e reads {VERSION}; "
            "update ttt-e2e to read it."
        )
    for name, expected in content["files"].items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"The checkpoint {folder} is not whole: {name} is missing.")
        if file.stat().st_size != expected["bytes"]:
            raise UserError(
                f"The checkpoint {folder} is not whole: {name} has {file.stat().st_size} of {expected['bytes']} bytes."
            )
        if _sha256(file) != expected["sha256"]:
            raise UserError(f"The checkpoint {folder} was altered: the digest of {name} does not fit.")
    return content


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of `run`, the newest first."""
    return sorted((run / "checkpoints").glob("step-????????"), reverse=True)


def latest(run: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest whole checkpoint of `run`, None if there is none at all; `say` hears of what is passed over.

    Raises UserError if there are checkpoints, but not one of them is whole.
    """
    folders = checkpoints(run)
    for folder in folders:
        try:
            check_checkpoint(folder)
        except UserError as error:
            say(f"{error} Looking for an earlier one.")
        else:
            return folder
    if folders:
        raise UserError(f"No checkpoint in {run / 'checkpoints'} is whole; start anew in another folder.")
    return None


def remove_leftovers(run: Path) -> None:
    """Remove what a run that was killed while saving has left half-written."""
    for left in [*(run / "checkpoints").glob(".step-*"), *run.glob(".*.part"), *run.glob(".*.old")]:
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
