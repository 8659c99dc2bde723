"""Digests of a notebook's rows, and of its index, so that no flipped bit in it hides a passage: FTS5 notices few."""

import hashlib
import sqlite3
from collections.abc import Sequence

from ttt_e2e.errors import UserError

TABLE = "CREATE TABLE index_digest (digest TEXT)"


class AlteredNotebookError(UserError):
    """The database of a notebook was altered or damaged."""


def of_row(row: Sequence[object]) -> str | None:
    """Of a row of whole numbers and, at the end, a text; None if it has values of other types."""
    if not isinstance(row[-1], str) or any(type(value) is not int for value in row[:-1]):
        return None
    return hashlib.blake2b(" ".join(map(str, row)).encode(), digest_size=16).hexdigest()


def is_damaged(db: sqlite3.Connection) -> bool:
    """Whether the index is another than the one whose digest was kept, if one was."""
    if not db.execute("PRAGMA table_info(index_digest)").fetchall():
        return False  # an older notebook
    return any(kept != _digest(db) for (kept,) in db.execute("SELECT digest FROM index_digest"))


def keep(db: sqlite3.Connection) -> None:
    """Keep the digest, in a transaction after the one that changed the index: FTS5 writes its tables at the end."""
    forget(db)
    db.execute("INSERT INTO index_digest VALUES (?)", (_digest(db),))


def forget(db: sqlite3.Connection) -> None:
    """Keep no digest, before the index changes."""
    db.execute(TABLE.replace("TABLE", "TABLE IF NOT EXISTS"))
    db.execute("DELETE FROM index_digest")


def _digest(db: sqlite3.Connection) -> str:
    """Of all that a search in the table `words` depends on."""
    small = ("size, indexed FROM settings", "* FROM words_idx", "* FROM words_config")
    sizes = "group_concat(id || quote(sz)) FROM words_docsize"  # as one string: three times as fast as by rows
    rows = [db.execute(f"SELECT {what}").fetchall() for what in (*small, sizes)]
    digest = hashlib.blake2b(repr(rows).encode(), digest_size=16)
    for number, block in db.execute("SELECT id, block FROM words_data ORDER BY id"):
        digest.update(b"%d " % number)
        digest.update(block if isinstance(block, bytes) else repr(block).encode())
    return digest.hexdigest()
