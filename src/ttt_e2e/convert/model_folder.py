"""A model folder that is written piece by piece, for models that do not fit into memory.

It ends up as `model_files.save_model` writes it, byte for byte. The pieces may come in any order: where each one lies
in the file is known from the shapes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.files import atomic_path
from ttt_e2e.model.checkpoint import WEIGHTS, write_config
from ttt_e2e.model.transformer import Transformer

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_BLOCK = 1 << 22  # numbers that are hashed at once

Put = Callable[[str, int, Tensor], None]


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the model that `config` describes; nothing is allocated."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


@contextmanager
def model_folder(
    out: Path, config: ModelConfig, dtype: torch.dtype, notes: Mapping[str, Any]
) -> Iterator[tuple[Path, Put]]:
    """Write the model folder `out`, whole or not at all.

    Yields the folder that is to become `out`, for what lies beside the weights, and `put(name, row, rows)`, which
    writes rows of a parameter, from its row `row` on. dtype: of the weights in the file, float32 or bfloat16. All rows
    of all parameters must have been put when the block ends. Raises UserError as `files.atomic_path` does.
    """
    with atomic_path(out) as part:
        part.mkdir()
        write_config(config, part, notes)
        with (part / WEIGHTS).open("w+b") as file:
            weights = _Weights(file, parameter_shapes(config), dtype)
            yield part, weights.put
            weights.finish()


class _Weights:
    """A safetensors file: the length of its header, the header, then every parameter in the order of their names."""

    def __init__(self, file: BinaryIO, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.file, self.dtype = file, dtype
        self.shapes = dict(sorted(shapes.items()))
        sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, shape in self.shapes.items()}
        ends = dict(zip(sizes, np.cumsum(list(sizes.values())).tolist(), strict=True))
        self.missing = sum(sizes.values())
        self.offsets = {name: ends[name] - size for name, size in sizes.items()}
        self.digest = "0" * 64
        self.start = len(self._header())
        file.truncate(self.start + self.missing)

    def put(self, name: str, row: int, rows: Tensor) -> None:
        """Write `rows` [n, ...] of the parameter `name`, from its row `row` on."""
        assert rows.shape[1:] == self.shapes[name][1:] and row + len(rows) <= self.shapes[name][0], name
        values = rows.to(self.dtype).contiguous().view(torch.uint8).numpy()
        self.file.seek(self._position(name) + row * (values.size // len(rows)))
        self.file.write(values.data)
        self.missing -= values.size

    def finish(self) -> None:
        """Write the header, with the digest of all that was put."""
        assert self.missing == 0, f"{self.missing} bytes of the weights were never put"
        self.digest = self._digest()
        self.file.seek(0)
        self.file.write(self._header())

    def _position(self, name: str) -> int:
        return self.start + self.offsets[name]

    def _header(self) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {"digest": self.digest}}
        for name, shape in self.shapes.items():
            begin = self.offsets[name]
            end = begin + int(np.prod(shape)) * self.dtype.itemsize
            entries[name] = {"dtype": _NAMES[self.dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _digest(self) -> str:
        """What `model_files.model_digest` gives, a block at a time."""
        digest = hashlib.sha256()
        for name, shape in self.shapes.items():
            digest.update(f"{name} {list(shape)}\n".encode())
            self.file.seek(self._position(name))
            left = int(np.prod(shape))
            while left:
                count = min(left, _BLOCK)
                block = torch.frombuffer(bytearray(self.file.read(count * self.dtype.itemsize)), dtype=self.dtype)
                digest.update(block.float().numpy().data)
                left -= count
        return digest.hexdigest()
