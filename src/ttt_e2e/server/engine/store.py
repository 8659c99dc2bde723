"""Sessions on disk: a database of records, and beside it a file per session, as `Session.save` writes it.

The record of a session names the file with its current version. A new version is a new file, which is on disk as a
whole before one transaction makes the record point to it; then the former file is removed. So the file behind a record
is always complete, after a `kill -9` or a power cut too, and what no record points to is a leftover. Leftovers are
removed when the store is opened, by names that only this database gives. Any other file is left alone. On a full disk
even a deletion may have no room in the database: then the file is emptied and renamed, and its record counts no more.

A session may have a document, a text of the API's own. It is replaced in the same transaction, and deleted with it. So
is its notebook, a folder that never changes once it is here, so that forks share it; the last of them removes it.
"""

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ttt_e2e.errors import UserError
from ttt_e2e.files import check_format, sync
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import SessionInfo, write_new_session_file
from ttt_e2e.server.engine.records import DamagedSessionError, NotebookRecord

DATABASE = "sessions.db"
FORMAT, VERSION = "store of sessions", 2  # version 1 had a JSON file per session in place of the database
_APPLICATION_ID = 0x74747465  # "ttte" in the header of the database
_SCHEMA = (
    "CREATE TABLE store (tag TEXT NOT NULL)",  # one row; the tag is in the names of the files of this database
    "CREATE TABLE sessions (id TEXT PRIMARY KEY, owner TEXT NOT NULL, created REAL NOT NULL, file TEXT NOT NULL,"
    " size INTEGER NOT NULL, info TEXT NOT NULL, digest TEXT NOT NULL) WITHOUT ROWID",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
)
_ADDED = (  # not in databases that earlier versions made
    "CREATE TABLE IF NOT EXISTS documents (session TEXT PRIMARY KEY, content TEXT NOT NULL, digest TEXT NOT NULL)"
    " WITHOUT ROWID",
    "CREATE TRIGGER IF NOT EXISTS documents_of_deleted_sessions AFTER DELETE ON sessions"
    " BEGIN DELETE FROM documents WHERE session = OLD.id; END",
    "CREATE TABLE IF NOT EXISTS notebooks (session TEXT PRIMARY KEY, file TEXT NOT NULL, record TEXT NOT NULL,"
    " digest TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TRIGGER IF NOT EXISTS notebooks_of_deleted_sessions AFTER DELETE ON sessions"
    " BEGIN DELETE FROM notebooks WHERE session = OLD.id; END",
)
_DAMAGE = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
ID = "sess-[0-9a-f]{32}"
_DELETED = ".deleted"
_REMEDY = "move its .session files to another folder, start with an empty one and import them"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SessionRecord:
    """A session of the store.

    id: "sess-" and 32 hex digits. created: Unix time. info: as in the header of its file. notebook: None if it keeps
    none.
    """

    id: str
    owner: str
    created: float
    file: str
    size: int
    info: SessionInfo
    notebook: NotebookRecord | None


@dataclass(frozen=True)
class NewNotebook:
    """A notebook in a temporary folder of the store; its record has no `file` yet."""

    folder: Path
    record: NotebookRecord


