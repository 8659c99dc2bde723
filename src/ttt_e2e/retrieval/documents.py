"""The documents of a notebook: where each text that has a name begins. No passage reaches into the next document.

Each function is given the database of a notebook, inside a transaction.
"""

import sqlite3

from ttt_e2e.data.text import printable
from ttt_e2e.retrieval import index_digest

MAX_NAME = 200  # characters
TABLE = "CREATE TABLE documents (start INTEGER PRIMARY KEY, name TEXT, digest TEXT)"


def document_name(name: str) -> str:
    """The name of a document as it is kept: in one line, and not too long."""
    return printable(name)[:MAX_NAME].strip()


def begin(db: sqlite3.Connection, start: int, name: str, *, continues: bool) -> None:
    """Let a document begin at the character `start`, the end of the text.

    name: as `document_name` gives it; "" for a text that has none, which continues one before it that has none either.
    continues: a text with the name of the one before it continues that one, too.
    """
    if name == at(db, start)[0] and (continues or not name):
        return
    db.execute(TABLE.replace("TABLE", "TABLE IF NOT EXISTS"))
    db.execute("INSERT OR REPLACE INTO documents VALUES (?, ?, ?)", (start, name, index_digest.of_row((start, name))))


def begins_at(db: sqlite3.Connection, character: int) -> bool:
    """Whether a document begins there."""
    return _exists(db) and bool(db.execute("SELECT 1 FROM documents WHERE start = ?", (character,)).fetchall())


def at(db: sqlite3.Connection, character: int) -> tuple[str, int]:
    """The name of the document at this character, and where it begins."""
    last = "SELECT name, start FROM documents WHERE start <= ? ORDER BY start DESC LIMIT 1"
    return (db.execute(last, (character,)).fetchone() if _exists(db) else None) or ("", 0)


def last_start(db: sqlite3.Connection) -> int:
    """Where the last document begins."""
    return max((start for start, _ in rows(db)), default=0)


def cut(db: sqlite3.Connection, characters: int) -> None:
    """Remove the documents that begin behind the first `characters` characters."""
    if _exists(db):
        db.execute("DELETE FROM documents WHERE start >= ?", (characters,))


def rows(db: sqlite3.Connection) -> list[tuple[int, str]]:
    """Where each document begins, and its name, in the order of the text."""
    return db.execute("SELECT start, name FROM documents ORDER BY start").fetchall() if _exists(db) else []


def are_valid(db: sqlite3.Connection) -> bool:
    """Whether all rows are those that were written."""
    found = db.execute("SELECT start, name, digest FROM documents").fetchall() if _exists(db) else []
    return all(index_digest.of_row(row) == digest for *row, digest in found)


def _exists(db: sqlite3.Connection) -> bool:
    return bool(db.execute("PRAGMA table_info(documents)").fetchall())
