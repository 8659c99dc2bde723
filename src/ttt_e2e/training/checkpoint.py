"""Checkpoints: everything that a run needs to continue as if it had never stopped.

The checkpoint RUN/checkpoints/step-00000100 is a model folder with two or three more files: optimizer.safetensors,
AdamW's moments by the name of what is trained; lora.safetensors, if there are low-rank additions, with these and the
matrices that they are added to, of which the model has the sums; and trainer.json, the state of the trainer, its
configuration and the digests of all other files and of itself. It is written under a temporary name and then renamed,
so it is complete or absent.

Several processes write the same, but for the moments, two thirds of it: each process writes its part to a file of its
own, optimizer/shard-00001-..., as `torch.distributed.checkpoint` plans it, which also reads them into any other number
of processes. These files are safetensors, too: its usual format is not used, since it is a pickle, which could run
code. The model is gathered by rank 0, tensor by tensor, so that every checkpoint remains a model folder.

Training does not wait for the disk. `CheckpointSaver` copies everything to the CPU's memory, and a thread writes the
copies meanwhile.
"""

import json
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from ttt_e2e.config.parse import to_dict
from ttt_e2e.config.schema import RunConfig, TrainConfig
from ttt_e2e.errors import UserError
from ttt_e2e.files import (
    atomic_path,
    check_file,
    file_digest,
    read_verified_json,
    remove_atomically,
    sync,
    with_digest,
)
from ttt_e2e.model.checkpoint import TOKENIZER, load_safetensors, read_weights, save_safetensors, write_model_files
from ttt_e2e.model.trainable import lora_tensors, set_trainable, trained_weights
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.training.distributed import DistributedContext
from ttt_e2e.training.parallelize import ParallelModel

if TYPE_CHECKING:
    from torch.distributed.checkpoint import SavePlan

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


