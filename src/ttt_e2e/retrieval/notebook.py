"""Retrieval beside the weights: what a session reads is also noted, in passages, and looked up by words when asked.

Fast weights keep the gist of a text; a notebook keeps its exact words. It is a folder of plain files:

    notebook.json    format, version, the size of its passages
    text.txt         the whole text, UTF-8, appended to
    passages.jsonl   one line a passage, appended to: where it lies in the text, and a digest
    index/           for the search by words (bm25s), made anew when more has been noted
    vectors.safetensors   the passages' embeddings, where one is used

The text is the truth and is written first. Whatever else a process that was killed did not get to write follows from
it and is made up for when the notebook is opened. Nothing here grows with the text while it is noted; the search holds
an index of it in memory.
"""

import codecs
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.files import write_text
from ttt_e2e.retrieval.passages import OpenPassage, Passage, Place
from ttt_e2e.retrieval.search_index import (
    KEPT,
    Embed,
    passage_vectors,
    reciprocal_ranks,
    unit_vectors,
    word_index,
    words,
)

if TYPE_CHECKING:
    from ttt_e2e.inference.session import Session

FORMAT = "ttt-e2e notebook"
VERSION = 1
SIZE = 400

_PIECE = 1 << 16


class _Index(NamedTuple):
    """What a search needs in memory: all passages' places, how to read one, bm25s's index of words, and vectors."""

    places: list[Place]
    text_of: Callable[[int], str]
    by_words: Any
    by_meaning_ND: np.ndarray | None


