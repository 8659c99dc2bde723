"""A notebook: the exact text that a session has read, in passages that can be searched.

Fast weights keep the gist of a text; a notebook keeps its words. It is a folder of plain files:

    notebook.json        format, version, the size of its passages
    text.txt             the whole text, UTF-8, appended to
    passages.jsonl       one line per passage, appended to: its span in the text, and a digest
    index/               for the search by words (bm25s); rebuilt when text was added
    vectors.safetensors  the embeddings of the passages, if an embedding is used

The text is written first. Whatever else a killed process did not get to write follows from the text and is made up for
when the notebook is opened. Memory does not grow with the text while it is recorded; a search holds an index of it.
"""

import codecs
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from ttt_e2e.data.text import short_chunks
from ttt_e2e.errors import UserError
from ttt_e2e.files import check_format, lock_folder, read_json, remove_stale_parts, write_text
from ttt_e2e.retrieval.passages import BEFORE_FIRST, OpenPassage, Passage, Span
from ttt_e2e.retrieval.search_index import Embed, passage_vectors, reciprocal_ranks, unit_vectors, word_index, words

FORMAT = "ttt-e2e notebook"
VERSION = 1
SIZE = 400

_BLOCK = 1 << 16  # characters or bytes that are read or written at once
_LINE_BYTES = 4096  # more than two lines of passages.jsonl, which have about 150 bytes each


def notebook_folder(session: Path) -> Path:
    """The notebook of a session file: the folder beside it with ".notebook" appended to its name."""
    return session.with_name(f"{session.name}.notebook")


