"""The digest of a notebook's index, so that no flipped bit in it hides a passage: FTS5 notices few of them."""

import hashlib
import sqlite3

TABLE = "CREATE TABLE index_digest (digest TEXT)"


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
