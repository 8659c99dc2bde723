"""Pretrained models to convert: Hugging Face checkpoints, and GGUF files as if they were such."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, Protocol

from torch import Tensor

from ttt_e2e.convert.gguf_files import is_gguf, read_gguf
from ttt_e2e.convert.gguf_tokenizer import write_tokenizer
from ttt_e2e.convert.hf_config import read_source, text_config
from ttt_e2e.convert.hf_files import CONFIG, StoredTensor, find_checkpoint, stored_tensors
from ttt_e2e.convert.learning import SourceModel
from ttt_e2e.files import expand_user, read_json

# Names of a language model's tensors beside those for images, older ones first, and what they begin with alone.
_TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}


class CheckpointTensor(Protocol):
    """A tensor of a checkpoint that is read in parts."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    @property
    def dtype(self) -> str:
        """As it is stored, such as "BF16"."""

    def read(self, rows: slice, columns: slice = slice(None)) -> Tensor:
        """Some of its rows and, of a matrix, columns, as floats."""


class Checkpoint(NamedTuple):
    """A pretrained model, its weights not read yet."""

    path: Path
    """The folder or the GGUF file, for messages."""
    source: SourceModel
    tensors: Mapping[str, CheckpointTensor]
    """By their names at Hugging Face."""
    folder: Path
    """It has config.json, and the tokenizer with what belongs to it, if there is one."""


@contextmanager
def open_checkpoint(path_or_name: str | Path) -> Iterator[Checkpoint]:
    """The checkpoint in a folder, with a name on Hugging Face or in a GGUF file; it can be read in the block.

    Raises UserError if it is missing, incomplete, damaged or not supported.
    """
    if not is_gguf(path_or_name):
        folder = find_checkpoint(path_or_name)
        config = read_json(folder / CONFIG)
        source, stored = read_source(config, folder / CONFIG), stored_tensors(folder)
        yield Checkpoint(folder, source, stored if text_config(config) is config else _text_tensors(stored), folder)
        return
    path = expand_user(path_or_name)
    model = read_gguf(path)
    source = read_source(model.config, path)
    with TemporaryDirectory() as name:
        (Path(name) / CONFIG).write_text(json.dumps(model.config), encoding="utf-8")
        write_tokenizer(model.metadata, Path(name), path)
        # What is added to weights of norms, llama.cpp's converter has added.
        yield Checkpoint(path, source._replace(norm_offset=0.0), model.tensors, Path(name))


def _text_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of the language model alone, where others are for images, by the names that they would have alone."""
    found = {}
    for name, tensor in stored.items():
        for outer, alone in _TEXT_PREFIXES.items():
            if name.startswith(outer):
                found[alone + name.removeprefix(outer)] = tensor
                break
    return found
