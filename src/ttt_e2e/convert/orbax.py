"""Checkpoints of orbax, read without JAX: array by array and layer by layer, with tensorstore.

A step is a folder named by its number. It has `_CHECKPOINT_METADATA`, with the time of the commit, and a folder for
every item. An item has `_METADATA`, with the names of its arrays, and a database of zarr arrays, whose root is
`manifest.ocdbt`. What is still being written has ".orbax-checkpoint-tmp" in its name or, in object stores, where
folders cannot be renamed, no time of the commit.

Source: orbax-checkpoint 0.11.13, `path/step.py` and the checkpoints that it writes.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ttt_e2e.errors import UserError
from ttt_e2e.files import read_json

_UNFINISHED = ".orbax-checkpoint-tmp"
_COMMITTED = "commit_success.txt"
_STEP, _ITEM, _ROOT = "_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"
_DTYPES = ("float32", "bfloat16", "float16")


class StoredArray(NamedTuple):
    """An array of a checkpoint that is read in parts."""

    where: str
    store: Any
    """The `tensorstore.TensorStore`."""

    def read(self, is_stacked: bool) -> Iterator[Tensor]:
        """The whole array or, if it is stacked, layer by layer, with the layers of one chunk in memory."""
        length = self.store.shape[0]
        step = self.store.chunk_layout.read_chunk.shape[0] if is_stacked else length
        for start in range(0, length, step):
            try:
                values = self.store[start : min(start + step, length)].read().result()
            except ValueError as error:
                raise _damaged(self.where, error) from error
            if self.store.dtype.name == "bfloat16":  # which NumPy does not know
                part = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
            else:
                part = torch.from_numpy(values)
            yield from part if is_stacked else [part]


def find_step(folder: Path, item: str, step: int | None = None) -> Path:
    """The folder of a complete step: `folder` itself, or the step inside it with the number `step`.

    step: None means the last complete one, with a warning about later ones. item: what must be saved with the step.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; give the folder of an official checkpoint.")
    if _UNFINISHED in folder.name or any((folder / name).exists() for name in (_STEP, item)):
        if step is not None:
            raise UserError(f"{folder} is a single step; leave out the number {step}, or give the folder above it.")
        candidates = [folder]
    else:
        steps = {int(path.name): path for path in folder.iterdir() if path.name.isdigit() and path.is_dir()}
        if step is not None and step not in steps:
            existing = ", ".join(map(str, sorted(steps))) or "no finished ones"
            raise UserError(f"{folder} has no step {step}; there are: {existing}.")
        if not steps:
            what = "only unfinished steps" if list(folder.glob(f"*{_UNFINISHED}*")) else "no checkpoint"
            raise UserError(f"{folder} holds {what}; give a folder that has {item} in it, or one with such folders.")
        candidates = [steps[number] for number in (sorted(steps, reverse=True) if step is None else [step])]
    skipped: list[tuple[Path, str]] = []
    for path in candidates:
        if (reason := _incomplete(path, item)) is None:
            for later, why in skipped:
                warnings.warn(f"Step {later.name} is skipped: {why}.", stacklevel=2)
            return path
        skipped.append((path, reason))
    path, reason = skipped[0]
    raise UserError(f"The checkpoint {path} is incomplete: {reason}; use a complete copy, or another step.")


def _incomplete(folder: Path, item: str) -> str | None:
    """Why the step in `folder` cannot be read, None if it can."""
    if _UNFINISHED in folder.name:
        return "it was never finished"
    if (folder / _STEP).is_file():
        metadata = read_json(folder / _STEP)
        committed = metadata.get("commit_timestamp_nsecs") or (folder / _COMMITTED).exists()
        if metadata.get("init_timestamp_nsecs") and not committed:
            return "it was never committed"
    if not (folder / item).is_dir():
        unfinished = any(folder.glob(f"{item}{_UNFINISHED}*"))
        return f"its {item} was never finished" if unfinished else f"it has no {item}"
    missing = [name for name in (_ITEM, _ROOT) if not (folder / item / name).is_file()]
    return f"its {item} has no {missing[0]}" if missing else None


def stored_arrays(folder: Path) -> dict[str, StoredArray]:
    """The arrays in the item `folder`, by the keys of its tree joined by dots; raises UserError for damaged ones."""
    path = folder / _ITEM
    try:
        entries = [(e["key_metadata"], e["value_metadata"]) for e in read_json(path)["tree_metadata"].values()]
        keys = [key for key, value in entries if not value.get("skip_deserialize") and value["value_type"] != "None"]
        names = [".".join(str(part["key"]) for part in key) for key in keys]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is altered: it does not list arrays as orbax does; use a complete copy.") from error
    try:
        import tensorstore
    except ImportError as error:
        raise UserError('Reading official checkpoints needs tensorstore: pip install "ttt-e2e[official]".') from error
    arrays = {}
    for name in names:
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}},
            "path": name,
            "fill_missing_data_reads": False,
            # The folder must not change while it is read.
            "recheck_cached_metadata": False,
            "recheck_cached_data": False,
        }
        where = f"{name!r} in {folder}"
        try:
            store = tensorstore.open(spec, open=True, read=True).result()
        except ValueError as error:
            raise _damaged(where, error) from error
        if store.dtype.name not in _DTYPES:
            raise UserError(f"{where} is {store.dtype.name}; weights are {', '.join(_DTYPES)}.")
        arrays[name] = StoredArray(where, store)
    return arrays


def _damaged(where: str, error: ValueError) -> UserError:
    return UserError(f"{where} is missing or damaged ({str(error).partition(':')[0]}); use a complete copy.")