def passage_size(window: int) -> int:
    """The passage size for a model of this window: a passage has about a quarter of its tokens, or less."""
    return max(20, min(SIZE, 3 * window // 4))


# What a search needs in memory: spans, a function that reads passage i, bm25s's index, and vectors [N, D].
_Index = tuple[list[Span], Callable[[int], str], Any, np.ndarray | None]


class Notebook:
    """The notebook in `folder`, which only one `Notebook` can have open at a time, until `close` or the end of `with`.

    Args:
        folder: Of the notebook.
        size: Approximate number of characters of a passage (see `OpenPassage.add`); 400 are 60 to 110 English words.
            Used for a new notebook only.
        embed: Rank by meaning as well as by words; see `search_index.load_embed`.
        create: Make a new notebook if there is none.

    Raises:
        UserError: If the notebook is open elsewhere, missing or not writable, if the folder is something else, or if a
            file was truncated or altered, as far as that shows without reading all of it; a search shows the rest.
    """

    def __init__(self, folder: Path, *, size: int = SIZE, embed: Embed | None = None, create: bool = True) -> None:
        if size < 20:
            raise UserError(f"Passages of {size} characters are too short to be found; use at least 20.")
        self.folder = Path(folder)
        if not create and not (self.folder / "notebook.json").exists():
            raise UserError(f"There is no notebook {self.folder}; record one with `ttt-e2e read --notebook`.")
        self.embed = embed
        self._index: _Index | None = None
        self._files: list[IO[Any]] = []
        with self._closed_on_error("open"):
            self._lock()
            path = self.folder / "notebook.json"
            if not path.exists():
                write_text(path, json.dumps({"format": FORMAT, "version": VERSION, "size": size}) + "\n")
            settings = read_json(path)
            check_format(settings, path, FORMAT, VERSION, "record its text again")
            if type(settings.get("size")) is not int:
                raise self._altered()
            self.size: int = settings["size"]
            lines_path, text_path = self.folder / "passages.jsonl", self.folder / "text.txt"
            self._lines, self._text = lines_path.open("ab", buffering=0), text_path.open("ab", buffering=0)
            self._reader = text_path.open("rb", buffering=0)  # a buffer would still hold what was cut off
            self._files += [self._lines, self._text, self._reader]
            self._resume()

    def close(self) -> None:
        """Let other processes open the notebook. What was added is on the disk already."""
        for file in self._files:
            file.close()
        self._files = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def characters(self) -> int:
        """Length of the recorded text."""
        return self._open_passage.stop

    def add(self, text: str) -> None:
        """Append to the text. The passages depend on the whole text, not on how it was split.

        Once this returns, a killed process loses nothing of `text`. Raises UserError for lone surrogates, for a full
        disk, and if the notebook is closed; any error while writing closes it.
        """
        self._require_open()
        for start in range(0, len(text), _BLOCK):
            block = text[start : start + _BLOCK]
            try:
                data = block.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"Half of a surrogate pair at character {start + error.start} is not text.") from error
            with self._closed_on_error("write to"):
                _write(self._text, data)
                self._add_passages(block)

    def record(self, chunks: Iterable[str], start: int | None = None) -> Iterator[str]:
        """Yield the chunks of a text, each after it was added: `session.read_stream(notebook.record(chunks))`.

        start: the character of the notebook at which this text begins (default: the end of the notebook). Text that the
        notebook already has from there on, of an earlier reading that did not reach its end, is not added twice.
        Raises UserError if it differs from this text, and as `add` does.
        """
        start = self.characters if start is None else start
        known = self.characters - start
        if start < 0 or known < 0:
            raise UserError(f"The notebook {self.folder} has {self.characters} characters; no text begins at {start}.")
        with (self.folder / "text.txt").open(encoding="utf-8", errors="replace", newline="") as recorded:
            for skipped in range(0, start, _BLOCK):
                recorded.read(min(_BLOCK, start - skipped))
            for block in short_chunks(chunks):
                same = recorded.read(min(len(block), known))
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
        if self._files:
            os.fsync(self._text.fileno())  # a complete text also survives a power cut

    def cut(self, characters: int) -> None:
        """Remove all but the first `characters` characters of the text, as if they had never been added.

        Raises UserError if the notebook is closed or was altered, and if it cannot be written to.
        """
        self._require_open()
        if characters >= self.characters:
            return
        last, end = BEFORE_FIRST, 0
        with (self.folder / "passages.jsonl").open("rb") as lines:
            for line in lines:
                span = self._parse(line)
                if span.start + 2 * self.size > characters:
                    break  # this passage was not full yet, see `OpenPassage.add`
                last, end = span, end + len(line)
        with self._closed_on_error("write to"):
            self._reader.seek(last.stop_byte)
            rest = self._reader.read(8 * self.size).decode(errors="replace")[: characters - last.stop]
            # The text comes last: a process that is killed in between leaves too few passages, which are made up for.
            self._lines.truncate(end)
            self._text.truncate(last.stop_byte + len(rest.encode()))
            self._resume()
        self._index = None

    def search(self, query: str, count: int = 3) -> list[Passage]:
        """At most `count` passages that match `query`, the best first; without `embed` each shares a word with it.

        Words are compared regardless of case and weighted by BM25 (bm25s, method "lucene", k1 1.5, b 0.75). With
        `embed` the score is that of reciprocal rank fusion of the ranks by words and by cosine. Raises UserError if
        bm25s is missing, or if a file of the notebook was truncated or altered.
        """
        self._require_open()
        if count < 1:
            raise UserError(f"Cannot search for {count} passages; ask for at least one.")
        if (index := self._current_index()) is None:
            return []
        spans, text_of, by_words, vectors_ND = index
        query_words = words(query)
        scores_N = by_words.get_scores(query_words) if query_words else np.zeros(len(spans))
        if vectors_ND is not None and self.embed is not None:
            cosines_N = vectors_ND @ unit_vectors(self.embed, [query])[0]
            scores_N = reciprocal_ranks(scores_N) + reciprocal_ranks(cosines_N)
        best = [int(i) for i in np.argsort(-scores_N, kind="stable")[:count] if scores_N[i] > 0]
        return [Passage(text_of(i), *spans[i][:4], i, float(scores_N[i])) for i in best]

    # -- writing ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _closed_on_error(self, action: str) -> Iterator[None]:
        """Close the notebook if the block fails; errors of the operating system become a UserError."""
        try:
            yield
        except BaseException as error:
            self.close()
            if not isinstance(error, OSError):
                raise
            message = f"Cannot {action} the notebook {self.folder}: {error.strerror}; what it holds is kept."
            raise UserError(message) from error

    def _require_open(self) -> None:
        if not self._files:
            raise UserError(f"The notebook {self.folder} is closed; open it again.")

    def _lock(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is not a folder, as a notebook is; choose another name.")
        self.folder.mkdir(parents=True, exist_ok=True)
        files = [file.name for file in self.folder.iterdir() if not file.name.startswith(".")]
        if files and "notebook.json" not in files:
            raise UserError(f"{self.folder} is not a notebook and not empty; it is left unchanged, choose another one.")
        in_use = f"The notebook {self.folder} is in use; close it there first, or wait until that process has ended."
        self._files.append(lock_folder(self.folder, in_use))
        remove_stale_parts(self.folder)

    def _resume(self) -> None:
        """Find where the text ends, drop a half-written line or character, and add the passages that are missing."""
        with (self.folder / "passages.jsonl").open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - _LINE_BYTES))
            *lines, half = file.read().split(b"\n")
        self._lines.truncate(end - len(half))
        self._open_passage, size = OpenPassage(), self._reader.seek(0, os.SEEK_END)
        if spans := [self._parse(line) for line in lines[-2:]]:
            last = spans[-1]
            if size < last.stop_byte:
                raise UserError(f"{self.folder / 'text.txt'} is truncated; use another copy of the notebook.")
            previous_digest = spans[0].digest if len(spans) == 2 else ""
            self._open_passage = OpenPassage.after(last, self._text_at(last, previous_digest), self.size)
        decoder = codecs.getincrementaldecoder("utf-8")()
        self._reader.seek(self._open_passage.previous.stop_byte)
        while block := self._reader.read(_BLOCK):
            try:
                self._add_passages(decoder.decode(block))
            except UnicodeDecodeError as error:
                raise self._altered() from error
        self._text.truncate(size - len(decoder.getstate()[0]))

    def _add_passages(self, text: str) -> None:
        """Write the passages that are full after `text`, which is on the disk already."""
        full, self._open_passage = self._open_passage.add(text, self.size)
        _write(self._lines, b"".join(span.to_json() for span in full))

    # -- searching -------------------------------------------------------------------------------------------------

    def _current_index(self) -> _Index | None:
        """The index of the whole text, rebuilt if text was added; None if there is no text."""
        open_span = self._open_passage.span()
        end = open_span or self._open_passage.previous
        if end.digest and (self._index is None or self._index[0][-1].digest != end.digest):
            with (self.folder / "passages.jsonl").open("rb") as lines:
                spans = [self._parse(line) for line in lines]
            full, digests = len(spans), [span.digest for span in (BEFORE_FIRST, *spans)]
            if digests[-1] != self._open_passage.previous.digest:
                raise self._altered()
            if open_span:
                spans.append(open_span)
                digests.append(open_span.digest)

            def text_of(i: int) -> str:
                return self._text_at(spans[i], digests[i])

            by_words, vectors_ND = word_index(self.folder, digests[1:], text_of), None
            if self.embed is not None:
                vectors_ND = passage_vectors(self.folder, digests[1:], full, text_of, self.embed)
            self._index = spans, text_of, by_words, vectors_ND
        return self._index

    def _text_at(self, span: Span, previous_digest: str) -> str:
        """The text of a passage, checked against its digest."""
        self._reader.seek(span.start_byte)
        text = self._reader.read(span.stop_byte - span.start_byte).decode(errors="replace")
        if Span.of(text, span.start, span.start_byte, previous_digest) != span:
            raise self._altered()
        return text

    def _parse(self, line: bytes) -> Span:
        try:
            return Span.from_json(line)
        except ValueError as error:
            raise self._altered() from error

    def _altered(self) -> UserError:
        return UserError(f"The notebook {self.folder} was altered after it was written; use another copy of it.")


def _write(file: IO[bytes], data: bytes) -> None:
    """Write all of `data` to an unbuffered file, so that a full disk shows here and not when the file is closed."""
    while data:
        data = data[file.write(data) :]
