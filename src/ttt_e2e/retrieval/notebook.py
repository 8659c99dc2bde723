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
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np

from ttt_e2e.data.text import short_chunks, slices
from ttt_e2e.errors import UserError
from ttt_e2e.retrieval import documents, index_digest
from ttt_e2e.retrieval.database import MAX_SIZE, MIN_SIZE, NotebookDatabase
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

SIZE = 400  # of a passage, in characters
_COLUMNS = "number, start, stop, start_byte, stop_byte, is_searched, text"
_BLOCK = 1 << 16  # characters that are added in one transaction
_INDEXED_AT_ONCE = 64
_EMBEDDED_AT_ONCE = 256
_MANY = 1 << 62  # more passages than there can be


def notebook_folder(session: Path) -> Path:
    """The notebook of a session file: the folder beside it with ".notebook" appended to its name."""
    return session.with_name(f"{session.name}.notebook")


def passage_size(window: int) -> int:
    """The passage size for a model of this window: a passage has about a quarter of its tokens, or less."""
    return max(MIN_SIZE, min(SIZE, 3 * window // 4))


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
        if not MIN_SIZE <= size <= MAX_SIZE:
            problem = "too short to be found" if size < MIN_SIZE else "too long to be shown"
            raise UserError(f"Passages of {size} characters are {problem}; use {MIN_SIZE} to {MAX_SIZE:,}.")
        self.folder, self.embed = Path(folder), embed
        self._has_new_index = False
        self._verified: int | None = None  # SQLite's `data_version` when the index was last found undamaged
        self._database = NotebookDatabase(self.folder, size, create)
        self.size = self._database.size

    def close(self) -> None:
        """Release the files, and let other processes write. What was added is on the disk already."""
        with suppress(UserError):  # what was added is there without it
            self._seal_index()
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def characters(self) -> int:
        """Length of the recorded text."""
        with self._database.transaction("read", "BEGIN") as db:
            return self._last_passage(db)[1].stop

    def documents(self) -> list[tuple[int, str]]:
        """Where each document begins, and its name, in order; none for a text without a name that comes first."""
        with self._database.transaction("read", "BEGIN") as db:
            return documents.rows(db)

    def lock(self) -> None:
        """Become the only writer until `close`, as every method that writes does.

        Raises UserError if another process, or another `Notebook`, is.
        """
        self._database.lock()

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
            with self._database.transaction("write to") as db:
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
                with self._database.transaction("write to") as db:
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
        with self._database.errors("write to"):
            self._database.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def text(self, start: int = 0) -> Iterator[str]:
        """The recorded text from character `start` on, in pieces. Raises UserError if it was altered."""
        number, start = -1, min(max(0, start), self.characters)
        while True:
            with self._database.transaction("read", "BEGIN") as db:
                rows = self._rows(db, "number > ? AND stop > ? ORDER BY number LIMIT 64", number, start)
            if not rows:
                return
            for number, passage in rows:  # noqa: B007 (`number` is where the next rows begin)
                if passage.start > start:
                    raise self._database.altered()  # a passage is missing
                yield passage.text[start - passage.start :]
                start = passage.stop

    def cut(self, characters: int) -> None:
        """Remove all but the first `characters` characters of the text, as if they had never been added.

        Raises UserError as `add` does.
        """
        self.lock()
        characters = max(0, characters)
        with self._database.transaction("write to") as db:
            documents.cut(db, characters)
        if characters >= self.characters:
            return
        with self._database.transaction("read", "BEGIN") as db:
            # Those that begin earlier were full by then, see `Excerpt.cut`, or belong to another document.
            earliest = max(documents.last_start(db), characters - 2 * self.size + 1)
            number, first = self._rows(db, "start >= ? ORDER BY number LIMIT 1", earliest)[0]
        text, length = "", characters - first.start
        for piece in self.text(first.start):
            text += piece
            if len(text) >= length:
                break
        with self._database.transaction("write to") as db:
            self._replace_from(db, number, first._replace(text=text[:length]))

    def replace(self, source: Path | None, size: int) -> None:
        """Become a copy of the notebook `source`, or an empty one with passages of `size` characters (None).

        Whatever was in the notebook is gone then; until then, and if the process is killed, nothing of it. Raises
        UserError as `add` does, and if `source` is in use or damaged.
        """
        self.lock()
        if source is None:
            with self._database.transaction("write to") as db:
                db.execute("DELETE FROM passages")
                documents.cut(db, 0)
                index_digest.forget(db)
                db.execute("INSERT INTO words(words) VALUES ('delete-all')")
                db.execute("UPDATE settings SET size = ?, indexed = 0", (size,))
            self.size = size
            return
        with Notebook(source, create=False) as other:
            other.lock()
            with self._database.errors("write to"):
                other._database.connection.backup(self._database.connection)
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
        with self._database.transaction("search", "BEGIN") as db:
            scores: dict[int, float] = {}
            if expression := match_expression(query):
                ranking = "SELECT rowid, -bm25(words) FROM words WHERE words MATCH ? ORDER BY bm25(words), 1 LIMIT ?"
                scores = dict(db.execute(ranking, (expression, min(count, _MANY) if self.embed is None else _MANY)))
                if None in scores.values():  # of a damaged index
                    raise self._database.altered()
            if self.embed is not None:
                rows = db.execute(
                    "SELECT number, vector FROM passages WHERE vector IS NOT NULL ORDER BY number"
                ).fetchall()
                fused = fuse(rows, scores, unit_vectors(self.embed, [query])[0])
                if fused is None:
                    raise self._database.altered()
                scores = fused
            best = sorted(scores, key=lambda number: (-scores[number], number))[:count]
            found = (self._passage(db, number) for number in best)
            return [one.as_passage(number, scores[number], *documents.at(db, one.start)) for number, one in found]

    # -- passages --------------------------------------------------------------------------------------------------

    def _rows(self, db: sqlite3.Connection, where: str, *values: int) -> list[tuple[int, Excerpt]]:
        """Passages with their numbers, each checked against its digest."""
        passages = []
        for *row, digest in db.execute(f"SELECT {_COLUMNS}, digest FROM passages WHERE {where}", values):
            if digest != index_digest.of_row(row):
                raise self._database.altered()
            passages.append((row[0], Excerpt(row[6], row[1], row[3])))
        return passages

    def _passage(self, db: sqlite3.Connection, number: int) -> tuple[int, Excerpt]:
        if not (rows := self._rows(db, "number = ?", number)):
            raise self._database.altered()
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
        with self._database.transaction("search", "BEGIN") as db:
            is_complete = self._indexed(db) > self._last_passage(db)[0]
            self._verify_index(db)
        if not is_complete:
            with self._database.transaction("write to") as db:
                self._index(db, self._indexed(db), self._last_passage(db)[0] + 1)

    def _verify_index(self, db: sqlite3.Connection) -> None:
        """Raise UserError if the index is damaged: a passage could be missing in it. Once for each version of it."""
        version = db.execute("PRAGMA data_version").fetchone()[0]  # changed by what other connections write
        if version != self._verified and index_digest.is_damaged(db):
            raise self._database.altered()
        self._verified = version

    def _seal_index(self) -> None:
        """Keep the digest of an index that was changed here and is complete."""
        if self._has_new_index:
            with self._database.transaction("write to") as db:
                if self._indexed(db) > self._last_passage(db)[0]:
                    index_digest.keep(db)
            self._has_new_index = False

    # -- meaning ---------------------------------------------------------------------------------------------------

    def _complete_vectors(self, embed: Embed) -> None:
        """Give a vector of `embed` to every passage that has none; vectors of another embedding are removed."""
        probe_D = unit_vectors(embed, PROBE)[0]
        with self._database.transaction("search", "BEGIN") as db:
            kept_D = unpack_vector(db.execute("SELECT probe FROM settings").fetchone()[0])
        if kept_D is None or kept_D.shape != probe_D.shape or not np.allclose(kept_D, probe_D, atol=1e-5):
            with self._database.transaction("write to") as db:
                db.execute("UPDATE passages SET vector = NULL")
                db.execute("UPDATE settings SET probe = ?", (pack_vector(probe_D),))
        missing = "SELECT number, digest FROM passages WHERE number > ? AND is_searched AND vector IS NULL LIMIT ?"
        number = -1
        while True:
            with self._database.transaction("search", "BEGIN") as db:
                rows = db.execute(missing, (number, _EMBEDDED_AT_ONCE)).fetchall()
                texts = [self._passage(db, number)[1].text for number, _ in rows]
            if not rows:
                return
            packed = map(pack_vector, unit_vectors(embed, texts))
            with self._database.transaction("write to") as db:  # unless another process has replaced the passage
                update = "UPDATE passages SET vector = ? WHERE number = ? AND digest = ?"
                db.executemany(update, [(vector, *row) for vector, row in zip(packed, rows, strict=True)])
            number = rows[-1][0]
