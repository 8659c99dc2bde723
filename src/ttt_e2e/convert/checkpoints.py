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
from ttt_e2e.convert.hf_config import read_source
from ttt_e2e.convert.hf_files import CONFIG, find_checkpoint, stored_tensors
from ttt_e2e.convert.learning import SourceModel
from ttt_e2e.files import expand_user, read_json


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
        source = read_source(read_json(folder / CONFIG), folder / CONFIG)
        yield Checkpoint(folder, source, stored_tensors(folder), folder)
        return
    path = expand_user(path_or_name)
    model = read_gguf(path)
    source = read_source(model.config, path)
    with TemporaryDirectory() as name:
        (Path(name) / CONFIG).write_text(json.dumps(model.config), encoding="utf-8")
        write_tokenizer(model.metadata, Path(name), path)
        yield Checkpoint(path, source, model.tensors, Path(name))
