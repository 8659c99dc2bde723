"""Checkpoints: everything that a run needs to continue as if it had never stopped.

The checkpoint RUN/checkpoints/step-00000100 is a model folder with two or three more files: optimizer.safetensors,
AdamW's moments by the name of what is trained; lora.safetensors, if there are low-rank additions, with these and the
matrices that they are added to, of which the model has the sums; and trainer.json, the state of the trainer, its
configuration and the digests of all other files and of itself. It is written under a temporary name and then renamed,
so it is complete or absent.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttt_e2e.config.parse import to_dict
from ttt_e2e.config.schema import RunConfig, TrainConfig
from ttt_e2e.errors import UserError
from ttt_e2e.files import atomic_path, check_file, file_digest, read_verified_json, remove_atomically, with_digest
from ttt_e2e.model.checkpoint import TOKENIZER, load_safetensors, read_weights, save_safetensors, write_model_files
from ttt_e2e.model.trainable import lora_tensors, set_trainable, trained_weights
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.training.optimizer import make_optimizer

FORMAT = "ttt-e2e checkpoint"
VERSION = 3
OPTIMIZER, LORA, TRAINER = "optimizer.safetensors", "lora.safetensors", "trainer.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainerState:
    """How far a run is."""

    step: int = 0
    """Finished optimiser steps."""
    tokens: int = 0
    """Tokens that were trained on."""
    seconds: float = 0.0
    """Time spent on them."""
    loader: dict[str, Any] = field(default_factory=dict)
    """Position in the data, as `SequenceLoader.state` returns it."""
    metrics_lines: int = 0
    """Lines of metrics so far; 0 if that is not known."""


def save_checkpoint(
    run: Path, model: Transformer, optimizer: torch.optim.Optimizer, state: TrainerState, config: RunConfig
) -> Path:
    """Write the checkpoint of `state.step` in the folder `run`, then remove all but the latest `keep_checkpoints`.

    The tokenizer of the run is copied into it. Returns its folder. On a full disk, the existing checkpoints are kept.
    """
    folder = run / "checkpoints" / f"step-{state.step:08d}"
    tokenizer_json = run / TOKENIZER if (run / TOKENIZER).is_file() else None
    with atomic_path(folder) as part:
        part.mkdir()
        write_model_files(model, part, tokenizer_json, notes={"step": state.step, "tokens": state.tokens})
        moments = {
            # A weight that no loss has depended on yet has no moments, such as a memory's in texts of one mini-batch.
            f"{moment}.{name}": optimizer.state[weight].get(moment, torch.zeros_like(weight)).to("cpu")
            for name, weight in trained_weights(model).items()
            for moment in _MOMENTS
        }
        save_safetensors(moments, part / OPTIMIZER, {"format": "pt"})
        if factors := lora_tensors(model):
            save_safetensors({name: w.detach().to("cpu") for name, w in factors.items()}, part / LORA, {"format": "pt"})
        content = {
            "format": FORMAT,
            "version": VERSION,
            "progress": asdict(state),
            "config": to_dict(config),
            "files": {
                file.name: {"bytes": file.stat().st_size, "sha256": file_digest(file)} for file in part.iterdir()
            },
        }
        (part / TRAINER).write_text(json.dumps(with_digest(content), indent=2) + "\n", encoding="utf-8")
    older = [other for other in list_checkpoints(run) if other.name < folder.name]
    for other in older[config.train.keep_checkpoints - 1 :]:
        remove_atomically(other)
    return folder


def load_checkpoint(
    folder: Path, model: Transformer, config: TrainConfig
) -> tuple[torch.optim.Optimizer, TrainerState]:
    """Fill a plain `model` from a checkpoint and make it trainable by `config`, as it was.

    Returns its optimizer, and how far the run is. Raises UserError if the checkpoint is damaged or of another model.
    """
    progress = check_checkpoint(folder)["progress"]
    read_weights(model, folder)
    set_trainable(model, config)
    if factors := lora_tensors(model):
        stored, _ = load_safetensors(folder / LORA, _shapes(factors))
        for name, tensor in factors.items():
            tensor.data = stored[name].to(tensor.device)  # in the dtype that it was held in
    optimizer = make_optimizer(model, config)
    weights = trained_weights(model)
    shapes = _shapes(weights)
    moments, _ = load_safetensors(
        folder / OPTIMIZER, {f"{moment}.{name}": shapes[name] for name in weights for moment in _MOMENTS}
    )
    for name, weight in weights.items():
        optimizer.state[weight] = {
            "step": torch.tensor(float(progress["step"]), device=weight.device),
            **{moment: moments[f"{moment}.{name}"].to(weight.device) for moment in _MOMENTS},
        }
    return optimizer, TrainerState(**progress)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """The content of trainer.json; raises UserError unless all files of the checkpoint are there and unaltered."""
    remedy = "finish the run with the version that wrote it, or start another run"
    content = read_verified_json(folder / TRAINER, FORMAT, VERSION, remedy)
    for name, expected in content["files"].items():
        check_file(folder / name, expected["bytes"], expected["sha256"], "continue from another checkpoint")
    return content


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of `run`, the newest first."""
    return sorted((run / "checkpoints").glob("step-????????"), reverse=True)


def latest_checkpoint(run: Path, log: Callable[[str], None] = print) -> Path | None:
    """The newest intact checkpoint of `run`, None if it has none at all; `log` is told why others are skipped."""
    folders = list_checkpoints(run)
    for folder in folders:
        try:
            check_checkpoint(folder)
            return folder
        except UserError as error:
            log(f"{error} Looking for an earlier one.")
    if folders:
        raise UserError(f"No checkpoint in {run / 'checkpoints'} is intact; start again in another folder.")
    return None
