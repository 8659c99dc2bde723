"""The files of a Hugging Face checkpoint: where they are, which tensors they hold, and how to read parts of these.

Only safetensors and JSON are read: a pickle could run code.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ttt_e2e.data.file_types import unreadable
from ttt_e2e.errors import UserError
from ttt_e2e.files import expand_user, read_json
from ttt_e2e.model.checkpoint import TOKENIZER

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FLOATS = ("F64", "F32", "F16", "BF16")
# Some repositories hold the same weights a second time in another format.
_WANTED, _UNWANTED = ["*.json", "*.safetensors", "*.jinja"], ["*/*", "consolidated*"]
# Weights that are not read, by the names of their files.
_OTHER_WEIGHTS = {
    "GGML, which GGUF has replaced": ("*.ggml",),
    "ONNX": ("*.onnx",),
    "TensorFlow's HDF5": ("*.h5", "*.keras"),
    "Flax's MessagePack": ("*.msgpack",),
    "pickles, which may run code": ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"),
}


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint that is read in parts."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """As in safetensors, such as "BF16"."""

    def read(self, rows: slice, columns: slice = slice(None)) -> Tensor:
        """Some of its rows and, of a matrix, columns. The file is closed again to free its memory."""
        with safe_open(self.file, "pt") as file:
            part = file.get_slice(self.name)
            return part[rows, columns] if len(self.shape) > 1 else part[rows]


def find_checkpoint(path_or_name: str | Path) -> Path:
    """The folder of a checkpoint: itself or, for a name on Hugging Face, the complete cached or a downloaded copy."""
    path, name = expand_user(path_or_name), str(path_or_name)
    _refuse_other_formats(path)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file; give the folder of a checkpoint, its name on Hugging Face, or a GGUF file.")
    if not _NAME.fullmatch(name):
        raise UserError(f"There is no folder {path}; give a checkpoint's folder, or its name, such as owner/model.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    complete = None  # the folder in the cache, if it has everything but perhaps a tokenizer, which is optional
    with suppress(LocalEntryNotFoundError, UserError):
        cached = Path(snapshot_download(name, local_files_only=True))
        if (cached / CONFIG).is_file() and all(file.is_file() for file in weight_files(cached)):
            complete = cached
    if complete is not None and (complete / TOKENIZER).is_file():
        return complete
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as error:  # errors of the library, of its HTTP client and of the system
        if complete is not None:
            return complete
        raise _not_found(name, error) from error


def find_config(path_or_name: str | Path) -> Path:
    """The config.json of a checkpoint, given that file, its folder or its name on Hugging Face."""
    path, name = expand_user(path_or_name), str(path_or_name)
    file = path / CONFIG if path.is_dir() else path
    if path.is_file() or not file.is_file():
        _refuse_other_formats(path)
    if file.is_file():
        return file
    if path.exists() or not _NAME.fullmatch(name):
        raise UserError(f"There is no {file}; give a checkpoint's folder or its {CONFIG}, or its name: owner/model.")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, CONFIG))
    except Exception as error:  # as in find_checkpoint
        raise _not_found(name, error) from error


def _not_found(name: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"{name} is not a folder here, is not complete in the Hugging Face cache and could not be downloaded "
        f"({reason}); check the name and the connection."
    )


def _refuse_other_formats(path: Path) -> None:
    """Raise UserError if `path` is a file, a folder or a name of weights in another format, or of an adapter."""
    remedy = "give the folder of the original checkpoint, in safetensors, or its name on Hugging Face"
    if path.is_file():
        with path.open("rb") as file:
            found = unreadable(file.read(1 << 12))
        kinds = (kind for kind, patterns in _OTHER_WEIGHTS.items() if any(map(path.match, patterns)))
        if kind := found[0] if found else next(kinds, None):
            raise UserError(f"{path} is {kind}, which cannot be converted; {remedy}.")
    elif not path.exists() and path.name.lower().endswith(".gguf"):
        raise UserError(f"There is no file {path}; give a GGUF file that is here.")
    elif not path.exists() and path.name.lower().endswith("gguf"):
        raise UserError(f"{path} has, by its name, GGUF files; fetch one of them, and convert that.")
    elif path.is_dir() and not any((path / name).is_file() for name in (WEIGHTS, INDEX)):
        if (adapter := path / "adapter_config.json").is_file():
            base = read_json(adapter).get("base_model_name_or_path")
            raise UserError(
                f"{path} is an adapter, such as LoRA, for {base}; merge it into that model first, with PEFT's "
                "merge_and_unload()."
            )
        if files := sorted(path.glob("*.gguf")):
            raise UserError(f"{path} has its weights only as GGUF; give the file to convert, such as {files[0]}.")
        for kind, patterns in _OTHER_WEIGHTS.items():
            if any(any(path.glob(pattern)) for pattern in patterns):
                raise UserError(f"{path} has its weights only as {kind}, which cannot be converted; {remedy}.")


def weight_files(folder: Path) -> list[Path]:
    """The files that should hold the weights of the checkpoint in `folder`. Raises UserError if that is not clear."""
    if (index := folder / INDEX).is_file():
        names = read_json(index).get("weight_map")
        files = sorted(set(names.values()), key=str) if isinstance(names, dict) else []
        if not files or not all(isinstance(name, str) and Path(name).name == name for name in files):
            raise UserError(f"{index} does not list the files of the weights; use a complete copy.")
        return [folder / name for name in files]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    _refuse_other_formats(folder)
    raise UserError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}; give a complete checkpoint.")


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the checkpoint in `folder`; raises UserError if one is missing, damaged or not a float."""
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        if not path.is_file():
            raise UserError(f"{path}, which {INDEX} lists, is missing; use a complete copy of the checkpoint.")
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    part = file.get_slice(name)
                    found[name] = StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise UserError(f"{path} is truncated or not a safetensors file ({error}); use a complete copy.") from error
    index = folder / INDEX
    for name, file_name in read_json(index)["weight_map"].items() if index.is_file() else ():
        if name not in found or found[name].file.name != file_name:
            raise UserError(f"{index} places {name} in a file that does not have it; use an unaltered copy.")
    for tensor in found.values():
        if tensor.dtype not in _FLOATS:
            raise UserError(
                f"{tensor.name} in {tensor.file} is of type {tensor.dtype}: a quantised checkpoint cannot be trained "
                "further; convert the one that it was made from."
            )
    return found
