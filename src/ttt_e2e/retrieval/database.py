"""The database of a notebook: opened and checked, for one writer at a time, its transactions and its errors."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ttt_e2e.errors import UserError
from ttt_e2e.files import check_format, lock_folder
from ttt_e2e.retrieval import documents, index_digest
from ttt_e2e.retrieval.index_digest import AlteredNotebookError

FORMAT, VERSION = "notebook", 2
MIN_SIZE, MAX_SIZE = 20, 4000  # of a passage, in characters
DATABASE = "notebook.db"
_APPLICATION_ID = 0x7474_6E62  # "ttnb"; in the file's header, like the version
_SCHEMA = (
    "CREATE TABLE settings (size INTEGER, indexed INTEGER, probe BLOB)",
    "CREATE TABLE passages (number INTEGER PRIMARY KEY, start INTEGER, stop INTEGER, start_byte INTEGER, "
    "stop_byte INTEGER, is_searched INTEGER, text TEXT, digest TEXT, vector BLOB)",
    # `search_index` separates words by spaces; this tokenizer leaves them as they are.
    "CREATE VIRTUAL TABLE words USING fts5(entries, content='', tokenize='ascii')",
)
_WAIT_SECONDS = 30.0  # for another connection's transaction, which takes milliseconds
_CANNOT = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_NOMEM")


class NotebookDatabase:
    """The database in `folder`, until `close`. To be used by the thread that opened it.

    size: of the passages of a new notebook, in characters. create: make a new one if there is none. Raises UserError as
    `Notebook` does.
    """

    size: int  # of this notebook's passages

    def __init__(self, folder: Path, size: int, create: bool) -> None:
        self.folder = folder
        self._connection: sqlite3.Connection | None = None
        self._write_lock: IO[Any] | None = None
        try:
            with self.errors("open"):
                self._check_folder(create)
                path = self.folder / DATABASE
                self._connection = db = sqlite3.connect(path, timeout=_WAIT_SECONDS, isolation_level=None)
                db.execute("PRAGMA trusted_schema = OFF")
                db.execute("PRAGMA cell_size_check = ON")
                db.execute("PRAGMA synchronous = NORMAL")  # in WAL mode a kill loses nothing
                if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    if not create:
                        raise self._missing()
                    self._create(size)
                self.size = self._checked_size(db)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the files, and let other processes write."""
        if self._connection is not None:
            self._connection.close()
        if self._write_lock is not None:
            self._write_lock.close()
        self._connection = self._write_lock = None

    @property
    def connection(self) -> sqlite3.Connection:
        """The open connection. Raises UserError once it was closed."""
        if self._connection is None:
            raise UserError(f"The notebook {self.folder} is closed; open it again.")
        return self._connection

    def lock(self) -> None:
        """Become the only writer until `close`, as every method that writes does.

        Raises UserError if another process, or another `Notebook`, is.
        """
        _ = self.connection  # raises if it was closed
        if self._write_lock is None:
            in_use = (
                f"The notebook {self.folder} is in use; close it there first, or wait until that process has ended."
            )
            with self.errors("write to"):
                self._write_lock = lock_folder(self.folder, in_use)

    def _check_folder(self, create: bool) -> None:
        """Raise UserError if the folder is or holds something else; make it if it is missing and `create`."""
        if (self.folder / DATABASE).exists():
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is not a folder, as a notebook is; choose another name.")
        if (self.folder / "notebook.json").exists():
            raise UserError(
                f"{self.folder} is a notebook of format version 1, and this ttt-e2e reads version {VERSION}; "
                "move it away, and record its text again (it is in text.txt)."
            )
        if not create:
            raise self._missing()
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(not file.name.startswith((".", DATABASE)) for file in self.folder.iterdir()):
            raise UserError(f"{self.folder} is not a notebook and not empty; it is left unchanged, choose another one.")

    def _create(self, size: int) -> None:
        self.lock()
        self.connection.execute("PRAGMA journal_mode = WAL")
        with self.transaction("open") as db:
            if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:  # nobody else was quicker
                for statement in (*_SCHEMA, index_digest.TABLE):
                    db.execute(statement)
                db.execute("INSERT INTO settings (size, indexed) VALUES (?, 0)", (size,))
                db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {VERSION}")
        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # a notebook exists whatever befalls the WAL
        if self._write_lock is not None:
            self._write_lock.close()
            self._write_lock = None

    def _checked_size(self, db: sqlite3.Connection) -> int:
        """The size of the notebook's passages. Raises UserError if the database is something else, or damaged."""
        if db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
            raise UserError(f"{self.folder / DATABASE} is not a notebook; choose another one.")
        found = {"format": FORMAT, "version": db.execute("PRAGMA user_version").fetchone()[0]}
        check_format(found, self.folder, FORMAT, VERSION, "record its text again")
        schema = db.execute("SELECT sql FROM sqlite_master WHERE name NOT LIKE 'words~_%' ESCAPE '~' ORDER BY rowid")
        found_schema, optional = tuple(sql for (sql,) in schema), {index_digest.TABLE, documents.TABLE}
        if found_schema[:3] != _SCHEMA or not optional.issuperset(found_schema[3:]) or not documents.are_valid(db):
            raise self.altered()
        db.execute("SELECT rowid FROM words LIMIT 1").fetchall()  # fails if FTS5 is missing
        sizes = [size for (size,) in db.execute("SELECT size FROM settings")]
        if len(sizes) != 1 or type(sizes[0]) is not int or not MIN_SIZE <= sizes[0] <= MAX_SIZE:
            raise self.altered()
        return sizes[0]

    @contextmanager
    def transaction(self, action: str, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
        """A transaction that is undone if the block fails. begin: "BEGIN" for one that only reads."""
        db = self.connection
        with self.errors(action):
            try:
                db.execute(begin)
                yield db
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")

    @contextmanager
    def errors(self, action: str) -> Iterator[None]:
        """Make a UserError of what SQLite or the operating system reports. action: such as "write to"."""
        try:
            yield
        except sqlite3.ProgrammingError:  # such as the use by another thread
            raise
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:  # the last where a damaged name is in a message
            name = getattr(error, "sqlite_errorname", "")
            if "no such module" in str(error):
                message = "This Python's SQLite lacks FTS5, which a notebook needs; use a Python whose SQLite has it."
            elif name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                message = f"The notebook {self.folder} is in use; try again."
            elif isinstance(error, OSError) or name.startswith(_CANNOT):
                reason = error.strerror if isinstance(error, OSError) else error
                message = f"Cannot {action} the notebook {self.folder}: {reason}; what it holds is kept."
            else:
                raise self.altered() from error
            raise UserError(message) from error

    def _missing(self) -> UserError:
        return UserError(f"There is no notebook {self.folder}; record one with `ttt-e2e read --notebook`.")

    def altered(self) -> AlteredNotebookError:
        """The error that says that something in the notebook is not what was written."""
        return AlteredNotebookError(f"The notebook {self.folder} was altered or damaged; use another copy of it.")
