"""Outputs of a frozen prefix, computed once for every sequence of the data and kept on disk for all passes over it.

The folder holds `prefix.bin`, a row for every window of the loader, and `prefix.json`, which says what model, data and
settings they belong to and how many rows are finished. A row is the residual stream below the loop, [T, D] in the dtype
of training, and a digest of it, which is checked whenever the row is read. Rows are synced to the disk before they are
counted, so that a process that was killed continues where it stood.

Shapes: B sequences, T tokens, D hidden size.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ttt_e2e.config.parse import to_dict
from ttt_e2e.config.schema import ModelConfig, TrainConfig
from ttt_e2e.data.loader import SequenceLoader
from ttt_e2e.errors import UserError
from ttt_e2e.files import lock_beside, read_verified_json, with_digest, write_text
from ttt_e2e.inner_loop.functions import forward_prefix
from ttt_e2e.model.checkpoint import weights_digest
from ttt_e2e.model.cost import in_bytes
from ttt_e2e.model.trainable import is_below_loop
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.progress import ProgressBar
from ttt_e2e.signals import GracefulStop
from ttt_e2e.training.distributed import DistributedContext
from ttt_e2e.training.parallelize import ParallelModel

FORMAT = "ttt-e2e prefix outputs"
VERSION = 1
ROWS, CONFIG = "prefix.bin", "prefix.json"

_DIGEST_BYTES = 32
_ROWS_AT_ONCE = 16  # that a process computes between two syncs

# Settings of a model that its outputs below the loop do not depend on.
_ABOVE = {
    *("inner_loop", "initializer_range", "tie_word_embeddings", "static_mlp", "parallel_mlp"),
    *("fast_intermediate_size", "suffix_intermediate_size", "fast_rank"),
}

_DIFFERENT = {  # what a folder holds whose prefix.json has another value of this entry
    "weights": "the outputs of another model",
    "model": "the outputs of a model with other settings",
    "data": "the outputs for other data",
}


class PrefixCache:
    """Reads rows. `folder` must hold all of them; see `fill_prefix_cache`."""

    def __init__(self, folder: Path, config: dict[str, Any], device: torch.device) -> None:
        self._path, self._device = folder / ROWS, device
        self._key = _key(config)
        self._shape, self._dtype = (config["context"], config["model"]["hidden_size"]), getattr(torch, config["dtype"])
        self._file = self._path.open("rb")

    def read(self, windows: Sequence[int]) -> Tensor:
        """The residual stream [B, T, D] of these windows. Raises UserError if a row was altered."""
        x_BTD = torch.empty(len(windows), *self._shape, dtype=self._dtype)
        size = x_BTD[0].nbytes
        for window, x_TD in zip(windows, x_BTD, strict=True):
            payload, digest = _bytes_of(x_TD), bytearray(_DIGEST_BYTES)
            found = os.preadv(self._file.fileno(), [payload, digest], window * (size + _DIGEST_BYTES))
            if found != size + _DIGEST_BYTES or digest != _row_digest(self._key, window, payload):
                raise UserError(
                    f"Row {window} of {self._path} was altered after it was written; remove {self._path.parent} and "
                    "continue with --resume, which computes it anew."
                )
        return x_BTD.to(self._device)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def digest_below_loop(model: Transformer) -> str:
    """A fingerprint of the weights that the outputs below the loop depend on."""
    return weights_digest({name: w for name, w in model.named_parameters() if is_below_loop(name, model.config)})


def fill_prefix_cache(
    folder: Path,
    parallel: ParallelModel,
    weights: str,
    loader: SequenceLoader,
    config: TrainConfig,
    stop: GracefulStop,
    progress: bool = True,
) -> PrefixCache | None:
    """The outputs of a model below the loop for all windows of `loader`, from `folder` as far as they are there.

    What is missing is computed and written by all processes together, which must share the disk. Returns None if
    `stop` was requested before everything was there.

    Args:
        folder: the folder of the cache; it is made if it is missing.
        parallel: the model, in all processes.
        weights: the model's `digest_below_loop`, from before it was sharded.
        loader: the sequences.
        config: the context and dtype of the training.
        stop: asked after every few rows.
        progress: whether to show a progress bar.

    Raises:
        UserError: if the folder has outputs of another model or of other data, if another process is writing there, or
            if the disk has no room.
    """
    model, dist = parallel.model.config, parallel.dist
    wanted = _describe(model, weights, loader, config)
    row_bytes = config.context * model.hidden_size * getattr(torch, config.dtype).itemsize + _DIGEST_BYTES
    in_use = f"The outputs in {folder} are being computed by another process; wait until it has ended."
    with ExitStack() as stack:
        with dist.one_error():
            if dist.is_rank0 and folder.exists() and not (folder / CONFIG).is_file() and any(folder.iterdir()):
                raise UserError(
                    f"{folder} is not empty and holds no outputs of a prefix; name another folder with --cache."
                )
            if _find(folder, wanted) < loader.windows and dist.is_rank0:
                stack.enter_context(lock_beside(folder, in_use))
                if (done := _find(folder, wanted)) < loader.windows:
                    _prepare(folder, row_bytes, done, loader, dist)
        done = _find(folder, wanted)
        if done < loader.windows and not _fill(folder, done, row_bytes, wanted, parallel, loader, stop, progress):
            return None
    return PrefixCache(folder, wanted, dist.device)


def _prepare(folder: Path, row_bytes: int, done: int, loader: SequenceLoader, dist: DistributedContext) -> None:
    """Make the file for the rows. Raises UserError if the disk has no room for those that are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    total, free = loader.windows * row_bytes, shutil.disk_usage(folder).free
    size = f"{in_bytes(total)} for {loader.windows:,} sequences of {loader.context:,} tokens"
    if total - done * row_bytes > free:
        raise UserError(
            f"The outputs of the frozen prefix take {size}, and the disk of {folder} has {in_bytes(free)} left; "
            "name a folder on another disk with --cache, or set cache_prefix=false."
        )
    dist.log(f"Computing the outputs of the frozen prefix: {size}, in {folder}; {done:,} are there.")
    (folder / ROWS).touch()