class CheckpointSaver:
    """Writes the checkpoints of a run while it is trained, one at a time.

    Every process has a thread that writes files and nothing else: all that the processes tell each other they say in
    `save`, `advance` and `wait`, which all of them must call together. They must share the disk.

    A checkpoint is complete once `wait` has returned, or a later `save`, or some call of `advance`; what goes wrong
    until then is raised there. Leaving the block with an exception, a single process still completes what it has begun;
    of several, some may have ended, and it is dropped.
    """

    def __init__(self, run: Path, parallel: ParallelModel, optimizer: torch.optim.Optimizer, config: RunConfig) -> None:
        self._run, self._parallel, self._optimizer, self._config = run, parallel, optimizer, config
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Generator[Future[Any]] | None = None
        self._job: Future[Any] | None = None  # what the thread does
        self._plan: SavePlan | None = None  # the same for every checkpoint

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        try:
            if kind is None:
                self.wait()
            elif self._parallel.dist.world_size == 1:
                with suppress(UserError, OSError):  # the first error is the one to tell
                    self.wait()
        finally:
            self._thread.shutdown()
            if self._saving is not None:
                self._saving.close()

    @property
    def is_busy(self) -> bool:
        """Whether this process is writing."""
        return self._job is not None and not self._job.done()

    def save(self, state: TrainerState, before: Callable[[], object] = lambda: None) -> None:
        """Begin to write the checkpoint of `state.step`, once the last one is complete.

        When this returns everything has been copied: weights and moments may change. `before` is called by the thread
        of rank 0, before it writes. After the checkpoint, all but the latest `keep_checkpoints` are removed. On a full
        disk, the existing checkpoints are kept.
        """
        self.wait()
        self._saving = self._save(state, before)
        self.advance()

    def advance(self) -> None:
        """Take the next step of writing a checkpoint, if one has begun.

        It waits for the files that are being written, so call it when no process `is_busy`. Raises UserError in one
        process, and SystemExit in all others, if the checkpoint cannot be written.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            self._job = next(saving, None)
            self._saving = saving if self._job is not None else None

    def wait(self) -> None:
        """Return when nothing is left to write. Raises as `advance` does."""
        while self._saving is not None:
            self.advance()

    def _save(self, state: TrainerState, before: Callable[[], object]) -> Generator[Future[Any]]:
        """Write a checkpoint in steps. Each yields the thread's job; the next begins when all processes did theirs."""
        folder, dist = self._run / "checkpoints" / f"step-{state.step:08d}", self._parallel.dist
        with ExitStack() as stack:
            part = None
            with dist.one_error():
                if dist.is_rank0:
                    part = stack.enter_context(atomic_path(folder))
                    (part / SHARDS if dist.world_size > 1 else part).mkdir(parents=True)
            part = dist.gather(part)[0]
            assert part is not None
            job: Future[Any] = self._thread.submit(self._write_own_files(part, state, before))
            yield job
            files: dict[str, Any] = {}
            with dist.one_error():
                for written in dist.gather(_outcome(job)):
                    if isinstance(written, Exception):
                        raise written  # in all processes, so that it is rank 0 that says which checkpoint it was
                    files |= written
            if dist.is_rank0:
                job = self._thread.submit(self._complete, stack.pop_all(), part, folder.name, state, files)
            yield job
            with dist.one_error():
                job.result()

    def _write_own_files(self, part: Path, state: TrainerState, before: Callable[[], object]) -> Callable[[], dict]:
        """Copy what this process has to write; returns the function that writes it and returns the files' digests."""
        dist, run, moments = self._parallel.dist, self._run, self._staged_moments()
        model = self._parallel.gather()
        name, note = OPTIMIZER, {"format": "pt"}
        if dist.world_size > 1:
            # As `HuggingFaceStorageWriter` names it, which would hold up training while it copies all to one string.
            name = f"{SHARDS}/shard-{dist.rank + 1:05d}-model-00001-of-00001.safetensors"
            moments, offsets = self._own_shards(moments)
            note = {"DCP_SHARDING_INFO": json.dumps(offsets)}

        def write() -> dict[str, Any]:
            if model is not None:
                before()
                _write_model(part, run, model, state)
            if moments:
                save_safetensors(moments, part / name, note)
            files = [path.name for path in part.iterdir() if path.is_file()] if model is not None else []
            files = sorted({*files, *([name] if moments else [])})
            for file in files:
                sync(part / file)
            return _digests(part, files)

        return write

    def _staged_moments(self) -> dict[str, Tensor]:
        """Copies of AdamW's moments in the CPU's memory, by name: with several processes this one's part of each."""
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        moments = {
            # A weight that no loss has depended on yet has no moments, such as a memory's in texts of one mini-batch.
            f"{moment}.{name}": self._optimizer.state[weight].get(moment, torch.zeros_like(weight.detach()))
            for name, weight in trained_weights(self._parallel.model).items()
            for moment in _MOMENTS
        }
        return BlockingAsyncStager().stage(moments)

    def _own_shards(self, moments: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What this process writes of staged moments, so that each is written once, and where its parts begin."""
        from torch.distributed.checkpoint import DefaultSavePlanner

        dist, planner = self._parallel.dist, DefaultSavePlanner()
        planner.set_up_planner(moments, is_coordinator=dist.is_rank0)
        if self._plan is None:
            plans, _ = planner.create_global_plan(dist.gather(planner.create_local_plan()))
            self._plan = plans[dist.rank]
        own: dict[str, Tensor] = {}
        offsets: dict[str, Any] = {}
        for item in planner.finish_plan(self._plan).items:
            tensor = planner.resolve_data(item)
            assert item.tensor_data is not None and isinstance(tensor, Tensor)
            own[item.index.fqn] = tensor
            offsets[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
        return own, offsets

    def _complete(self, stack: ExitStack, part: Path, name: str, state: TrainerState, files: dict[str, Any]) -> None:
        """Write the last file, give the checkpoint its name by leaving `stack`, and remove the oldest ones."""
        with stack:
            content = {
                "format": FORMAT,
                "version": VERSION,
                "progress": asdict(state),
                "config": to_dict(self._config),
                "files": files,
            }
            (part / TRAINER).write_text(json.dumps(with_digest(content), indent=2) + "\n", encoding="utf-8")
        older = [folder for folder in list_checkpoints(self._run) if folder.name < name]
        for folder in older[self._config.train.keep_checkpoints - 1 :]:
            remove_atomically(folder)


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
        with _raised_alike(dist), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is as it should be
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


def _outcome(job: "Future[dict[str, Any]]") -> dict[str, Any] | Exception:
    """What came of writing files."""
    try:
        return job.result()
    except (UserError, OSError) as error:
        return error


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
