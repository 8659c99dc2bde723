"""What a run measures: metrics.jsonl, one object a line, and TensorBoard or Weights & Biases if asked."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ttt_e2e.errors import UserError
from ttt_e2e.files import write_text

FILE = "metrics.jsonl"


class Metrics:
    """The metrics of a run that goes on after `step`: what an earlier attempt wrote beyond it is dropped."""

    def __init__(
        self, run: Path, step: int, config: Mapping[str, Any], tensorboard: bool = False, wandb: bool = False
    ) -> None:
        self._board = _tensorboard(run, step) if tensorboard else None
        self._wandb = _wandb(run, config) if wandb else None
        path = run / FILE
        if path.exists():
            lines = read_metrics(run)
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Add one line; it names its `step`."""
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"Cannot write {self._file.name}: {error.strerror}; make room and continue with --resume."
            ) from error
        flat = {key: value for key, value in _flat(line) if isinstance(value, (int, float)) and key != "step"}
        if self._board is not None:
            for key, value in flat.items():
                self._board.add_scalar(key, value, line["step"])
        if self._wandb is not None:
            self._wandb.log(flat, step=line["step"])

    def sync(self) -> None:
        """Return when all lines are on the disk: before a checkpoint that presumes them."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines in a run's metrics file; a last line that was cut off in the middle is left out."""
    lines = []
    for text in (run / FILE).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        flat += _flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else [(prefix + key, value)]
    return flat


def _tensorboard(run: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("TensorBoard is not installed; run: pip install 'ttt-e2e[tensorboard]'.") from error
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)


def _wandb(run: Path, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("Weights & Biases is not installed; run: pip install 'ttt-e2e[wandb]'.") from error
    path = run / "wandb-id"  # of this folder alone: many a folder is called "run"
    if not path.exists():
        begun = (run / FILE).exists()  # before runs had ids of their own
        write_text(path, run.name if begun else secrets.token_hex(8))
    id = path.read_text(encoding="utf-8")
    return wandb.init(project="ttt-e2e", name=run.name, id=id, resume="allow", dir=run, config=dict(config))
