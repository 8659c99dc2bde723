"""A notebook: the exact text that a session has read, in passages that can be searched.

Fast weights keep the gist of a text; a notebook keeps its words. It is a folder with an SQLite database, `notebook.db`,
and the files that SQLite has beside one in use. Its tables:

    settings    a row: the size of the passages, how many of them are indexed, and by which embedding
    passages    the text, overlapping; the last passage grows with it. A row has a digest, and perhaps a vector
    words       the index of the passages' words (FTS5), without their text
    index_digest    of the index, kept when the notebook is closed; older notebooks lack this table
    documents   where the texts that have names begin; notebooks without names lack this table

Whatever is added is in one transaction, so that a killed process leaves all of it or nothing. Passages are indexed many
at a time, and the rest when there is a search. One process adds text at a time; others may search. Memory does not grow
with the text, except for a search with an embedding.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from ttt_e2e.data.text import short_chunks, slices
from ttt_e2e.errors import UserError
from ttt_e2e.files import check_format, lock_folder
from ttt_e2e.retrieval import documents, index_digest
from ttt_e2e.retrieval.index_digest import AlteredNotebookError
from ttt_e2e.retrieval.passages import Excerpt, Passage
from ttt_e2e.retrieval.search_index import (
    PROBE,
    Embed,
    fuse,
    index_words,
    match_expression,
    pack_vector,
    unit_vectors,
    unpack_vector,
)

FORMAT, VERSION = "notebook", 2
SIZE = 400
_MIN_SIZE, _MAX_SIZE = 20, 4000
DATABASE = "notebook.db"
_APPLICATION_ID = 0x7474_6E62  # "ttnb"; in the file's header, like the version
_SCHEMA = (
    "CREATE TABLE settings (size INTEGER, indexed INTEGER, probe BLOB)",
    "CREATE TABLE passages (number INTEGER PRIMARY KEY, start INTEGER, stop INTEGER, start_byte INTEGER, "
    "stop_byte INTEGER, is_searched INTEGER, text TEXT, digest TEXT, vector BLOB)",
    # `search_index` separates words by spaces; this tokenizer leaves them as they are.
    "CREATE VIRTUAL TABLE words USING fts5(entries, content='', tokenize='ascii')",
)
_COLUMNS = "number, start, stop, start_byte, stop_byte, is_searched, text"
_BLOCK = 1 << 16  # characters that are added in one transaction
_INDEXED_AT_ONCE = 64
_EMBEDDED_AT_ONCE = 256
_MANY = 1 << 62  # more passages than there can be
_WAIT_SECONDS = 30.0  # for another connection's transaction, which takes milliseconds
_CANNOT = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_NOMEM")


def notebook_folder(session: Path) -> Path:
    """The notebook of a session file: the folder beside it with ".notebook" appended to its name."""
    return session.with_name(f"{session.name}.notebook")


def passage_size(window: int) -> int:
    """The passage size for a model of this window: a passage has about a quarter of its tokens, or less."""
    return max(_MIN_SIZE, min(SIZE, 3 * window // 4))


class Notebook:
    """The notebook in `folder`, until `close` or the end of `with`. To be used by the thread that opened it.

    Args:
        folder: Of the notebook.
        size: Approximate number of characters of a passage (see `Excerpt.cut`); 400 are 60 to 110 English words.
            Used for a new notebook only.
        embed: Rank by meaning as well as by words; see `search_index.load_embed`.
        create: Make a new notebook if there is none.

    Raises:
        UserError: If the notebook is missing or not readable, if the folder is something else or of an older version,
            if the database is damaged, as far as that shows without reading all of it (`search` checks the index, and
            like `text` what it returns), or if this Python's SQLite lacks FTS5.
    """

    def __init__(self, folder: Path, *, size: int = SIZE, embed: Embed | None = None, create: bool = True) -> None:
        if not _MIN_SIZE <= size <= _MAX_SIZE:
            problem = "too short to be found" if size < _MIN_SIZE else "too long to be shown"
            raise UserError(f"Passages of {size} characters are {problem}; use {_MIN_SIZE} to {_MAX_SIZE:,}.")
        self.folder = Path(folder)
        self.embed = embed
        self._connection: sqlite3.Connection | None = None
        self._write_lock: IO[Any] | None = None
        self._has_new_index = False
        self._verified: int | None = None  # SQLite's `data_version` when the index was last found undamaged
        try:
            with self._errors("open"):
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
        """Release the files, and let other processes write. What was added is on the disk already."""
        if self._connection is not None:
            with suppress(UserError):  # what was added is there without it
                self._seal_index()
            self._connection.close()
        if self._write_lock is not None:
            self._write_lock.close()
        self._connection = self._write_lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def characters(self) -> int:
        """Length of the recorded text."""
        with self._transaction("read", "BEGIN") as db:
            return self._last_passage(db)[1].stop

    def documents(self) -> list[tuple[int, str]]:
        """Where each document begins, and its name, in order; none for a text without a name that comes first."""
        with self._transaction("read", "BEGIN") as db:
            return documents.rows(db)

    def lock(self) -> None:
        """Become the only writer until `close`, as every method that writes does.

        Raises UserError if another process, or another `Notebook`, is.
        """
        self._open_connection()
        if self._write_lock is None:
            in_use = (
                f"The notebook {self.folder} is in use; close it there first, or wait until that process has ended."
            )
            with self._errors("write to"):
                self._write_lock = lock_folder(self.folder, in_use)

    def add(self, text: str) -> None:
        """Append to the text. The passages depend on the whole text, not on how it was split.

        Once this returns, a killed process loses nothing of `text`. Raises UserError for lone surrogates, for a full
        disk, and if the notebook is closed, damaged or in use; what was added before is kept.
        """
        self.lock()
        for start, block in zip(range(0, len(text), _BLOCK), slices(text, _BLOCK), strict=True):
            try:
                block.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"Half of a surrogate pair at character {start + error.start} is not text.") from error
            with self._transaction("write to") as db:
                number, last = self._last_passage(db)
                if last.text and documents.begins_at(db, last.stop):
                    number, last = number + 1, Excerpt("", last.stop, last.stop_byte)
                self._replace_from(db, number, last._replace(text=last.text + block))

    def record(
        self, chunks: Iterable[str], start: int | None = None, name: str = "", *, continues: bool = False
    ) -> Iterator[str]:
        """Yield the chunks of a text, each after it was added: `session.read_stream(notebook.record(chunks))`.

        start: the character of the notebook at which this text begins (default: its end). Text that it already has from
        there on, of an earlier reading that did not reach its end, is not added twice. name: of the document, as
        `documents.document_name` gives it, or "". continues: the document before, if it has this name, is continued.
        A complete text also survives a power cut. Raises UserError for another text there, and as `add` does.
        """
        self.lock()
        start = self.characters if start is None else start
        known = self.characters - start
        if start < 0 or known < 0:
            raise UserError(f"The notebook {self.folder} has {self.characters} characters; no text begins at {start}.")
        recorded, held, begins = self.text(start), "", not known
        for block in short_chunks(chunks):
            if begins:
                with self._transaction("write to") as db:
                    documents.begin(db, start, name, continues=continues)
            begins = False
            while len(held) < min(len(block), known):
                held += next(recorded)
            same, held = held[: len(block)], held[len(block) :]
            if not block.startswith(same):
                raise UserError(
                    f"The notebook {self.folder} holds another text at character {self.characters - known} "
                    f"to {self.characters - known + len(same)}; read the same text again, or start a new one."
                )
            known -= len(same)
            self.add(block[len(same) :])
            yield block
        if known:
            raise UserError(
                f"The notebook {self.folder} holds {known} characters more than this text has; "
                "read the same text again, or start a new one."
            )
        self._complete_index()
        self._seal_index()
        with self._errors("write to"):
            self._open_connection().execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def text(self, start: int = 0) -> Iterator[str]:
        """The recorded text from character `start` on, in pieces. Raises UserError if it was altered."""
        number, start = -1, min(max(0, start), self.characters)
        while True:
            with self._transaction("read", "BEGIN") as db:
                rows = self._rows(db, "number > ? AND stop > ? ORDER BY number LIMIT 64", number, start)
            if not rows:
                return
            for number, passage in rows:  # noqa: B007 (`number` is where the next rows begin)
                if passage.start > start:
                    raise self._altered()  # a passage is missing
                yield passage.text[start - passage.start :]
                start = passage.stop

    def cut(self, characters: int) -> None:
        """Remove all but the first `characters` characters of the text, as if they had never been added.

        Raises UserError as `add` does.
        """
        self.lock()
        characters = max(0, characters)
        with self._transaction("write to") as db:
            documents.cut(db, characters)
        if characters >= self.characters:
            return
        with self._transaction("read", "BEGIN") as db:
            # Those that begin earlier were full by then, see `Excerpt.cut`, or belong to another document.
            earliest = max(documents.last_start(db), characters - 2 * self.size + 1)
            number, first = self._rows(db, "start >= ? ORDER BY number LIMIT 1", earliest)[0]
        text, length = "", characters - first.start
        for piece in self.text(first.start):
            text += piece
            if len(text) >= length:
                break
        with self._transaction("write to") as db:
            self._replace_from(db, number, first._replace(text=text[:length]))

    def replace(self, source: Path | None, size: int) -> None:
        """Become a copy of the notebook `source`, or an empty one with passages of `size` characters (None).

        Whatever was in the notebook is gone then; until then, and if the process is killed, nothing of it. Raises
        UserError as `add` does, and if `source` is in use or damaged.
        """
        self.lock()
        if source is None:
            with self._transaction("write to") as db:
                db.execute("DELETE FROM passages")
                documents.cut(db, 0)
                index_digest.forget(db)
                db.execute("INSERT INTO words(words) VALUES ('delete-all')")
                db.execute("UPDATE settings SET size = ?, indexed = 0", (size,))
            self.size = size
            return
        with Notebook(source, create=False) as other:
            other.lock()
            with self._errors("write to"):
                other._open_connection().backup(self._open_connection())
        self.size = other.size

    def search(self, query: str, count: int = 3) -> list[Passage]:
        """At most `count` passages that match `query`, the best first; without `embed` each shares a word with it.

        Words are compared regardless of case and accents and weighted by BM25 (k1 1.2, b 0.75). A run of characters in
        a script without spaces between words is a word. With `embed` the score is that of reciprocal rank fusion of the
        ranks by words and by cosine. Raises UserError if the notebook is closed or was altered.
        """
        if count < 1:
            raise UserError(f"Cannot search for {count} passages; ask for at least one.")
        self._complete_index()
        if self.embed is not None:
            self._complete_vectors(self.embed)
        with self._transaction("search", "BEGIN") as db:
            scores: dict[int, float] = {}
            if expression := match_expression(query):
                ranking = "SELECT rowid, -bm25(words) FROM words WHERE words MATCH ? ORDER BY bm25(words), 1 LIMIT ?"
                scores = dict(db.execute(ranking, (expression, min(count, _MANY) if self.embed is None else _MANY)))
                if None in scores.values():  # of a damaged index
                    raise self._altered()
            if self.embed is not None:
                rows = db.execute(
                    "SELECT number, vector FROM passages WHERE vector IS NOT NULL ORDER BY number"
                ).fetchall()
                fused = fuse(rows, scores, unit_vectors(self.embed, [query])[0])
                if fused is None:
                    raise self._altered()
                scores = fused
            best = sorted(scores, key=lambda number: (-scores[number], number))[:count]
            found = (self._passage(db, number) for number in best)
            return [one.as_passage(number, scores[number], *documents.at(db, one.start)) for number, one in found]

    # -- the database ----------------------------------------------------------------------------------------------

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
        self._open_connection().execute("PRAGMA journal_mode = WAL")
        with self._transaction("open") as db:
            if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:  # nobody else was quicker
                for statement in (*_SCHEMA, index_digest.TABLE):
                    db.execute(statement)
                db.execute("INSERT INTO settings (size, indexed) VALUES (?, 0)", (size,))
                db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {VERSION}")
        self._open_connection().execute("PRAGMA wal_checkpoint(TRUNCATE)")  # a notebook exists whatever befalls the WAL
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
            raise self._altered()
        db.execute("SELECT rowid FROM words LIMIT 1").fetchall()  # fails if FTS5 is missing
        sizes = [size for (size,) in db.execute("SELECT size FROM settings")]
        if len(sizes) != 1 or type(sizes[0]) is not int or not _MIN_SIZE <= sizes[0] <= _MAX_SIZE:
            raise self._altered()
        return sizes[0]

    def _open_connection(self) -> sqlite3.Connection:
        if self._connection is None:
            raise UserError(f"The notebook {self.folder} is closed; open it again.")
        return self._connection

    @contextmanager
    def _transaction(self, action: str, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
        """A transaction that is undone if the block fails. begin: "BEGIN" for one that only reads."""
        db = self._open_connection()
        with self._errors(action):
            try:
                db.execute(begin)
                yield db
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
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
                raise self._altered() from error
            raise UserError(message) from error

    def _missing(self) -> UserError:
        return UserError(f"There is no notebook {self.folder}; record one with `ttt-e2e read --notebook`.")

    def _altered(self) -> AlteredNotebookError:
        return AlteredNotebookError(f"The notebook {self.folder} was altered or damaged; use another copy of it.")

    # -- passages --------------------------------------------------------------------------------------------------

    def _rows(self, db: sqlite3.Connection, where: str, *values: int) -> list[tuple[int, Excerpt]]:
        """Passages with their numbers, each checked against its digest."""
        passages = []
        for *row, digest in db.execute(f"SELECT {_COLUMNS}, digest FROM passages WHERE {where}", values):
            if digest != index_digest.of_row(row):
                raise self._altered()
            passages.append((row[0], Excerpt(row[6], row[1], row[3])))
        return passages

    def _passage(self, db: sqlite3.Connection, number: int) -> tuple[int, Excerpt]:
        if not (rows := self._rows(db, "number = ?", number)):
            raise self._altered()
        return rows[0]

    def _last_passage(self, db: sqlite3.Connection) -> tuple[int, Excerpt]:
        """The passage that the text ends with, which is not full, and its number."""
        return (self._rows(db, "number = (SELECT max(number) FROM passages)") or [(0, Excerpt())])[0]

    def _replace_from(self, db: sqlite3.Connection, number: int, rest: Excerpt) -> None:
        """Remove the passages from `number` on, and add those of `rest` in their place."""
        if (indexed := self._indexed(db)) > number:
            self._index(db, number, indexed, "delete")
            indexed = number
        db.execute("DELETE FROM passages WHERE number >= ?", (number,))
        stop = self._passage(db, number - 1)[1].stop if number else 0
        for last, passage in enumerate(rest.cut(self.size), number):
            # Text that is blank, or all in the passage before, is kept but not searched.
            is_searched = bool(passage.text[stop - passage.start :].strip())
            stop = passage.stop
            row = (last, passage.start, stop, passage.start_byte, passage.stop_byte, int(is_searched), passage.text)
            values = (*row, index_digest.of_row(row))
            db.execute(f"INSERT INTO passages ({_COLUMNS}, digest) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        if last - indexed >= _INDEXED_AT_ONCE:
            self._index(db, indexed, last)

    def _indexed(self, db: sqlite3.Connection) -> int:
        """How many passages are in the index."""
        return db.execute("SELECT indexed FROM settings").fetchone()[0]

    def _index(self, db: sqlite3.Connection, first: int, stop: int, command: str | None = None) -> None:
        """Add the words of the passages `first` to `stop` to the index, or remove them by the command "delete"."""
        self._verify_index(db)
        index_digest.forget(db)
        self._has_new_index = True
        for start in range(first, stop, _INDEXED_AT_ONCE):
            end = min(start + _INDEXED_AT_ONCE, stop)
            rows = self._rows(db, "number >= ? AND number < ? AND is_searched", start, end)
            entries = [(command, number, index_words(passage.text)) for number, passage in rows]
            db.executemany("INSERT INTO words (words, rowid, entries) VALUES (?, ?, ?)", entries)
        db.execute("UPDATE settings SET indexed = ?", (first if command else stop,))

    def _complete_index(self) -> None:
        """Index the passages that are not indexed yet, the last and growing one too."""
        with self._transaction("search", "BEGIN") as db:
            is_complete = self._indexed(db) > self._last_passage(db)[0]
            self._verify_index(db)
        if not is_complete:
            with self._transaction("write to") as db:
                self._index(db, self._indexed(db), self._last_passage(db)[0] + 1)

    def _verify_index(self, db: sqlite3.Connection) -> None:
        """Raise UserError if the index is damaged: a passage could be missing in it. Once for each version of it."""
        version = db.execute("PRAGMA data_version").fetchone()[0]  # changed by what other connections write
        if version != self._verified and index_digest.is_damaged(db):
            raise self._altered()
        self._verified = version

    def _seal_index(self) -> None:
        """Keep the digest of an index that was changed here and is complete."""
        if self._has_new_index:
            with self._transaction("write to") as db:
                if self._indexed(db) > self._last_passage(db)[0]:
                    index_digest.keep(db)
            self._has_new_index = False

    # -- meaning ---------------------------------------------------------------------------------------------------

    def _complete_vectors(self, embed: Embed) -> None:
        """Give a vector of `embed` to every passage that has none; vectors of another embedding are removed."""
        probe_D = unit_vectors(embed, PROBE)[0]
        with self._transaction("search", "BEGIN") as db:
            kept_D = unpack_vector(db.execute("SELECT probe FROM settings").fetchone()[0])
        if kept_D is None or kept_D.shape != probe_D.shape or not np.allclose(kept_D, probe_D, atol=1e-5):
            with self._transaction("write to") as db:
                db.execute("UPDATE passages SET vector = NULL")
                db.execute("UPDATE settings SET probe = ?", (pack_vector(probe_D),))
        missing = "SELECT number, digest FROM passages WHERE number > ? AND is_searched AND vector IS NULL LIMIT ?"
        number = -1
        while True:
            with self._transaction("search", "BEGIN") as db:
                rows = db.execute(missing, (number, _EMBEDDED_AT_ONCE)).fetchall()
                texts = [self._passage(db, number)[1].text for number, _ in rows]
            if not rows:
                return
            packed = map(pack_vector, unit_vectors(embed, texts))
            with self._transaction("write to") as db:  # unless another process has replaced the passage
                update = "UPDATE passages SET vector = ? WHERE number = ? AND digest = ?"
                db.executemany(update, [(vector, *row) for vector, row in zip(packed, rows, strict=True)])
            number = rows[-1][0]