def _fill(
    folder: Path,
    done: int,
    row_bytes: int,
    wanted: dict[str, Any],
    parallel: ParallelModel,
    loader: SequenceLoader,
    stop: GracefulStop,
    progress: bool,
) -> bool:
    """Compute the rows from `done` on; returns False if a stop was requested before all were there."""
    count, path, dist = loader.windows, folder / ROWS, parallel.dist
    bar = ProgressBar(total=count, initial=done, unit="sequence", disable=not (progress and dist.is_rank0))
    key, dtype = _key(wanted), getattr(torch, wanted["dtype"])
    positions = parallel.model.positions(0, loader.context, dtype)
    with bar, path.open("r+b") as file, torch.no_grad():
        for first in range(done, count, _ROWS_AT_ONCE * dist.world_size):
            last = min(first + _ROWS_AT_ONCE * dist.world_size, count)
            failure: OSError | None = None
            for window in range(first + dist.rank, last + dist.rank, dist.world_size):
                # Beyond the last row nothing is written, but weights are gathered from all processes.
                tokens_1T = loader.window(min(window, last - 1))[None, :-1].to(dist.device)
                x_TD = parallel(forward_prefix, tokens_1T, positions, dtype)[0].cpu().contiguous()
                if window < last and failure is None:
                    payload = _bytes_of(x_TD)
                    try:
                        file.seek(window * row_bytes)
                        file.write(payload)
                        file.write(_row_digest(key, window, payload))
                    except OSError as error:
                        failure = error
            with dist.one_error():
                _finish_rows(file, path, failure)
            with dist.one_error():
                if dist.is_rank0:
                    write_text(folder / CONFIG, json.dumps(with_digest(wanted | {"done": last}), indent=2) + "\n")
            bar.update(last - first)
            if any(dist.gather(stop.requested)) and last < count:
                return False
    return True


def _finish_rows(file: IO[bytes], path: Path, failure: OSError | None) -> None:
    """Sync the rows to the disk. Raises UserError if it is full, and `failure` if there was another one."""
    try:
        if failure is not None:
            raise failure
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"No space left on the disk while writing {path}; free some and continue with --resume."
        ) from error


def _describe(model: ModelConfig, weights: str, loader: SequenceLoader, config: TrainConfig) -> dict[str, Any]:
    """What the outputs depend on, as it stands in prefix.json."""
    ignored = {*_ABOVE}
    if not {"ttt-kvb", "titans"} & {*model.mixers}:
        ignored.add("mini_batch_size")
    return {
        "format": FORMAT,
        "version": VERSION,
        "weights": weights,
        "model": {name: value for name, value in to_dict(model).items() if name not in ignored},
        "data": loader.tokens.digest,
        "context": config.context,
        "seed": loader.seed,
        "dtype": config.dtype,
        "sequences": loader.windows,
    }


def _find(folder: Path, wanted: dict[str, Any]) -> int:
    """How many rows are finished. Raises UserError if they are not those of `wanted`."""
    if not (folder / CONFIG).is_file():
        return 0
    found = read_verified_json(folder / CONFIG, FORMAT, VERSION, "remove the folder")
    for name, value in wanted.items():
        if found.get(name) != value:
            what = _DIFFERENT.get(name, f"outputs for {name}={found.get(name)}, not {value}")
            raise UserError(f"{folder} holds {what}; name another folder with --cache, or remove this one.")
    return int(found["done"])


def _key(config: dict[str, Any]) -> bytes:
    return json.dumps(config, sort_keys=True).encode()


def _bytes_of(x_TD: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return x_TD.view(torch.uint8).reshape(-1).numpy().data


def _row_digest(key: bytes, window: int, payload: memoryview) -> bytes:
    digest = hashlib.sha256(key + window.to_bytes(8, "little"))
    digest.update(payload)
    return digest.digest()