class Notebook:
    """The notebook in `folder`; a new one if there is none and `create`.

    size: about how many characters a passage has, see `passages.OpenPassage`; 400 are 60 to 110 English words. Only a new
    notebook asks for it. embed: rank by meaning too, not by words alone; see `notebook_index.load_embed`.

    One `Notebook` has the folder at a time, until `close` or the end of a `with` block. Raises UserError if another has
    it, if the folder is something else or missing or not writable, and if a file was truncated or altered, as far as
    that is seen without reading all of it; the rest is seen by the search.
    """

    def __init__(self, folder: Path, *, size: int = SIZE, embed: Embed | None = None, create: bool = True) -> None:
        if size < 20:
            raise UserError(f"Passages of {size} characters are too short to be found; take 20 at least.")
        self.folder = Path(folder)
        if not create and not (self.folder / "notebook.json").exists():
            raise UserError(f"There is no notebook {self.folder}; let one be kept while a text is read.")
        self.embed = embed
        self._index: _Index | None = None
        self._files: list[IO[Any]] = []
        try:
            self._lock()
            self.size = self._settings(size)
            self._open()
            self._resume()
        except OSError as error:
            self.close()
            raise UserError(f"Cannot open the notebook {self.folder}: {error.strerror}; choose another.") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes have the notebook. What was added is on the disk already."""
        for file in self._files:
            file.close()
        self._files = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def characters(self) -> int:
        """How long the noted text is."""
        return self._unfilled.stop

    def add(self, text: str) -> None:
        """Note what comes next in the text; the passages depend on the whole text, not on how it was split.

        When this returns, a process that is killed loses nothing of it. Raises UserError for lone surrogates, for a
        full disk, and if the notebook is closed; it is closed after whatever went wrong while it was written to.
        """
        if not self._files:
            raise UserError(f"The notebook {self.folder} is closed; open it again.")
        for start in range(0, len(text), _PIECE):
            piece = text[start : start + _PIECE]
            try:
                data = piece.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"Half of a surrogate pair at character {start + error.start} is no text.") from error
            try:
                _write(self._text, data)
                self._take(piece)
            except OSError as error:
                self.close()
                raise UserError(f"Cannot write to {self.folder}: {error.strerror}; what it holds is kept.") from error
            except BaseException:
                self.close()
                raise

    def noting(self, pieces: Iterable[str], at: int | None = None) -> Iterator[str]:
        """Pass a text on, each piece once it is noted: `session.read_pieces(notebook.noting(pieces))`.

        at: the character of the notebook at which this text begins (default: its end). What the notebook already has
        from there on, because it was read before and not to its end, is not noted twice. Raises UserError if that
        differs from the text, and as `add` does.
        """
        at = self.characters if at is None else at
        known = self.characters - at
        if at < 0 or known < 0:
            raise UserError(f"The notebook {self.folder} has {self.characters} characters; nothing begins at {at}.")
        with (self.folder / "text.txt").open(encoding="utf-8", errors="replace", newline="") as noted:
            for skipped in range(0, at, _PIECE):
                noted.read(min(_PIECE, at - skipped))
            for long_piece in pieces:
                for start in range(0, len(long_piece), _PIECE):
                    piece = long_piece[start : start + _PIECE]
                    same = noted.read(min(len(piece), known))
                    if not piece.startswith(same):
                        raise UserError(
                            f"The notebook {self.folder} holds another text at character {self.characters - known} "
                            f"to {self.characters - known + len(same)}; read the same text again, or begin a new one."
                        )
                    known -= len(same)
                    self.add(piece[len(same) :])
                    yield piece
        if known:
            raise UserError(
                f"The notebook {self.folder} holds {known} characters more than this text has; "
                "read the same text again, or begin a new one."
            )
        if self._files:
            os.fsync(self._text.fileno())  # a whole text is safe from a power cut, too

    def cut(self, characters: int) -> None:
        """Forget what was noted after the first so many characters, as if it had never been.

        Raises UserError if the notebook is closed or was altered, and if it cannot be written to.
        """
        if not self._files:
            raise UserError(f"The notebook {self.folder} is closed; open it again.")
        if characters >= self.characters:
            return
        last, end = Place(0, 0, 0, 0, ""), 0
        with (self.folder / "passages.jsonl").open("rb") as lines:
            for line in lines:
                place = self._parse(line)
                if place.start + 2 * self.size > characters:
                    break  # it was not full yet, see `Unfilled.add`
                last, end = place, end + len(line)
        try:
            self._reader.seek(last.stop_byte)
            rest = self._reader.read(8 * self.size).decode(errors="replace")[: characters - last.stop]
            # The text comes last: a process that is killed in between leaves passages that are made up for.
            self._lines.truncate(end)
            self._text.truncate(last.stop_byte + len(rest.encode()))
            self._resume()
        except OSError as error:
            self.close()
            raise UserError(f"Cannot write to {self.folder}: {error.strerror}; choose another.") from error
        except BaseException:
            self.close()
            raise
        self._index = None

    def search(self, query: str, count: int = 3) -> list[Passage]:
        """The passages that fit `query` best, the best first; none that shares no word with it, unless `embed` is used.

        Words are compared without regard to case and weighed as BM25 does (bm25s, method "lucene", k1 1.5, b 0.75).
        With `embed` the score is that of reciprocal rank fusion of the ranks by words and by cosine. Raises UserError
        if bm25s is missing, or if a file of the notebook was truncated or altered.
        """
        if not self._files:
            raise UserError(f"The notebook {self.folder} is closed; open it again.")
        if count < 1:
            raise UserError(f"Cannot look for {count} passages; ask for one at least.")
        index = self._indexed()
        if index is None:
            return []
        places, asked = index.places, words(query)
        scores_N = index.by_words.get_scores(asked) if asked else np.zeros(len(places))
        if index.by_meaning_ND is not None and self.embed is not None:
            cosines_N = index.by_meaning_ND @ unit_vectors(self.embed, [query])[0]
            scores_N = reciprocal_ranks(scores_N) + reciprocal_ranks(cosines_N)
        best = [int(i) for i in np.argsort(-scores_N, kind="stable")[:count] if scores_N[i] > 0]
        return [Passage(index.text_of(i), *places[i][:4], i, float(scores_N[i])) for i in best]

    # -- adding ----------------------------------------------------------------------------------------------------

    def _lock(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is no folder; a notebook is one, name another.")
        self.folder.mkdir(parents=True, exist_ok=True)
        strangers = [file.name for file in self.folder.iterdir() if file.name != "lock" and file.name[0] != "."]
        if strangers and "notebook.json" not in strangers:
            raise UserError(f"{self.folder} is no notebook and not empty; it is left as it is, name another folder.")
        lock = (self.folder / "lock").open("ab")
        self._files.append(lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"The notebook {self.folder} is in use; close it there first, or wait until that process has ended."
            ) from error
        for name in ("notebook.json", *KEPT):
            for left in self.folder.glob(f".{name}.*"):  # by a process that was killed while it wrote beside the place
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _settings(self, size: int) -> int:
        path = self.folder / "notebook.json"
        if not path.exists():
            write_text(path, json.dumps({"format": FORMAT, "version": VERSION, "size": size}) + "\n")
            return size
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            if settings["format"] == FORMAT and settings["version"] == VERSION:
                return int(settings["size"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} was truncated or altered; use another copy of the notebook.") from error
        raise UserError(f"{path} is not of a notebook of version {VERSION}; update ttt-e2e, or begin a new one.")

    def _open(self) -> None:
        lines_path, text_path = self.folder / "passages.jsonl", self.folder / "text.txt"
        self._lines, self._text = lines_path.open("ab", buffering=0), text_path.open("ab", buffering=0)
        self._reader = text_path.open("rb", buffering=0)  # a buffer would still hold what was cut
        self._files += [self._lines, self._text, self._reader]

    def _resume(self) -> None:
        """Find out where noting stopped, drop a half-written line or character, and cut what no process came to cut."""
        lines, end = _last_lines(self.folder / "passages.jsonl")
        self._lines.truncate(end)
        self._unfilled, size = OpenPassage(), self._reader.seek(0, os.SEEK_END)
        if places := [self._parse(line) for line in lines]:
            last = places[-1]
            if size < last.stop_byte:
                raise UserError(f"{self.folder / 'text.txt'} is truncated; use another copy of the notebook.")
            before = places[0].digest if len(places) == 2 else ""
            self._unfilled = OpenPassage.after(last, self._text_at(last, before), self.size)
        decoder = codecs.getincrementaldecoder("utf-8")()
        self._reader.seek(self._unfilled.last.stop_byte)
        while chunk := self._reader.read(_PIECE):
            try:
                self._take(decoder.decode(chunk))
            except UnicodeDecodeError as error:
                raise self._altered() from error
        self._text.truncate(size - len(decoder.getstate()[0]))

    def _take(self, text: str) -> None:
        """Write down the passages that `text`, which is on the disk already, fills."""
        full, self._unfilled = self._unfilled.add(text, self.size)
        _write(self._lines, b"".join(place.json() for place in full))

    # -- searching -------------------------------------------------------------------------------------------------

    def _indexed(self) -> _Index | None:
        """The index of all that was noted, None if that is nothing: made anew if more was noted since the last time."""
        end = self._unfilled.place() or self._unfilled.last
        if end.digest and (self._index is None or self._index.places[-1].digest != end.digest):
            places = self._places()
            befores = ["", *(place.digest for place in places)]

            def text_of(i: int) -> str:
                return self._text_at(places[i], befores[i])

            by_words, by_meaning_ND = word_index(self.folder, befores[1:], text_of), None
            if self.embed is not None:
                full = len(places) - (end is not self._unfilled.last)
                by_meaning_ND = passage_vectors(self.folder, befores[1:], full, text_of, self.embed)
            self._index = _Index(places, text_of, by_words, by_meaning_ND)
        return self._index

    def _places(self) -> list[Place]:
        with (self.folder / "passages.jsonl").open("rb") as lines:
            places = [self._parse(line) for line in lines]
        if (places[-1].digest if places else "") != self._unfilled.last.digest:
            raise self._altered()
        unfilled = self._unfilled.place()
        return places if unfilled is None else [*places, unfilled]

    def _text_at(self, place: Place, before: str) -> str:
        """The text of a passage, compared with its digest; `before` is the digest of the passage before it."""
        self._reader.seek(place.start_byte)
        try:
            text = self._reader.read(place.stop_byte - place.start_byte).decode()
        except UnicodeDecodeError as error:
            raise self._altered() from error
        if Place.of(text, place.start, place.start_byte, before) != place:
            raise self._altered()
        return text

    def _parse(self, line: bytes) -> Place:
        try:
            return Place.from_json(line)
        except ValueError as error:
            raise self._altered() from error

    def _altered(self) -> UserError:
        return UserError(f"The notebook {self.folder} was altered after it was written; use another copy of it.")


# -- into the window ---------------------------------------------------------------------------------------------------


def notebook_folder(session: Path) -> Path:
    """The notebook that belongs to a session file: the folder beside it, with ".notebook" appended to its name."""
    return session.with_name(f"{session.name}.notebook")


def passage_size(window: int) -> int:
    """A `size` of passages for a model of this window: a passage is about a quarter of it, or less."""
    return max(20, min(SIZE, 3 * window // 4))


def prompt_with_passages(
    question: str, passages: Iterable[Passage], tokenizer: Tokenizer, room_tokens: int
) -> tuple[str, list[Passage]]:
    """The question with passages ahead of it, and those that found room, in the order given.

    passages: the best first. In the prompt the best comes last, nearest to the question, each under its place in
    characters. room_tokens: at most so many tokens go ahead of the question; what does not fit is left out, whole.
    """
    taken: list[Passage] = []
    ahead = ""
    for passage in passages:
        longer = _ahead([*taken, passage])
        if len(tokenizer.encode(longer)) <= room_tokens:
            taken, ahead = [*taken, passage], longer
    return ahead + question, taken


def generate_with_notebook(
    session: "Session",
    notebook: Notebook,
    prompt: str,
    *,
    count: int = 3,
    room_tokens: int | None = None,
    learn: bool = False,
    **sampling: Any,
) -> tuple[Iterator[str], list[Passage]]:
    """Write on after `prompt` with up to `count` noted passages in the window; returns the text in pieces, the sources.

    room_tokens: for the passages; None is half the window. learn: the session reads passages and prompt as any prompt
    of `generate`, learning included; otherwise they stand in the window only, and not even a fork learns from them.
    sampling: as for `Session.generate`. Raises UserError as that and `Notebook.search` do.
    """
    if session.tokenizer is None:
        raise UserError("Showing passages to a session needs a tokenizer; make the session with one.")
    room = session.model.config.sliding_window // 2 if room_tokens is None else room_tokens
    text, sources = prompt_with_passages(prompt, notebook.search(prompt, count), session.tokenizer, room)
    reader = session
    if not learn:
        reader = session.fork()
        reader.learn = False
    return reader.generate(text, **sampling), sources


def listing(passages: Iterable[Passage]) -> str:
    """Passages for people: each with its score and its place, on lines of its own."""
    return "\n\n".join(
        f"characters {p.start:,} to {p.stop:,} (score {p.score:.3g})\n{p.text.strip()}" for p in passages
    )


def _ahead(passages: list[Passage]) -> str:
    return "\n\n" + "".join(f"[{p.start}-{p.stop}]\n{p.text.strip()}\n\n" for p in reversed(passages))


# -- small things ------------------------------------------------------------------------------------------------------


def _write(file: IO[bytes], data: bytes) -> None:
    """Write all of it to an unbuffered file: a full disk is met here, and not when the file is closed."""
    while data:
        data = data[file.write(data) :]


def _last_lines(path: Path) -> tuple[list[bytes], int]:
    """The last two whole lines, or how many there are, and where they end."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4096))  # a line has about 150 bytes
        *lines, half = file.read().split(b"\n")
    return lines[-2:], size - len(half)
