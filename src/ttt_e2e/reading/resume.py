"""Saving an unfinished reading, so that the same command continues it after any end, `kill -9` included.

The file is a session like any other with more in it, written together: the name of the text and how far it was read,
the twin without learning, and the loss curves. The mark "unfinished" and a digest of the tokens read tell it from a
finished session, and from a reading of another or changed text. An unfinished reading of zero tokens is started afresh;
it exists only because a notebook has to know where the text begins in it (see `recording`).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ttt_e2e.errors import UserError
from ttt_e2e.files import remove_stale_parts
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import check_session_target, read_session_file, session_facts, write_session_file
from ttt_e2e.reading.loss_curve import LossCurve


class TokenChunk(NamedTuple):
    """Some of a text's tokens, int64 [n], and how many bytes of text they are."""

    ids: np.ndarray
    bytes: float


@dataclass
class ReadingProgress:
    """A reading of a text: what it is, how far it has come and what it has measured."""

    name: str
    total_bytes: int | None = None
    """Size of the text, if known."""
    initial_digest: str = ""
    """Digest of the text that the session had read before."""
    notebook_start: int | None = None
    """The notebook's character at which the text begins; None if it is not recorded."""

    pending_before: int = 0
    """So many of the next losses belong to the tokens that were pending in the session before."""
    tokens: int = 0
    bytes: float = 0.0
    seconds: float = 0.0
    learning_seconds: float = 0.0
    """Of the reader that learns, without its twin."""
    curve: LossCurve = field(default_factory=LossCurve)
    twin_curve: LossCurve = field(default_factory=LossCurve)
    """Losses without learning."""
    token_hash: Any = field(default_factory=hashlib.sha256)

    def add_losses(self, losses: np.ndarray) -> None:
        """Add losses [n] of the learning reader, without those of earlier tokens."""
        skipped = min(self.pending_before, len(losses))
        self.pending_before -= skipped
        self.curve.add(losses[skipped:])

    def add_chunk(self, chunk: TokenChunk) -> None:
        """Count a chunk of the text as read."""
        self.tokens += len(chunk.ids)
        self.bytes += chunk.bytes
        self.token_hash.update(_hashed(chunk))


def save_unfinished(path: Path, session: Session, twin: Session | None, progress: ReadingProgress) -> None:
    """Write an unfinished reading to `path`, complete or not at all. Raises UserError as `Session.save` does."""
    facts, tensors = session.pack()
    curves = {"curve": progress.curve}
    twin_facts = None
    if twin is not None:
        twin_facts, twin_tensors = twin.pack()
        tensors |= {f"twin.{key}": tensor for key, tensor in twin_tensors.items()}
        curves["twin.curve"] = progress.twin_curve
    tensors |= {key: torch.from_numpy(curve.sums) for key, curve in curves.items()}
    facts["unfinished"] = {
        "name": progress.name,
        "size": progress.total_bytes,
        "initial_digest": progress.initial_digest,
        "notebook_start": progress.notebook_start,
        "pending_before": progress.pending_before,
        "tokens": progress.tokens,
        "bytes": progress.bytes,
        "seconds": progress.seconds,
        "learning_seconds": progress.learning_seconds,
        "token_digest": progress.token_hash.hexdigest(),
        "curves": {key: {"bin_tokens": curve.bin_tokens, "tokens": curve.tokens} for key, curve in curves.items()},
        "twin": twin_facts,
    }
    write_session_file(path, facts, tensors)


def unfinished_reading(path: Path) -> dict[str, Any] | None:
    """The facts of the unfinished reading in the session file `path`.

    None if there is no such file, if it is a finished session, and if nothing was read yet. Raises UserError for a file
    that is not a session.
    """
    unfinished: dict[str, Any] | None = session_facts(path).get("unfinished") if path.exists() else None
    return unfinished if unfinished and unfinished["tokens"] else None


def resume_reading(
    path: Path, session: Session, twin: Session | None, chunks: Iterator[TokenChunk], progress: ReadingProgress
) -> bool:
    """Continue the unfinished reading in `path`, if there is one; returns whether there is.

    Then `session`, `twin` and `progress` become what they were when it was saved, and `chunks`, the text from its
    beginning, advances to the same place. Otherwise nothing changes. Raises UserError if the reading is of another
    text, if it was started with other options, or if the file is damaged.
    """
    check_session_target(path)
    remove_stale_parts(path.parent, path.name)
    if not unfinished_reading(path):
        return False
    facts, tensors = read_session_file(path)
    saved = facts["unfinished"]
    options = {
        "--no-learning": facts["learn"] == session.learn,
        "--dtype": facts["dtype"] == session.info().dtype,
        "--no-baseline": (saved["twin"] is None) == (twin is None),
        # It began with the same session, or it is itself the session to continue from.
        "--session": progress.initial_digest in (saved["initial_digest"], facts["text_digest"]),
        "--notebook": saved["notebook_start"] == progress.notebook_start,
    }
    if different := ", ".join(option for option, same in options.items() if not same):
        raise UserError(
            f"{path} holds an unfinished reading of {saved['name']} that was started with other options "
            f"({different}); repeat that command to finish it, or save to another file."
        )
    while progress.tokens < saved["tokens"] and (chunk := next(chunks, None)):
        progress.add_chunk(chunk)
    if progress.tokens != saved["tokens"] or progress.token_hash.hexdigest() != saved["token_digest"]:
        raise UserError(
            f"{path} holds an unfinished reading of {saved['name']}, and {progress.name} does not begin with the "
            f"{saved['tokens']:,} tokens that it has read: the text was changed, or is another; save to another file."
        )
    session.unpack(facts, tensors, str(path))
    curves = {
        key: LossCurve.restore(curve["bin_tokens"], curve["tokens"], tensors[key].numpy())
        for key, curve in saved["curves"].items()
    }
    progress.curve = curves["curve"]
    if twin is not None:
        twin_tensors = {key.removeprefix("twin."): tensor for key, tensor in tensors.items() if key.startswith("twin.")}
        twin.unpack(saved["twin"], twin_tensors, str(path))
        progress.twin_curve = curves["twin.curve"]
    progress.pending_before = saved["pending_before"]
    progress.bytes = saved["bytes"]
    progress.seconds = saved["seconds"]
    progress.learning_seconds = saved["learning_seconds"]
    return True


def _hashed(chunk: TokenChunk) -> bytes:
    return chunk.ids.astype("<i8").tobytes()
