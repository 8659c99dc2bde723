"""The database of a store: the records of sessions, their documents and notebooks, each row with a digest.

SQLite keeps it, and the process that has opened it keeps all others out.
"""

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import sqlite3
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ttt_e2e.errors import UserError
from ttt_e2e.files import check_format
from ttt_e2e.inference.session_file import SessionInfo
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
REMEDY = "move its .session files to another folder, start with an empty one and import them"
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


class SessionDatabase:
    """The database in `folder`, which is made if it is missing, readable by its owner only.

    Its methods can be called from any thread. They raise sqlite3.Error, and UserError if a row was altered or the
    database is not in its place any more. tag: 8 hex digits, which are in the names of all files of this database.
    lost: None until the folder or the database was found to be removed or replaced; then a sentence about it.
    """

    def __init__(self, folder: Path) -> None:
        self.lost: str | None = None
        self._folder, self._path = folder, folder / DATABASE
        self._mutex = threading.Lock()
        with suppress(FileExistsError):  # SQLite would make it readable by others
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL, 0o600))
        self._opened = self._identity()
        self._connection = sqlite3.connect(self._path, timeout=0, isolation_level=None, check_same_thread=False)

    def open(self) -> None:
        """Take the database, and check it. Raises UserError if it is another program's or damaged."""
        self.execute("PRAGMA locking_mode = EXCLUSIVE")  # from the first transaction until the database is closed
        self.execute("PRAGMA synchronous = FULL")
        self.execute("BEGIN EXCLUSIVE")
        ((application,),), ((version,),) = (
            self.execute(f"PRAGMA {name}") for name in ("application_id", "user_version")
        )
        if not application and not self.execute("SELECT 1 FROM sqlite_master"):
            for statement in _SCHEMA:
                self.execute(statement)
            self.execute("INSERT INTO store VALUES (?)", secrets.token_hex(4))
        elif application != _APPLICATION_ID:
            raise UserError(f"{self._path} is the database of another program, so it is kept; name another folder.")
        else:
            check_format({"format": FORMAT, "version": version}, self._path, FORMAT, VERSION, REMEDY)
        self.execute("COMMIT")
        self.execute("PRAGMA journal_mode = PERSIST")
        ((verdict,),) = self.execute("PRAGMA integrity_check(1)")
        tags = self.execute("SELECT tag FROM store")
        if verdict != "ok" or len(tags) != 1 or not re.fullmatch("[0-9a-f]{8}", str(tags[0][0])):
            raise self._damaged(verdict)
        for statement in _ADDED:
            self.execute(statement)
        self.tag = str(tags[0][0])

    def close(self) -> None:
        """Release the database for other processes."""
        self._connection.close()

    def explain(self, error: Exception) -> UserError | None:
        """What an error while opening says about the database; None if it is not about that."""
        if isinstance(error, OSError):
            return None
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF  # without one: not UTF-8
        if code == sqlite3.SQLITE_BUSY:
            return UserError(f"The sessions in {self._folder} are in use by another process; stop it first.")
        return self._damaged(reason(error)) if code in _DAMAGE else None

    def records(self) -> list[SessionRecord]:
        """All records, the oldest first. Raises UserError if the database was altered."""
        notebooks = {}
        for *row, digest in self.execute("SELECT * FROM notebooks"):
            if digest != _digest(row):
                raise self._damaged("a record was altered")
            notebooks[row[0]] = NotebookRecord(file=row[1], **json.loads(row[2]))
        records = []
        for *row, digest in self.execute("SELECT * FROM sessions ORDER BY created, id"):
            if digest != _digest(row):
                raise self._damaged("a record was altered")
            id, owner, created, file, size, info = row
            facts = SessionInfo.from_facts(json.loads(info))
            records.append(SessionRecord(id, owner, created, file, size, facts, notebooks.get(id)))
        return records

    def save(self, record: SessionRecord, document: str | None, notebook: NotebookRecord | None) -> None:
        """Write a record, all or nothing. document, notebook: None keeps what it has."""
        row = [record.id, record.owner, record.created, record.file, record.size, json.dumps(record.info.to_facts())]
        insert = "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?)"
        rows: list[tuple[Any, ...]] = [(insert, *row, _digest(row))]
        if document is not None:
            rows.append(_document_row(record.id, document))
        if notebook is not None:
            rows.append(_notebook_row(record.id, notebook))
        if len(rows) == 1:
            self.execute(*rows[0])
        else:
            self._execute_together(*rows)

    def document(self, id: str) -> str | None:
        """The document of a session, if it has one. Raises DamagedSessionError if it was altered."""
        rows = self.execute("SELECT session, content, digest FROM documents WHERE session = ?", id)
        if any(digest != _digest(row) for *row, digest in rows):
            _log.error("The document of the session %s in %s was altered.", id, self._path)
            raise DamagedSessionError
        return str(rows[0][1]) if rows else None

    def set_document(self, id: str, document: str) -> None:
        """Save the document of a session."""
        self.execute(*_document_row(id, document))

    def delete(self, id: str) -> None:
        """Delete a session with its document and notebook."""
        self.execute("DELETE FROM sessions WHERE id = ?", id)

    def delete_file(self, file: str) -> None:
        """Delete the session whose file this is."""
        self.execute("DELETE FROM sessions WHERE file = ?", file)

    def has_file(self, file: str) -> bool:
        """Whether a record points to this file of a session."""
        return bool(self.execute("SELECT 1 FROM sessions WHERE file = ?", file))

    def has_notebook(self, file: str, deleted: str) -> bool:
        """Whether the record of a session other than the one with the id `deleted` points to this notebook."""
        return bool(self.execute("SELECT 1 FROM notebooks WHERE file = ? AND session != ?", file, deleted))

    def check_in_place(self) -> None:
        """Raise UserError if the folder or its database is not the one that was opened, and ever after."""
        if not self.lost:
            with suppress(FileNotFoundError, NotADirectoryError):
                if self._identity() == self._opened:
                    return
            self.lost = (
                f"The folder {self._folder} or {DATABASE} in it was removed or replaced while the service was running, "
                "so it has stopped; put the folder back and start it again."
            )
            _log.error("%s", self.lost)
        raise UserError(self.lost) from OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def execute(self, statement: str, *values: object) -> list[Any]:
        """The rows that a statement gives. Outside of `open`, each is a transaction of its own."""
        with self._mutex:
            self.check_in_place()
            return self._connection.execute(statement, values).fetchall()

    def _execute_together(self, *statements: tuple[Any, ...]) -> None:
        """Execute statements, each with its values behind it, as one transaction."""
        with self._mutex:
            self.check_in_place()
            try:
                for statement, *values in (("BEGIN",), *statements, ("COMMIT",)):
                    self._connection.execute(statement, values)
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def _identity(self) -> list[tuple[int, int]]:
        stats = (path.stat() for path in (self._folder, self._path))
        return [(stat.st_dev, stat.st_ino) for stat in stats]

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self._path} is damaged ({reason}); use a copy of the whole folder, or {REMEDY}.")


def _document_row(id: str, document: str) -> tuple[str, str, str, str]:
    return "INSERT OR REPLACE INTO documents VALUES (?, ?, ?)", id, document, _digest([id, document])


def _notebook_row(id: str, notebook: NotebookRecord) -> tuple[str, ...]:
    facts = asdict(notebook)
    row = [id, facts.pop("file"), json.dumps(facts)]
    return "INSERT OR REPLACE INTO notebooks VALUES (?, ?, ?, ?)", *row, _digest(row)


def _digest(row: list[Any]) -> str:
    return hashlib.sha256(repr(row).encode()).hexdigest()


def reason(error: Exception) -> str:
    """What went wrong, without the number and the path of an OSError."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
