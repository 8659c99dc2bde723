"""A model folder that is written some rows at a time, for models that do not fit into memory.

With all weights in one dtype the result is, byte for byte, what `model.checkpoint.save_model` writes. Rows may come in
any order, because the shapes determine where they lie in the file.
"""

import hashlib
import json
import math
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.errors import UserError
from ttt_e2e.files import atomic_path
from ttt_e2e.model.checkpoint import WEIGHTS, write_config
from ttt_e2e.model.transformer import parameter_shapes

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_BLOCK_BYTES = 1 << 24  # that are hashed at once

Shapes = Mapping[str, tuple[int, ...]]  # by the name of a tensor
WriteRows = Callable[[str, int, Tensor], None]


class PartialFolder(NamedTuple):
    """A model folder that is being written."""

    path: Path
    """The temporary folder, for other files."""
    write_rows: WriteRows
    """`write_rows(name, row, rows)` writes rows [n, ...] of a parameter, beginning with its row `row`."""
    read: Callable[[str], Tensor]
    """`read(name)` is a parameter all of whose rows have been written, in float32."""


def require_shapes(found: Shapes, expected: Shapes, where: str) -> list[str]:
    """Raise UserError unless the checkpoint `where` has the `expected` tensors; returns the names of all others."""
    missing = sorted(set(expected) - set(found))
    if missing:
        names = ", ".join(missing[:3]) + (" and more" if len(missing) > 3 else "")
        raise UserError(f"{where} lacks {names}, which its configuration requires; use a complete copy.")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(
                f"{where} has {name} of shape {list(found[name])}, but the configuration requires {list(shape)}; use a "
                "checkpoint and a configuration that belong together."
            )
    return sorted(set(found) - set(expected))


@contextmanager
def model_folder(
    out: Path, config: ModelConfig, dtype: torch.dtype, notes: Mapping[str, Any], wide: Container[str] = ()
) -> Iterator[PartialFolder]:
    """Write the model folder `out`, complete or not at all, with weights in float32 or bfloat16.

    All rows of all parameters must have been written when the block ends. notes: plain values for people. wide: names
    of parameters that stay float32. Raises UserError as `files.atomic_path` does.
    """
    shapes = parameter_shapes(config)
    dtypes = {name: torch.float32 if name in wide else dtype for name in shapes}
    # As the library for safetensors orders them, so that all numbers lie at multiples of their size.
    shapes = {name: shapes[name] for name in sorted(shapes, key=lambda name: (-dtypes[name].itemsize, name))}
    ends = [*accumulate(math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items())]
    spans = dict(zip(shapes, pairwise([0, *ends]), strict=True))
    missing = ends[-1]  # bytes that have not been written yet

    def header(digest: str) -> bytes:
        """What comes before the parameters in a safetensors file: the length of the JSON object, and that object."""
        entries: dict[str, Any] = {"__metadata__": {"digest": digest}}
        for name, shape in shapes.items():
            entries[name] = {"dtype": _NAMES[dtypes[name]], "shape": shape, "data_offsets": spans[name]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def write_rows(name: str, row: int, rows: Tensor) -> None:
        nonlocal missing
        assert rows.shape[1:] == shapes[name][1:] and row + len(rows) <= shapes[name][0], name
        values = rows.to(dtypes[name]).contiguous().view(torch.uint8).numpy()
        file.seek(start + spans[name][0] + row * (values.size // len(rows)))
        file.write(values.data)
        missing -= values.size

    def read(name: str) -> Tensor:
        begin, end = spans[name]
        file.seek(start + begin)
        return torch.frombuffer(bytearray(file.read(end - begin)), dtype=dtypes[name]).float().view(shapes[name])

    with atomic_path(out) as part:
        part.mkdir()
        with (part / WEIGHTS).open("w+b") as file:
            start = len(header("0" * 64))
            file.truncate(start + missing)
            yield PartialFolder(part, write_rows, read)
            assert missing == 0, f"{missing} bytes of the weights were never written"
            digest = hashlib.sha256()  # the value of `model.checkpoint.model_digest`, computed block by block
            for name in sorted(spans):
                begin, end = spans[name]
                digest.update(f"{name} {list(shapes[name])}\n".encode())
                file.seek(start + begin)
                for position in range(begin, end, _BLOCK_BYTES):
                    block = bytearray(file.read(min(_BLOCK_BYTES, end - position)))
                    digest.update(torch.frombuffer(block, dtype=dtypes[name]).float().numpy().data)
            file.seek(0)
            file.write(header(digest.hexdigest()))
        write_config(config, part, notes)
