"""A model folder that is written some rows at a time, for models that do not fit into memory.

The result is, byte for byte, what `model.checkpoint.save_model` writes. Rows may come in any order, because the shapes
determine where they lie in the file.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.errors import UserError
from ttt_e2e.files import atomic_path
from ttt_e2e.model.checkpoint import WEIGHTS, write_config
from ttt_e2e.model.transformer import Transformer

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_BLOCK_BYTES = 1 << 24  # that are hashed at once

WriteRows = Callable[[str, int, Tensor], None]


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model by name; nothing is allocated."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def require_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> list[str]:
    """Raise UserError unless a checkpoint has tensors of the `expected` shapes; returns the names of all others.

    where: the checkpoint, as the subject of a sentence.
    """
    missing = sorted(set(expected) - set(found))
    if missing:
        more = " and more" if len(missing) > 3 else ""
        raise UserError(
            f"{where} lacks {', '.join(missing[:3])}{more}, which its configuration requires; use a complete copy."
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(
                f"{where} has {name} of shape {list(found[name])}, but the configuration requires {list(shape)}; use a "
                "checkpoint and a configuration that belong together."
            )
    return sorted(set(found) - set(expected))


@contextmanager
def model_folder(
    out: Path, config: ModelConfig, dtype: torch.dtype, notes: Mapping[str, Any]
) -> Iterator[tuple[Path, WriteRows]]:
    """Write the model folder `out`, complete or not at all, with weights in float32 or bfloat16.

    Yields the temporary folder that becomes `out`, for other files, and the function `write_rows(name, row, rows)`,
    which writes rows [n, ...] of a parameter, beginning with its row `row`. All rows of all parameters must have been
    written when the block ends. notes: plain values for people. Raises UserError as `files.atomic_path` does.
    """
    with atomic_path(out) as part:
        part.mkdir()
        write_config(config, part, notes)
        with (part / WEIGHTS).open("w+b") as file:
            weights = _SafetensorsWriter(file, parameter_shapes(config), dtype)
            yield part, weights.write_rows
            weights.finish()


class _SafetensorsWriter:
    """A safetensors file: the length of the header, the header, then all parameters in the order of their names."""

    def __init__(self, file: BinaryIO, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.file, self.dtype = file, dtype
        self.shapes = dict(sorted(shapes.items()))
        self.spans: dict[str, tuple[int, int]] = {}
        self.missing = 0  # bytes that have not been written yet
        for name, shape in self.shapes.items():
            begin, self.missing = self.missing, self.missing + math.prod(shape) * dtype.itemsize
            self.spans[name] = (begin, self.missing)
        self.start = len(self._header("0" * 64))
        file.truncate(self.start + self.missing)

    def write_rows(self, name: str, row: int, rows: Tensor) -> None:
        """Write `rows` [n, ...] of the parameter `name`, beginning with its row `row`."""
        assert rows.shape[1:] == self.shapes[name][1:] and row + len(rows) <= self.shapes[name][0], name
        values = rows.to(self.dtype).contiguous().view(torch.uint8).numpy()
        self.file.seek(self.start + self.spans[name][0] + row * (values.size // len(rows)))
        self.file.write(values.data)
        self.missing -= values.size

    def finish(self) -> None:
        """Write the header, with the digest of all rows."""
        assert self.missing == 0, f"{self.missing} bytes of the weights were never written"
        header = self._header(self._digest())
        self.file.seek(0)
        self.file.write(header)

    def _header(self, digest: str) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {"digest": digest}}
        for name, shape in self.shapes.items():
            entries[name] = {"dtype": _NAMES[self.dtype], "shape": shape, "data_offsets": self.spans[name]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _digest(self) -> str:
        """The value of `model.checkpoint.model_digest`, computed block by block."""
        digest = hashlib.sha256()
        for name, (begin, end) in self.spans.items():
            digest.update(f"{name} {list(self.shapes[name])}\n".encode())
            self.file.seek(self.start + begin)
            for position in range(begin, end, _BLOCK_BYTES):
                block = bytearray(self.file.read(min(_BLOCK_BYTES, end - position)))
                digest.update(torch.frombuffer(block, dtype=self.dtype).float().numpy().data)
        return digest.hexdigest()
