"""The notebooks of sessions: how they are made, exported and imported. All this blocks.

A notebook in the store never changes. When its session reads a text, a copy is made and the text added to it; the copy
becomes the session's notebook together with what the model has learned, or never.
"""

import re
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tarfile import BLOCKSIZE, NUL, REGTYPE, HeaderError, TarInfo
from typing import IO

from ttt_e2e.data.text import slices
from ttt_e2e.errors import UserError
from ttt_e2e.files import file_digest, sync
from ttt_e2e.retrieval.database import DATABASE
from ttt_e2e.retrieval.documents import document_name
from ttt_e2e.retrieval.index_digest import AlteredNotebookError
from ttt_e2e.retrieval.notebook import Notebook
from ttt_e2e.retrieval.passages import Passage
from ttt_e2e.server.engine.records import LimitReachedError, NotebookRecord, Source
from ttt_e2e.server.engine.store import NewNotebook

MAX_DOCUMENTS = 1000
_TOLD_DOCUMENTS = 20
_DISK_BYTES = 8  # at most, for a byte of text: passages overlap, and are indexed
_BLOCK = 1 << 16  # characters
_CHUNK_BYTES = 1 << 20
_MAX_MEMBERS = 20  # of an archive


@dataclass(frozen=True)
class Limits:
    """Of the notebooks of sessions. passage_size: in characters. text_bytes: of the text in a notebook, in UTF-8."""

    passage_size: int
    text_bytes: int

    @property
    def disk_bytes(self) -> int:
        """How large a notebook can become on the disk."""
        return _DISK_BYTES * self.text_bytes + (1 << 20)


@dataclass
class NotebookText:
    """A text for a notebook.

    name, continues: as for `Notebook.record`. stopped: set from another thread, it ends the recording.
    """

    name: str
    chunks: Iterable[str]
    continues: bool = False
    stopped: bool = field(default=False, init=False)


def make_notebook(
    folder: Path, limits: Limits, texts: Iterable[NotebookText], source: tuple[Path, NotebookRecord] | None = None
) -> NewNotebook:
    """A notebook in the new folder `folder`: a copy of `source`, or an empty one, and then the texts.

    Raises LimitReachedError if it becomes too large, and UserError as `Notebook.record` does.
    """
    text_bytes = source[1].text_bytes if source else 0
    try:
        folder.mkdir(mode=0o700)
        if source is not None:
            shutil.copyfile(source[0] / DATABASE, folder / DATABASE)
    except OSError as error:
        raise UserError(f"Cannot write a notebook: {error.strerror}.") from error
    with Notebook(folder, size=limits.passage_size) as notebook:
        for text in texts:
            for block in notebook.record(_until_stopped(text), name=text.name, continues=text.continues):
                text_bytes += len(block.encode())
                if text_bytes > limits.text_bytes:
                    message = f"A notebook holds at most {limits.text_bytes:,} bytes of text; use a new session."
                    raise LimitReachedError(message)
            if len(notebook.documents()) > MAX_DOCUMENTS:
                raise LimitReachedError(f"A notebook holds at most {MAX_DOCUMENTS:,} documents; use a new session.")
        characters = notebook.characters
        names = [name for _, name in notebook.documents() if name][-_TOLD_DOCUMENTS:]
    try:
        sync(folder)  # its file was synced by the notebook
        database = folder / DATABASE
        record = NotebookRecord("", file_digest(database), database.stat().st_size, characters, text_bytes, names)
    except OSError as error:
        raise UserError(f"Cannot write a notebook: {error.strerror}.") from error
    return NewNotebook(folder, record)


def _until_stopped(text: NotebookText) -> Iterator[str]:
    for chunk in text.chunks:
        for block in slices(chunk, _BLOCK):
            if text.stopped:
                raise UserError("The client has left.")
            yield block


def as_sources(notebook: Notebook, passages: Iterable[Passage]) -> list[Source]:
    """Passages as clients see them."""
    ends = [*(start for start, _ in notebook.documents()), notebook.characters]
    return [
        Source(
            one.document or None,
            *one.place_in_document,
            next(end for end in ends if end > one.document_start) - one.document_start,
            one.text,
            one.score,
        )
        for one in passages
    ]


# -- archives ----------------------------------------------------------------------------------------------------------


