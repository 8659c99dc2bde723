"""Cutting a text into overlapping passages as it comes in; the cuts depend on the text, not on how it was split."""

import re
from collections.abc import Iterable
from typing import NamedTuple

# Where a passage may end, the best kind first: after a sentence or a paragraph, a line, a word.
_BOUNDARIES = (
    re.compile(r"[.!?…][\"'”’»)\]]*\s+|[。！？][」』”’]*\s*|\n\s*\n\s*"),
    re.compile(r"\n"),
    re.compile(r"\s"),
)


class Passage(NamedTuple):
    """A passage that a search found: characters `start` to `stop` of a text, bytes `start_byte` to `stop_byte` of it.

    number: index of the passage, from 0. score: how well it fits the query; comparable within one search. document: the
    name of the document that it is from, "" if it has none, which begins at character `document_start`.
    """

    text: str
    start: int
    stop: int
    start_byte: int
    stop_byte: int
    number: int
    score: float
    document: str = ""
    document_start: int = 0

    @property
    def place_in_document(self) -> tuple[int, int]:
        """The first character of the passage in its document, and the one after the last."""
        return self.start - self.document_start, self.stop - self.document_start


class Excerpt(NamedTuple):
    """Part of a longer text, in which it begins at character `start` and byte `start_byte` of its UTF-8."""

    text: str = ""
    start: int = 0
    start_byte: int = 0

    @property
    def stop(self) -> int:
        """The character after the last."""
        return self.start + len(self.text)

    @property
    def stop_byte(self) -> int:
        """The byte after the last."""
        return self.start_byte + len(self.text.encode())

    def as_passage(self, number: int, score: float, document: str, document_start: int) -> Passage:
        """What a search gives."""
        place = (self.start, self.stop, self.start_byte, self.stop_byte)
        return Passage(self.text, *place, number, score, document, document_start)

    def cut(self, size: int) -> list["Excerpt"]:
        """The passages of a text that begins like this one, `size` characters long or more, and the rest.

        A passage ends with the first sentence (else line, else word) that ends between `size` and 2 `size` characters
        after its start. The next one begins at the first boundary in the last `size` / 4 characters of it. The last
        one returned, shorter than 2 `size`, is not full: with more text after it, it is cut again.
        """
        passages, rest = [], self
        while len(rest.text) >= 2 * size:
            stop = _boundary(rest.text, size, 2 * size, default=2 * size)
            next_start = _boundary(rest.text[:stop], stop - size // 4, stop, default=stop - size // 4)
            passages.append(rest._replace(text=rest.text[:stop]))
            skipped_bytes = len(rest.text[:next_start].encode())
            rest = Excerpt(rest.text[next_start:], rest.start + next_start, rest.start_byte + skipped_bytes)
        return [*passages, rest]


def format_passages(passages: Iterable[Passage]) -> str:
    """Passages for people: each with its document, its position in it and its score, on lines of its own."""
    return "\n\n".join(f"{_heading(passage)}\n{passage.text.strip()}" for passage in passages)


def _heading(passage: Passage) -> str:
    start, stop = passage.place_in_document
    document = f"{passage.document}, " if passage.document else ""
    return f"{document}characters {start:,} to {stop:,} (score {passage.score:.3g})"


def _boundary(text: str, first: int, last: int, default: int) -> int:
    """The first boundary of the best kind between `first` and `last`, both exclusive."""
    ends = (match.end() for kind in _BOUNDARIES for match in kind.finditer(text, first, last) if match.end() < last)
    return next(ends, default)
