"""A text cut into passages that overlap, as it comes: where they lie depends on the text, not on how it was split."""

import hashlib
import json
import re
from typing import NamedTuple

# Where a passage may end, the best first: after a sentence or a paragraph, a line, a word.
_BORDERS = (
    re.compile(r"[.!?…][\"'”’»)\]]*\s+|[。！？][」』”’]*\s*|\n\s*\n\s*"),
    re.compile(r"\n"),
    re.compile(r"\s"),
)


class Passage(NamedTuple):
    """Characters `start` to `stop` of a text. The same place in bytes of UTF-8: `start_byte`, `stop_byte`.

    number: the how manieth passage it is, from 0. score: how well it fits the query, comparable within one search.
    """

    text: str
    start: int
    stop: int
    start_byte: int
    stop_byte: int
    number: int
    score: float


class Place(NamedTuple):
    """Where a passage lies. digest: of its text, its place, and all passages before it; "" where there is none."""

    start: int
    stop: int
    start_byte: int
    stop_byte: int
    digest: str

    @classmethod
    def of(cls, text: str, start: int, start_byte: int, before: str) -> "Place":
        """The place of `text`, which begins there; `before` is the digest of the passage before it."""
        data = text.encode()
        stop, stop_byte = start + len(text), start_byte + len(data)
        digest = hashlib.sha256(f"{before} {start} {stop} {start_byte} {stop_byte} ".encode() + data).hexdigest()
        return cls(start, stop, start_byte, stop_byte, digest[:32])

    @classmethod
    def from_json(cls, line: bytes) -> "Place":
        """The place that `json` wrote; raises ValueError for anything else."""
        try:
            place = cls(**json.loads(line))
        except TypeError as error:
            raise ValueError(line) from error
        if any(type(number) is not int for number in place[:4]) or not 0 <= place.start_byte < place.stop_byte:
            raise ValueError(line)
        return place

    def json(self) -> bytes:
        """The place as a line."""
        return json.dumps(self._asdict()).encode() + b"\n"


class OpenPassage(NamedTuple):
    """The end of a text that is cut as it comes: a passage that is not full yet, and the one before it.

    text: of the passage so far, which begins at character `start` and byte `start_byte`.
    """

    last: Place = Place(0, 0, 0, 0, "")
    text: str = ""
    start: int = 0
    start_byte: int = 0

    @property
    def stop(self) -> int:
        """How many characters the whole text has."""
        return self.start + len(self.text)

    def add(self, text: str, size: int) -> tuple[list[Place], "OpenPassage"]:
        """More of the text; returns the passages that it fills, and what is left.

        A passage ends with the first sentence (else line, else word) that ends between `size` and 2 `size` characters
        after its start. The next one begins with the first that ends in its last quarter of `size`.
        """
        last, text, start, start_byte = self.last, self.text + text, self.start, self.start_byte
        at, full = 0, []
        while len(text) - at >= 2 * size:
            stop = _border(text, at + size, at + 2 * size, otherwise=at + 2 * size)
            last = Place.of(text[at:stop], start, start_byte, last.digest)
            full.append(last)
            following = _next(text, stop, size)
            start += following - at
            start_byte += len(text[at:following].encode())
            at = following
        return full, OpenPassage(last, text[at:], start, start_byte)

    @classmethod
    def after(cls, last: Place, text: str, size: int) -> "OpenPassage":
        """What is left right after a passage was filled; `text` is that passage's."""
        rest = text[_next(text, len(text), size) :]
        return cls(last, rest, last.stop - len(rest), last.stop_byte - len(rest.encode()))

    def place(self) -> Place | None:
        """The passage as it stands, if there is anything in it that is in no other."""
        if not self.text[self.last.stop - self.start :].strip():
            return None
        return Place.of(self.text, self.start, self.start_byte, self.last.digest)


def _next(text: str, stop: int, size: int) -> int:
    """Where the passage begins that follows the one that ends at `stop`."""
    return _border(text, stop - size // 4, stop, otherwise=stop - size // 4)


def _border(text: str, first: int, last: int, otherwise: int) -> int:
    """The first of the best kind of border between `first` and `last`, both left out."""
    ends = (match.end() for kind in _BORDERS for match in kind.finditer(text, first, last) if match.end() < last)
    return next(ends, otherwise)
