"""The files of a Hugging Face checkpoint: where they are, what tensors they hold, and a part of one at a time.

Only safetensors and JSON are read: a pickle could run code.
"""

import re
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ttt_e2e.errors import UserError
from ttt_e2e.model.checkpoint import TOKENIZER, read_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FLOATS = ("F64", "F32", "F16", "BF16")
# Some repositories hold the same weights once more in another format, in a folder or beside.
_WANTED, _UNWANTED = ["*.json", "*.safetensors", "*.jinja"], ["*/*", "consolidated*"]


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint, of which nothing is read yet. dtype: as safetensors calls it, such as "BF16"."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, rows: slice, columns: slice = slice(None)) -> Tensor:
        """Some rows of it, and of a matrix some columns; the file is closed again, so that its memory is free."""
        with safe_open(self.file, "pt") as file:
            part = file.get_slice(self.name)
            return part[rows, columns] if len(self.shape) > 1 else part[rows]


def find_checkpoint(path_or_name: str | Path) -> Path:
    """The folder of a checkpoint: itself, or what a name such as "owner/model" stands for on Hugging Face.

    A name is looked up in the local cache, and downloaded into it where it is not there, or not whole. Raises UserError
    if there is no such folder or name, or if it cannot be downloaded.
    """
    path, name = Path(path_or_name).expanduser(), str(path_or_name)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file; give the folder of the checkpoint, or its name on Hugging Face.")
    if not _NAME.fullmatch(name):
        raise UserError(f"There is no folder {path}; give a checkpoint's folder, or its name, such as owner/model.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    whole = None  # what is in the cache, if that is all but perhaps the tokenizer, which not every checkpoint has
    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        if (cached / CONFIG).is_file() and all(file.is_file() for file in weight_files(cached)):
            whole = cached
    except (LocalEntryNotFoundError, UserError):
        pass
    if whole is not None and (whole / TOKENIZER).is_file():
        return whole
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as error:  # the library's own, those of its HTTP client, and the system's
        if whole is not None:
            return whole
        raise _not_there(name, error) from error


def _not_there(name: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"{name} is no folder here, is not whole in the Hugging Face cache and could not be downloaded ({reason}); "
        "check the name and the connection."
    )


def find_config(path_or_name: str | Path) -> Path:
    """The config.json of a checkpoint: the file itself, in its folder, or by its name on Hugging Face.

    Raises UserError if there is none, or if it cannot be downloaded.
    """
    path, name = Path(path_or_name).expanduser(), str(path_or_name)
    file = path / CONFIG if path.is_dir() else path
    if file.is_file():
        return file
    if path.exists() or not _NAME.fullmatch(name):
        raise UserError(f"There is no {file}; give a checkpoint's folder or its {CONFIG}, or its name: owner/model.")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, CONFIG))
    except Exception as error:  # as above
        raise _not_there(name, error) from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of the checkpoint in `folder`, which need not be there.

    Raises UserError if the folder has weights in no format that is read here, or its list of files makes no sense.
    """
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map")
        files = sorted(set(names.values()), key=str) if isinstance(names, dict) else []
        if not files or not all(isinstance(name, str) and Path(name).name == name for name in files):
            raise UserError(f"{folder / INDEX} does not list the files of the weights; use a complete copy.")
        return [folder / name for name in files]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise UserError(
            f"{folder} has its weights as pickles alone, which may run code and are not read; save them as safetensors "
            "with the program that made them."
        )
    raise UserError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}; give the folder of a whole checkpoint.")


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the checkpoint in `folder`, by name.

    Raises UserError if files are missing, truncated or not those of its index, and for numbers that are not floats.
    """
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        if not path.is_file():
            raise UserError(f"{path} is missing, which {INDEX} lists; use a complete copy of the checkpoint.")
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    part = file.get_slice(name)
                    found[name] = StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise UserError(f"{path} is truncated or not a safetensors file ({error}); use a complete copy.") from error
    if (folder / INDEX).is_file():
        wrong = [n for n, file in read_json(folder / INDEX)["weight_map"].items() if _file(found.get(n)) != file]
        if wrong:
            raise UserError(f"{folder / INDEX} places {wrong[0]} in a file that lacks it; use an unaltered copy.")
    for tensor in found.values():
        if tensor.dtype not in _FLOATS:
            raise UserError(
                f"{tensor.name} in {tensor.file} is of type {tensor.dtype}: a quantised checkpoint cannot be trained "
                "further; convert the one that it was made of."
            )
    return found


def _file(tensor: StoredTensor | None) -> str | None:
    return None if tensor is None else tensor.file.name
