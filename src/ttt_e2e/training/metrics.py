"""What a run measures: metrics.jsonl, one object a line, and, on request, TensorBoard or Weights & Biases.

A line ends with its checksum, `crc32`, of the bytes before that entry: a damaged number is no number.
"""

import json
import math
import os
import secrets
import warnings
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ttt_e2e.errors import UserError
from ttt_e2e.files import write_text

_FILE = "metrics.jsonl"
_CHECKSUM = ', "crc32": "'


class MetricsWriter(ExitStack):
    """Appends to the metrics of a run that continues after `step`; lines of later steps are removed first.

    Warns if fewer than `lines` are left, as many as there were at that step. `self.lines` counts them.
    """

    def __init__(
        self, run: Path, step: int, config: Mapping[str, Any], tensorboard: bool, wandb: bool, lines: int = 0
    ) -> None:
        super().__init__()
        self._tensorboard = self._wandb = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError("TensorBoard is not installed; run: pip install 'ttt-e2e[tensorboard]'.") from error
            self._tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
            self.callback(self._tensorboard.close)
        if wandb:
            try:
                import wandb as library
            except ImportError as error:
                raise UserError("Weights & Biases is not installed; run: pip install 'ttt-e2e[wandb]'.") from error
            id_file = run / "wandb-id"  # random, because many folders are called "run"
            if not id_file.exists():
                write_text(id_file, secrets.token_hex(8))
            options = {"id": id_file.read_text(encoding="utf-8"), "resume": "allow", "config": dict(config)}
            self._wandb = library.init(project="ttt-e2e", name=run.name, dir=run, **options)
            self.callback(self._wandb.finish)
        path = run / _FILE
        kept = [_line(line) for line in read_metrics(run) if line["step"] <= step]
        self.lines = len(kept)
        if self.lines < lines:
            message = f"{path} lacks {lines - self.lines} of the {lines} lines that it had after step {step}."
            warnings.warn(message, stacklevel=2)
        if path.exists():
            write_text(path, "".join(kept))
        self._file = self.enter_context(path.open("a", encoding="utf-8"))

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line, which must have a "step"."""
        try:
            self._file.write(_line(line))
            self._file.flush()
            self.lines += 1
        except OSError as error:
            raise UserError(
                f"Cannot write {self._file.name}: {error.strerror}; free some space and continue with --resume."
            ) from error
        evaluation = {f"eval/{key}": value for key, value in line.get("eval", {}).items()}
        flat = {key: x for key, x in {**line, **evaluation}.items() if isinstance(x, (int, float)) and key != "step"}
        if self._tensorboard is not None:
            for key, value in flat.items():
                self._tensorboard.add_scalar(key, value, line["step"])
        if self._wandb is not None:
            self._wandb.log(flat, step=line["step"])

    def sync(self) -> None:
        """Flush all lines to the disk. Called before a checkpoint, which presumes them."""
        os.fsync(self._file.fileno())


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without their checksums; damaged ones are left out with a warning.

    An incomplete last line, which a killed process leaves, is left out without one.
    """
    path = run / _FILE
    *texts, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    lines = {number: _parse(text) for number, text in enumerate(texts, 1)}
    if odd := [number for number, line in lines.items() if line is None]:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        warnings.warn(f"Line {odd[0]}{more} of {path} is damaged and left out.", stacklevel=2)
    return [line for line in lines.values() if line is not None]


def _line(values: Mapping[str, Any]) -> str:
    text = json.dumps(values).removesuffix("}")
    return f'{text}{_CHECKSUM}{zlib.crc32(text.encode()):08x}"}}\n'


def _parse(text: bytes) -> dict[str, Any] | None:
    checked, has_checksum, _ = text.rpartition(_CHECKSUM.encode())  # lines of earlier versions have none
    try:
        line = json.loads(text)
        sound = type(line["step"]) is int and math.isfinite(line.get("loss", 0))
        if has_checksum and line.pop("crc32") != f"{zlib.crc32(checked):08x}":
            return None
        return line if sound else None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