def write_archive(target: Path, name: str, session: Path, notebook: Path) -> None:
    """Write a session and its notebook to the new file `target`, a tar of what `ttt-e2e read --save NAME` leaves."""
    members = {f"{name}.session": session, f"{name}.session.notebook/{DATABASE}": notebook / DATABASE}
    with target.open("xb") as archive:
        for member, path in members.items():
            info = TarInfo(member)
            info.size, info.mode, info.mtime = path.stat().st_size, 0o600, int(path.stat().st_mtime)
            archive.write(info.tobuf())
            with path.open("rb") as file:
                shutil.copyfileobj(file, archive, _CHUNK_BYTES)
            archive.write(NUL * (-info.size % BLOCKSIZE))
        archive.write(NUL * 2 * BLOCKSIZE)


def is_archive(path: Path) -> bool:
    """Whether a file is a tar."""
    with path.open("rb") as file:
        return file.read(BLOCKSIZE)[257:262] == b"ustar"


def unpack_archive(source: Path, folder: Path, limits: Limits) -> tuple[Path, Path | None]:
    """Unpack an untrusted tar of a session, perhaps with its notebook, to files in `folder` that are returned.

    Raises UserError if it is damaged or holds anything else.
    """
    found: dict[str, Path] = {}
    with source.open("rb") as archive:
        for _ in range(_MAX_MEMBERS):
            info = _next_member(archive)
            if info is None:
                break
            kind = _kind(info)
            if kind is None:
                archive.seek(info.size + -info.size % BLOCKSIZE, 1)
                continue
            if kind in found:
                raise _invalid("it has more than one session or notebook")
            if kind == DATABASE and info.size > limits.disk_bytes:
                raise LimitReachedError(f"A notebook holds at most {limits.text_bytes:,} bytes of text; use less.")
            found[kind] = folder / kind
            with found[kind].open("xb") as file:
                _copy(archive, file, info.size)
    if "session" not in found:
        raise _invalid("it has no .session file")
    if DATABASE not in found:
        return found["session"], None
    (folder / "notebook").mkdir()
    return found["session"], found[DATABASE].rename(folder / "notebook" / DATABASE).parent


def import_notebook(source: Path, folder: Path, limits: Limits) -> NewNotebook:
    """A new notebook in `folder` with the text of the untrusted notebook `source`; of its index nothing is kept.

    Raises UserError if it is damaged, and LimitReachedError if it is too large.
    """
    try:
        with Notebook(source, create=False) as notebook:
            end = notebook.characters
            starts = [(start, document_name(name)) for start, name in notebook.documents()[: MAX_DOCUMENTS + 1]]
            if not starts or starts[0][0] > 0:
                starts = [(0, ""), *starts]
            spans = pairwise([*starts, (end, "")])
            texts = (NotebookText(name, _span(notebook, start, stop)) for (start, name), (stop, _) in spans)
            return make_notebook(folder, limits, texts)
    except UserError as error:
        is_disk = isinstance(error.__cause__, OSError | sqlite3.Error) and not isinstance(error, AlteredNotebookError)
        if is_disk or isinstance(error, LimitReachedError):
            raise
        raise _invalid("its notebook is damaged, or not one") from error


def _span(notebook: Notebook, start: int, stop: int) -> Iterator[str]:
    if start > stop:
        raise _invalid("its notebook is damaged, or not one")
    left = stop - start
    for piece in notebook.text(start):
        if not left:
            return
        yield piece[:left]
        left -= len(piece[:left])


def _next_member(archive: IO[bytes]) -> TarInfo | None:
    header = archive.read(BLOCKSIZE)
    if header.count(0) == BLOCKSIZE:
        return None
    try:
        info = TarInfo.frombuf(header, "utf-8", "replace")
    except HeaderError as error:
        raise _invalid("it is cut short or damaged") from error
    if info.size < 0:
        raise _invalid("it is cut short or damaged")
    return info


def _kind(info: TarInfo) -> str | None:
    """Which of the two files a member is; None for what stands beside them and has no content that matters."""
    name = info.name.rstrip("/")
    if info.type in (b"0", REGTYPE, b"\0"):
        if name.endswith(".session"):
            return "session"
        if name.endswith(f"/{DATABASE}"):
            return DATABASE
        if re.search(r"(^|/)(\.lock|notebook\.db-shm)$", name) or (name.endswith("-wal") and not info.size):
            return None
    elif info.type in (b"5", b"x", b"g"):  # folders, and further facts of files
        return None
    raise _invalid("give a .session file and the notebook beside it, and nothing else")


def _copy(archive: IO[bytes], file: IO[bytes], size: int) -> None:
    left = size
    while left:
        chunk = archive.read(min(left, _CHUNK_BYTES))
        if not chunk:
            raise _invalid("it is cut short or damaged")
        file.write(chunk)
        left -= len(chunk)
    archive.seek(-size % BLOCKSIZE, 1)


def _invalid(reason: str) -> UserError:
    return UserError(f"The archive is not a session with a notebook: {reason}.")