class Store:
    """The sessions in `folder`, which is created if it is missing, readable by its owner only.

    One process can open a store at a time. Its methods can be called from any thread. Where they write, they raise
    UserError if the disk is full or not writable, and then nothing has changed. lost: None until the folder or its
    database was found to be removed or replaced; then a sentence about it, and every write fails.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.lost: str | None = None
        self._mutex = threading.Lock()
        path = self.folder / DATABASE
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(PermissionError):  # others' folders need not be readable
                sync(self.folder.parent)
            if not path.exists() or not path.stat().st_size:
                self._check_empty()
            with suppress(FileExistsError):  # SQLite would make it readable by others
                os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
            self._opened = self._identity()
            self._database = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error
        try:
            self._open(path)
        except BaseException as error:
            self._database.close()
            if not isinstance(error, OSError | sqlite3.Error | UnicodeDecodeError):
                raise
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF  # without one: not UTF-8
            if code == sqlite3.SQLITE_BUSY:
                message = f"The sessions in {self.folder} are in use by another process; stop it first."
                raise UserError(message) from error
            if not isinstance(error, OSError) and code in _DAMAGE:
                raise self._damaged(_reason(error)) from error
            raise self._unusable(error) from error

    def records(self) -> list[SessionRecord]:
        """All records, the oldest first. Raises UserError if the database was altered."""
        records, deleted = [], {path.stem for path in self.folder.glob(f"*{_DELETED}")}
        notebooks = {}
        for *row, digest in self._execute("SELECT * FROM notebooks"):
            if digest != _digest(row):
                raise self._damaged("a record was altered")
            notebooks[row[0]] = NotebookRecord(file=row[1], **json.loads(row[2]))
        for *row, digest in self._execute("SELECT * FROM sessions ORDER BY created, id"):
            if digest != _digest(row):
                raise self._damaged("a record was altered")
            id, owner, created, file, size, info = row
            if file in deleted:
                continue
            facts = SessionInfo.from_facts(json.loads(info))
            records.append(SessionRecord(id, owner, created, file, size, facts, notebooks.get(id)))
        return records

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
            rows = self._execute("SELECT session, content, digest FROM documents WHERE session = ?", record.id)
        if any(digest != _digest(row) for *row, digest in rows):
            _log.error("The document of the session %s in %s was altered.", record.id, self.folder / DATABASE)
            raise DamagedSessionError
        return str(rows[0][1]) if rows else None

    def set_document(self, record: SessionRecord, document: str) -> SessionRecord:
        """Save the document of a session, which stays as it is; returns its record."""
        with self._writing("save a document"):
            self._execute(*_document_row(record.id, document))
        return record

    def delete(self, record: SessionRecord) -> None:
        """Delete a session. On a full disk its file makes room for that; see above if this is not enough."""
        with self._writing("delete a session"):
            try:
                self._execute("DELETE FROM sessions WHERE id = ?", record.id)
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
            self._execute("DELETE FROM sessions WHERE file = ?", file)
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
        if not self.lost:
            with suppress(FileNotFoundError, NotADirectoryError):
                if self._identity() == self._opened:
                    return
            self.lost = (
                f"The folder {self.folder} or {DATABASE} in it was removed or replaced while the service was running, "
                "so it has stopped; put the folder back and start it again."
            )
            _log.error("%s", self.lost)
        raise UserError(self.lost) from OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def _open(self, path: Path) -> None:
        self._execute("PRAGMA locking_mode = EXCLUSIVE")  # from the first transaction until the database is closed
        self._execute("PRAGMA synchronous = FULL")
        self._execute("BEGIN EXCLUSIVE")
        ((application,),), ((version,),) = (
            self._execute(f"PRAGMA {name}") for name in ("application_id", "user_version")
        )
        if not application and not self._execute("SELECT 1 FROM sqlite_master"):
            for statement in _SCHEMA:
                self._execute(statement)
            self._execute("INSERT INTO store VALUES (?)", secrets.token_hex(4))
        elif application != _APPLICATION_ID:
            raise UserError(f"{path} is the database of another program, so it is kept; name another folder.")
        else:
            check_format({"format": FORMAT, "version": version}, path, FORMAT, VERSION, _REMEDY)
        self._execute("COMMIT")
        self._execute("PRAGMA journal_mode = PERSIST")
        ((verdict,),) = self._execute("PRAGMA integrity_check(1)")
        tags = self._execute("SELECT tag FROM store")
        if verdict != "ok" or len(tags) != 1 or not re.fullmatch("[0-9a-f]{8}", str(tags[0][0])):
            raise self._damaged(verdict)
        for statement in _ADDED:
            self._execute(statement)
        self._tag = str(tags[0][0])
        self._temporary = f".tmp-{self._tag}-"
        self._remove_leftovers()

    def _check_empty(self) -> None:
        """Raise UserError if there are sessions in a folder without a database."""
        names = [path.name for path in self.folder.iterdir()]
        if any(re.fullmatch(rf"{ID}\.json", name) for name in names):
            raise UserError(
                f"{self.folder} is a {FORMAT} of format version 1, a JSON file per session, and this ttt-e2e reads "
                f"version {VERSION}; export the sessions with the ttt-e2e that wrote them, or {_REMEDY}."
            )
        if any(_files("[0-9a-f]{8}").fullmatch(name) for name in names):
            raise UserError(f"{self.folder} has sessions but no {DATABASE}; put it back, or {_REMEDY}.")

    def _remove_leftovers(self) -> None:
        records = self.records()
        kept = {record.file for record in records}
        kept |= {record.notebook.file for record in records if record.notebook}
        ours, notebooks = _files(self._tag), _files(self._tag, "notebook")
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
        file = f"{id}.{self._tag}-{secrets.token_hex(8)}.session"
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
                row = [id, owner, created, file, record.size, json.dumps(info.to_facts())]
                insert = "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?)"
                rows: list[tuple[Any, ...]] = [(insert, *row, _digest(row))]
                if document is not None:
                    rows.append(_document_row(id, document))
                if notebook is not None:
                    record = replace(record, notebook=notebook)
                    rows.append(_notebook_row(id, notebook))
                if len(rows) == 1:
                    self._execute(*rows[0])
                else:
                    self._execute_together(*rows)
            except (OSError, sqlite3.Error):
                self._discard(file)
                self._discard_notebook(moved)
                raise
        return record

    def _discard(self, file: str) -> None:
        """Remove a session file that no record points to; if this fails, opening the store does it."""
        try:
            if not self._execute("SELECT 1 FROM sessions WHERE file = ?", file):
                (self.folder / file).unlink(missing_ok=True)
        except (OSError, sqlite3.Error, UserError) as error:
            _log.warning("The unused file %s could not be removed: %s", self.folder / file, error)

    def _discard_notebook(self, notebook: NotebookRecord | None, deleted: str = "") -> None:
        """Likewise the folder of a notebook, unless other sessions than the one with the id `deleted` share it."""
        if notebook is not None:
            try:
                if not self._execute("SELECT 1 FROM notebooks WHERE file = ? AND session != ?", notebook.file, deleted):
                    shutil.rmtree(self.notebook_path(notebook))
            except (OSError, sqlite3.Error, UserError) as error:
                _log.warning("The unused folder %s could not be removed: %s", self.notebook_path(notebook), error)

    def _execute(self, statement: str, *values: object) -> list[Any]:
        """The rows that a statement gives. Outside of `_open`, each is a transaction of its own."""
        with self._mutex:
            self.check_in_place()
            return self._database.execute(statement, values).fetchall()

    def _execute_together(self, *statements: tuple[Any, ...]) -> None:
        """Execute statements, each with its values behind it, as one transaction."""
        with self._mutex:
            self.check_in_place()
            try:
                for statement, *values in (("BEGIN",), *statements, ("COMMIT",)):
                    self._database.execute(statement, values)
            finally:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")

    def _identity(self) -> list[tuple[int, int]]:
        stats = (path.stat() for path in (self.folder, self.folder / DATABASE))
        return [(stat.st_dev, stat.st_ino) for stat in stats]

    def _unusable(self, error: Exception) -> UserError:
        return UserError(f"Cannot keep sessions in {self.folder}: {_reason(error)}; mend that or name another folder.")

    def _damaged(self, reason: str) -> UserError:
        path = self.folder / DATABASE
        return UserError(f"{path} is damaged ({reason}); use a copy of the whole folder, or {_REMEDY}.")

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"Cannot {what} in {self.folder}: {_reason(error)}.") from error


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


def _document_row(id: str, document: str) -> tuple[str, str, str, str]:
    return "INSERT OR REPLACE INTO documents VALUES (?, ?, ?)", id, document, _digest([id, document])


def _notebook_row(id: str, notebook: NotebookRecord) -> tuple[str, ...]:
    facts = asdict(notebook)
    row = [id, facts.pop("file"), json.dumps(facts)]
    return "INSERT OR REPLACE INTO notebooks VALUES (?, ?, ?, ?)", *row, _digest(row)


def _digest(row: list[Any]) -> str:
    return hashlib.sha256(repr(row).encode()).hexdigest()


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
