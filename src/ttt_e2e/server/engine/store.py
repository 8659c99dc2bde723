"""Sessions on disk: a database of records, and beside it a file per session, as `Session.save` writes it.

The record of a session names the file with its current version. A new version is a new file, which is on disk as a
whole before one transaction makes the record point to it; then the former file is removed. So the file behind a record
is always complete, after a `kill -9` or a power cut too, and what no record points to is a leftover. Leftovers are
removed when the store is opened, by names that only this database gives. Any other file is left alone. On a full disk
even a deletion may have no room in the database: then the file is emptied and renamed, and its record counts no more.

A session may have a document, a text of the API's own. It is replaced in the same transaction, and deleted with it. So
is its notebook, a folder that never changes once it is here, so that forks share it; the last of them removes it.
"""

import logging
import os
import re
import secrets
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

from ttt_e2e.errors import UserError
from ttt_e2e.files import sync
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import SessionInfo, write_new_session_file
from ttt_e2e.server.engine.database import DATABASE, FORMAT, REMEDY, VERSION, SessionDatabase, SessionRecord, reason
from ttt_e2e.server.engine.records import NotebookRecord

ID = "sess-[0-9a-f]{32}"
_DELETED = ".deleted"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NewNotebook:
    """A notebook in a temporary folder of the store; its record has no `file` yet."""

    folder: Path
    record: NotebookRecord


