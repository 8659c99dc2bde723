"""Checkpoints: everything that a run needs to continue as if it had never stopped.

The checkpoint RUN/checkpoints/step-00000100 is a model folder with two or three more files: optimizer.safetensors,
AdamW's moments by the name of what is trained; lora.safetensors, if there are low-rank additions, with these and the
matrices that they are added to, of which the model has the sums; and trainer.json, the state of the trainer, its
configuration and the digests of all other files and of itself. It is written under a temporary name and then renamed,
so it is complete or absent.

Several processes write the same, but for the moments, two thirds of it: `torch.distributed.checkpoint` writes each
process's part to a file of its own, optimizer/shard-00001-..., and reads them into any other number of processes. These
files are safetensors, too: its usual format is not used, since it is a pickle, which could run code. The model is
gathered by rank 0, tensor by tensor, so that every checkpoint remains a model folder.
"""

import functools
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
from ttt_e2e.training.distributed import DistributedContext
from ttt_e2e.training.parallelize import ParallelModel

FORMAT = "ttt-e2e checkpoint"
VERSION = 3
OPTIMIZER, SHARDS = "optimizer.safetensors", "optimizer"
LORA, TRAINER = "lora.safetensors", "trainer.json"
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
    run: Path, parallel: ParallelModel, optimizer: torch.optim.Optimizer, state: TrainerState, config: RunConfig
) -> Path:
    """Write the checkpoint of `state.step` in the folder `run`, then remove all but the latest `keep_checkpoints`.

    The tokenizer of the run is copied into it. Returns its folder. On a full disk, the existing checkpoints are kept.
    With several processes, all of them must call it, and they must share the disk.
    """
    folder, dist = run / "checkpoints" / f"step-{state.step:08d}", parallel.dist
    model = parallel.gather()
    with ExitStack() as stack:
        part = None
        with dist.one_error():
            if model is not None:
                part = stack.enter_context(atomic_path(folder))
                part.mkdir()
                _write_model(part, run, model, state)
        part = dist.gather(part)[0]
        assert part is not None
        _save_moments(part, parallel, optimizer)
        files = dist.gather(_digests(part, _own_files(part, dist)))
        with dist.one_error():
            if dist.is_rank0:
                content = {
                    "format": FORMAT,
                    "version": VERSION,
                    "progress": asdict(state),
                    "config": to_dict(config),
                    "files": functools.reduce(operator.or_, files),
                }
                (part / TRAINER).write_text(json.dumps(with_digest(content), indent=2) + "\n", encoding="utf-8")
            stack.close()
            if dist.is_rank0:
                older = [other for other in list_checkpoints(run) if other.name < folder.name]
                for other in older[config.train.keep_checkpoints - 1 :]:
                    remove_atomically(other)
    return folder


def load_model_state(folder: Path, model: Transformer, config: TrainConfig) -> TrainerState:
    """Fill a plain `model` from a checkpoint and make it trainable by `config`, as it was.

    Returns how far the run is. Raises UserError if the checkpoint is damaged or of another model.
    """
    progress = check_checkpoint(folder)["progress"]
    read_weights(model, folder)
    set_trainable(model, config)
    if factors := lora_tensors(model):
        stored, _ = load_safetensors(folder / LORA, _shapes(factors))
        for name, tensor in factors.items():
            tensor.data = stored[name].to(tensor.device)  # in the dtype that it was held in
    return TrainerState(**progress)


def load_optimizer_state(
    folder: Path, parallel: ParallelModel, optimizer: torch.optim.Optimizer, progress: TrainerState
) -> None:
    """Give `optimizer` the moments in a checkpoint that `load_model_state` has checked."""
    weights, dist = trained_weights(parallel.model), parallel.dist
    shards = folder / SHARDS
    if dist.world_size == 1 and not shards.is_dir():
        shapes = _shapes(weights)
        expected = {f"{moment}.{name}": shapes[name] for name in weights for moment in _MOMENTS}
        moments, _ = load_safetensors(folder / OPTIMIZER, expected)
    else:
        import torch.distributed.checkpoint as dcp

        moments = {
            f"{moment}.{name}": torch.zeros_like(w.detach()) for name, w in weights.items() for moment in _MOMENTS
        }
        reader = dcp.HuggingFaceStorageReader(str(shards if shards.is_dir() else folder))
        with _raised_alike(dist):
            dcp.load(moments, storage_reader=reader, process_group=dist.control, no_dist=dist.world_size == 1)
    for name, weight in weights.items():
        optimizer.state[weight] = {
            "step": torch.tensor(float(progress.step), device=weight.device),
            **{moment: moments[f"{moment}.{name}"].to(weight.device) for moment in _MOMENTS},
        }


def _write_model(folder: Path, run: Path, model: Transformer, state: TrainerState) -> None:
    """Write the files of the model, and the tensors that its low-rank additions are made of."""
    tokenizer_json = run / TOKENIZER if (run / TOKENIZER).is_file() else None
    write_model_files(model, folder, tokenizer_json, notes={"step": state.step, "tokens": state.tokens})
    if factors := lora_tensors(model):
        save_safetensors({name: w.detach().to("cpu") for name, w in factors.items()}, folder / LORA, {"format": "pt"})


def _save_moments(folder: Path, parallel: ParallelModel, optimizer: torch.optim.Optimizer) -> None:
    """Write AdamW's moments: in one file, or each process its part in a file of its own."""
    dist = parallel.dist
    moments = {
        # A weight that no loss has depended on yet has no moments, such as a memory's in texts of one mini-batch.
        f"{moment}.{name}": optimizer.state[weight].get(moment, torch.zeros_like(weight.detach()))
        for name, weight in trained_weights(parallel.model).items()
        for moment in _MOMENTS
    }
    if dist.world_size == 1:
        cpu = {name: moment.to("cpu") for name, moment in moments.items()}
        save_safetensors(cpu, folder / OPTIMIZER, {"format": "pt"})
        return
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True)
    with _raised_alike(dist):
        dcp.save(moments, storage_writer=writer, process_group=dist.control)


@contextmanager
def _raised_alike(dist: DistributedContext) -> Iterator[None]:
    """`one_error` for a function of `torch.distributed.checkpoint`, which raises any process's errors in all."""
    from torch.distributed.checkpoint.api import CheckpointException

    with dist.one_error():
        try:
            yield
        except CheckpointException as error:
            cause = error.failures[min(error.failures)][0]
            raise cause if isinstance(cause, OSError) else error from error


def _own_files(folder: Path, dist: DistributedContext) -> list[str]:
    """The names of the files that this process has written: its part of the moments, and on rank 0 all but moments."""
    files = [*(folder / SHARDS).glob(f"shard-{dist.rank + 1:05d}-*")]
    if dist.is_rank0:
        files += [file for file in folder.iterdir() if file.is_file()]
    return [str(file.relative_to(folder)) for file in files]


def _digests(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Size and digest of each file in `folder`, as `check_checkpoint` wants them."""
    files = {name: folder / name for name in names}
    return {name: {"bytes": file.stat().st_size, "sha256": file_digest(file)} for name, file in files.items()}


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
