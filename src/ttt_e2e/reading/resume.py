"""A reading that is saved as it goes, so that the same command goes on with it whatever stopped it, `kill -9` included.

The file is a session like any other, with more in it: what was being read and how far, the frozen twin and the curves.
All are written together, so they belong together. That it is unfinished, and a digest of the text so far, tell it apart
from an older session of the same text, and from a text that was changed meanwhile. One that has read nothing yet is
begun again as if it were not there; it is written where a notebook must know where the text begins in it.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import check_session_target, read_session_file, session_facts, write_session_file
from ttt_e2e.reading.loss_curve import Curve


class Chunk(NamedTuple):
    """Some of a text's tokens, int64 [n], and how many bytes they are."""

    ids: np.ndarray
    bytes: float


@dataclass
class Progress:
    """How far a reading has come, and what it found; it grows with the reading.

    from_before: so many losses that are still to come belong to an earlier text. tokens, bytes: of the text, so far.
    seconds: in all; learning_seconds: of the learning reader. hash: SHA-256 of the tokens.
    begin: the character of the session's notebook at which the text begins, None where it is not noted.
    """

    from_before: int = 0
    tokens: int = 0
    bytes: float = 0.0
    seconds: float = 0.0
    learning_seconds: float = 0.0
    curve: Curve = field(default_factory=Curve)
    twin_curve: Curve = field(default_factory=Curve)
    hash: Any = field(default_factory=hashlib.sha256)
    begin: int | None = None

    def add(self, losses: np.ndarray) -> None:
        """Add losses [n] of the learning reader to its curve, without those of an earlier text."""
        skipped = min(self.from_before, len(losses))
        self.from_before -= skipped
        self.curve.add(losses[skipped:])

    def took(self, chunk: Chunk) -> None:
        """Count a chunk of the text as read."""
        self.tokens += len(chunk.ids)
        self.bytes += chunk.bytes
        self.hash.update(chunk.ids.astype("<i8").tobytes())


_NUMBERS = ("from_before", "tokens", "bytes", "seconds", "learning_seconds")


def save_unfinished(
    path: Path, session: Session, twin: Session | None, progress: Progress, began: str, name: str, size: int | None
) -> None:
    """Write a reading to `path`, whole or not at all.

    began: the digest of the text that the session had read before. name, size: of the source, in bytes. Raises
    UserError as `Session.save` does.
    """
    facts, tensors = session.pack()
    curves = {"curve": progress.curve}
    twin_facts = None
    if twin is not None:
        twin_facts, of_twin = twin.pack()
        tensors |= {f"twin.{key}": tensor for key, tensor in of_twin.items()}
        curves["twin.curve"] = progress.twin_curve
    tensors |= {key: torch.from_numpy(curve.sums) for key, curve in curves.items()}
    facts["unfinished"] = {
        "name": name,
        "size": size,
        "began": began,
        "digest": progress.hash.hexdigest(),
        "begin": progress.begin,
        **{number: getattr(progress, number) for number in _NUMBERS},
        "curves": {key: {"hidden_size": curve.width, "tokens": curve.tokens} for key, curve in curves.items()},
        "twin": twin_facts,
    }
    write_session_file(path, facts, tensors)


def unfinished_reading(path: Path) -> dict[str, Any] | None:
    """What the session file `path` says of the unfinished reading that it holds.

    None if there is no file, if it is no unfinished reading, and if nothing was read yet. Raises UserError for a file
    that is no session.
    """
    unfinished: dict[str, Any] | None = session_facts(path).get("unfinished") if path.exists() else None
    return unfinished if unfinished and unfinished["tokens"] else None


def leftovers(target: Path) -> list[Path]:
    """What processes left that were killed while they wrote `target` by `files.atomic_path`."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9]+\.(part|old)")
    return [path for path in target.parent.glob(".*") if name.fullmatch(path.name)]


def go_on(
    path: Path,
    session: Session,
    twin: Session | None,
    chunks: Iterator[Chunk],
    began: str,
    name: str,
    begin: int | None = None,
) -> Progress | None:
    """Go on where the unfinished reading in `path` stopped: session and twin become what they were then.

    chunks: the text; it advances to where the reading stopped. began, name: as for `save_unfinished`. begin: as in
    `Progress`. None if there is no file, or a session that is no unfinished reading, or one of nothing: then nothing
    changes. Raises UserError if the reading is of another text or kind than this one, or the file is not sound.
    """
    check_session_target(path)
    for left in leftovers(path):
        left.unlink()
    if not unfinished_reading(path):
        return None
    facts, tensors = read_session_file(path)
    unfinished = facts["unfinished"]
    kind = {
        "--no-learning": facts["learn"] == session.learn,
        "--dtype": facts["dtype"] == session.info().dtype,
        "--no-baseline": (unfinished["twin"] is None) == (twin is None),
        # It began with the same session, or it is itself the session to go on with.
        "--session": began in (unfinished["began"], facts["text_digest"]),
        "--notebook": unfinished.get("begin") == begin,
    }
    others = [option for option, same in kind.items() if not same]
    if others:
        raise UserError(
            f"{path} holds an unfinished reading of {unfinished['name']} by a command with other options "
            f"({', '.join(others)}); repeat that command to finish it, or save to another file."
        )
    progress = Progress(**{number: unfinished[number] for number in _NUMBERS}, begin=begin)
    tokens = 0
    while tokens < progress.tokens and (chunk := next(chunks, None)):
        tokens += len(chunk.ids)
        progress.hash.update(chunk.ids.astype("<i8").tobytes())
    if tokens != progress.tokens or progress.hash.hexdigest() != unfinished["digest"]:
        raise UserError(
            f"{path} holds an unfinished reading of {unfinished['name']}, and {name} does not begin with the "
            f"{progress.tokens:,} tokens that it has read: the text was changed, or is another; save to another file."
        )
    session.unpack(facts, tensors, str(path))
    curves = {key: Curve.restore(sums=tensors[key].numpy(), **of) for key, of in unfinished["curves"].items()}
    progress.curve = curves["curve"]
    if twin is not None:
        of_twin = {key.removeprefix("twin."): tensor for key, tensor in tensors.items() if key.startswith("twin.")}
        twin.unpack(unfinished["twin"], of_twin, str(path))
        progress.twin_curve = curves["twin.curve"]
    return progress