class Store:
    """The sessions in `folder`, which is created if it is missing, readable by its owner only.

    One process can open a store at a time. Its methods can be called from any thread. Where they write, they raise
    UserError if the disk is full or not writable, and then nothing has changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        path = self.folder / DATABASE
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(PermissionError):  # others' folders need not be readable
                sync(self.folder.parent)
            if not path.exists() or not path.stat().st_size:
                self._check_empty()
            self._database = SessionDatabase(self.folder)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error
        try:
            self._database.open()
            self._temporary = f".tmp-{self._database.tag}-"
            self._remove_leftovers()
        except BaseException as error:
            self._database.close()
            if not isinstance(error, OSError | sqlite3.Error | UnicodeDecodeError):
                raise
            raise (self._database.explain(error) or self._unusable(error)) from error

    @property
    def lost(self) -> str | None:
        """None until the folder or its database was found to be removed or replaced; then a sentence about it.

        From then on every write fails.
        """
        return self._database.lost

    def records(self) -> list[SessionRecord]:
        """All records, the oldest first. Raises UserError if the database was altered."""
        deleted = {path.stem for path in self.folder.glob(f"*{_DELETED}")}
        return [record for record in self._database.records() if record.file not in deleted]

    def path(self, record: SessionRecord) -> Path:
        """The file with the current version of a session."""
        return self.folder / record.file

    @contextmanager
    def local_file(self, record: SessionRecord) -> Iterator[Path]:
        """That file, for reading inside the block."""
        yield self.path(record)

    def fingerprint(self, record: SessionRecord) -> tuple[int, ...]:
        """What is different as soon as somebody has altered or replaced a session's file; () if it is missing."""
        return file_fingerprint(self.path(record))

    def notebook_path(self, notebook: NotebookRecord) -> Path:
        """The folder of a notebook."""
        return self.folder / notebook.file

    @contextmanager
    def local_notebook(self, notebook: NotebookRecord) -> Iterator[Path]:
        """That folder, for reading inside the block."""
        yield self.notebook_path(notebook)

    def add(
        self,
        owner: str,
        session: Session,
        document: str | None = None,
        id: str | None = None,
        notebook: NotebookRecord | NewNotebook | None = None,
    ) -> SessionRecord:
        """Save a new session. id: its id, if it has one already. notebook: also that of another session, to share."""
        return self._save(id or new_id(), owner, time.time(), session, document, notebook)

    def replace(
        self, record: SessionRecord, session: Session, document: str | None = None, notebook: NewNotebook | None = None
    ) -> SessionRecord:
        """Save the next version of a session, whole or not at all; returns its record.

        document, notebook: None keeps what it has.
        """
        new = self._save(record.id, record.owner, record.created, session, document, notebook)
        self._discard(record.file)
        if notebook is None:
            return replace(new, notebook=record.notebook)
        self._discard_notebook(record.notebook)
        return new

    def document(self, record: SessionRecord) -> str | None:
        """The document of a session, if it has one. Raises DamagedSessionError if it was altered."""
        with self._writing("read a document"):
            return self._database.document(record.id)

    def set_document(self, record: SessionRecord, document: str) -> SessionRecord:
        """Save the document of a session, which stays as it is; returns its record."""
        with self._writing("save a document"):
            self._database.set_document(record.id, document)
        return record

    def delete(self, record: SessionRecord) -> None:
        """Delete a session. On a full disk its file makes room for that; see above if this is not enough."""
        with self._writing("delete a session"):
            try:
                self._database.delete(record.id)
            except sqlite3.Error as error:
                path = self.path(record)
                if not _is_full(error) or not path.exists():
                    raise
                renamed = path.rename(path.with_name(record.file + _DELETED))
                try:
                    sync(self.folder)
                except (OSError, sqlite3.Error):
                    renamed.rename(path)
                    raise
                self._finish_deletion(record.file)
        self._discard(record.file)
        self._discard_notebook(record.notebook, record.id)

    def _finish_deletion(self, file: str) -> None:
        """Remove the record of a renamed file, and the file; without room for that, opening the store does it."""
        path = self.folder / (file + _DELETED)
        try:
            os.truncate(path, 0)
            self._database.delete_file(file)
            path.unlink()
        except (OSError, sqlite3.Error) as error:
            _log.warning("The record of %s, which is deleted, could not be removed: %s", path, error)

    def close(self) -> None:
        """Release the store for other processes."""
        self._database.close()

    @contextmanager
    def temporary_folder(self) -> Iterator[Path]:
        """A folder that exists inside the block. If this process is killed, the next one removes it."""
        with self._writing("write a file"):
            self.check_in_place()
            folder = tempfile.TemporaryDirectory(prefix=self._temporary, dir=self.folder, ignore_cleanup_errors=True)
        with folder as path:
            yield Path(path)

    def check_in_place(self) -> None:
        """Raise UserError if the folder or its database is not the one that was opened, and ever after."""
        self._database.check_in_place()

    def _check_empty(self) -> None:
        """Raise UserError if there are sessions in a folder without a database."""
        names = [path.name for path in self.folder.iterdir()]
        if any(re.fullmatch(rf"{ID}\.json", name) for name in names):
            raise UserError(
                f"{self.folder} is a {FORMAT} of format version 1, a JSON file per session, and this ttt-e2e reads "
                f"version {VERSION}; export the sessions with the ttt-e2e that wrote them, or {REMEDY}."
            )
        if any(_files("[0-9a-f]{8}").fullmatch(name) for name in names):
            raise UserError(f"{self.folder} has sessions but no {DATABASE}; put it back, or {REMEDY}.")

    def _remove_leftovers(self) -> None:
        records = self.records()
        kept = {record.file for record in records}
        kept |= {record.notebook.file for record in records if record.notebook}
        ours, notebooks = _files(self._database.tag), _files(self._database.tag, "notebook")
        incomplete = {record.id for record in records if not self._is_complete(record)}  # an older database, perhaps
        for path in self.folder.iterdir():
            match = ours.fullmatch(path.name)
            if path.suffix == _DELETED and ours.fullmatch(path.stem):
                self._finish_deletion(path.stem)
            elif path.name.startswith(self._temporary):
                shutil.rmtree(path, ignore_errors=True)
            elif match and path.name not in kept and match[1] not in incomplete:
                self._discard(path.name)
            elif (match := notebooks.fullmatch(path.name)) and path.name not in kept and match[1] not in incomplete:
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix == ".session" and path.name not in kept:
                _log.warning("%s has no record, so it belongs to nobody; it is left alone. Import it to use it.", path)

    def _is_complete(self, record: SessionRecord) -> bool:
        return self.path(record).exists() and (not record.notebook or self.notebook_path(record.notebook).exists())

    def _save(
        self,
        id: str,
        owner: str,
        created: float,
        session: Session,
        document: str | None,
        notebook: NotebookRecord | NewNotebook | None,
    ) -> SessionRecord:
        facts, tensors = session.pack()
        info = SessionInfo.from_facts(facts)
        file = f"{id}.{self._database.tag}-{secrets.token_hex(8)}.session"
        with self._writing("save a session"):
            with self.temporary_folder() as folder:
                part = folder / file
                part.touch(mode=0o600)
                write_new_session_file(part, facts, tensors)
                sync(part)
                record = SessionRecord(id, owner, created, file, part.stat().st_size, info, None)
                self.check_in_place()
                part.rename(self.folder / file)
            moved = None
            try:
                if isinstance(notebook, NewNotebook):
                    moved = replace(notebook.record, file=file.replace(".session", ".notebook"))
                    notebook.folder.rename(self.notebook_path(moved))
                    notebook = moved
                sync(self.folder)
                record = replace(record, notebook=notebook)
                self._database.save(record, document, notebook)
            except (OSError, sqlite3.Error):
                self._discard(file)
                self._discard_notebook(moved)
                raise
        return record

    def _discard(self, file: str) -> None:
        """Remove a session file that no record points to; if this fails, opening the store does it."""
        try:
            if not self._database.has_file(file):
                (self.folder / file).unlink(missing_ok=True)
        except (OSError, sqlite3.Error, UserError) as error:
            _log.warning("The unused file %s could not be removed: %s", self.folder / file, error)

    def _discard_notebook(self, notebook: NotebookRecord | None, deleted: str = "") -> None:
        """Likewise the folder of a notebook, unless other sessions than the one with the id `deleted` share it."""
        if notebook is not None:
            try:
                if not self._database.has_notebook(notebook.file, deleted):
                    shutil.rmtree(self.notebook_path(notebook))
            except (OSError, sqlite3.Error, UserError) as error:
                _log.warning("The unused folder %s could not be removed: %s", self.notebook_path(notebook), error)

    def _unusable(self, error: Exception) -> UserError:
        return UserError(f"Cannot keep sessions in {self.folder}: {reason(error)}; mend that or name another folder.")

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"Cannot {what} in {self.folder}: {reason(error)}.") from error


def _files(tag: str, suffix: str = "session") -> re.Pattern[str]:
    """The names of session files or notebooks, of which the id is the first group."""
    return re.compile(rf"({ID})\.{tag}-[0-9a-f]{{16}}\.{suffix}")


def file_fingerprint(file: Path) -> tuple[int, ...]:
    """What is different as soon as somebody has altered or replaced a file; () if it is missing."""
    try:
        stat = file.stat()
    except OSError:
        return ()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _is_full(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


affinity: ContextVar[str | None] = ContextVar("affinity", default=None)
"""What the ids of new sessions end in: 4 hex digits, by which several replicas of a service share sessions out."""


def new_id() -> str:
    """An id for a session."""
    return f"sess-{secrets.token_hex(14)}{affinity.get() or secrets.token_hex(2)}"
