"""Cutting a text into overlapping passages as it comes in; the cuts depend on the text, not on how it was split."""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import NamedTuple

# Where a passage may end, the best kind first: after a sentence or a paragraph, a line, a word.
_BOUNDARIES = (
    re.compile(r"[.!?…][\"'”’»)\]]*\s+|[。！？][」』”’]*\s*|\n\s*\n\s*"),
    re.compile(r"\n"),
    re.compile(r"\s"),
)
_SPAN_KEYS = ("start", "stop", "start_byte", "stop_byte", "digest")  # in passages.jsonl


class Passage(NamedTuple):
    """A passage that a search found: characters `start` to `stop` of a text, bytes `start_byte` to `stop_byte` of it.

    number: index of the passage, from 0. score: how well it fits the query; comparable within one search.
    """

    text: str
    start: int
    stop: int
    start_byte: int
    stop_byte: int
    number: int
    score: float


class Span(NamedTuple):
    """Where a passage lies in the text, in characters and in bytes of UTF-8.

    digest: of its text, its position, and all passages before it; "" before the first one.
    """

    start: int
    stop: int
    start_byte: int
    stop_byte: int
    digest: str

    @classmethod
    def of(cls, text: str, start: int, start_byte: int, previous_digest: str) -> "Span":
        """The span of the passage `text` that begins at character `start` and byte `start_byte`."""
        data = text.encode()
        stop, stop_byte = start + len(text), start_byte + len(data)
        position = f"{previous_digest} {start} {stop} {start_byte} {stop_byte} "
        return cls(start, stop, start_byte, stop_byte, hashlib.sha256(position.encode() + data).hexdigest()[:32])

    @classmethod
    def from_json(cls, line: bytes) -> "Span":
        """The inverse of `to_json`. Raises ValueError for anything else."""
        try:
            values = json.loads(line)
            span = cls(*(values[key] for key in _SPAN_KEYS))
        except (TypeError, KeyError) as error:
            raise ValueError(line) from error
        if any(type(number) is not int for number in span[:4]) or not 0 <= span.start_byte < span.stop_byte:
            raise ValueError(line)
        return span

    def to_json(self) -> bytes:
        """The span as a line of a file."""
        return json.dumps(dict(zip(_SPAN_KEYS, self, strict=True))).encode() + b"\n"


BEFORE_FIRST = Span(0, 0, 0, 0, "")


class OpenPassage(NamedTuple):
    """The end of a text that is cut as it comes in: a passage that is not full yet, and the full one before it.

    text: of the open passage so far, which begins at character `start` and byte `start_byte`.
    """

    previous: Span = BEFORE_FIRST
    text: str = ""
    start: int = 0
    start_byte: int = 0

    @property
    def stop(self) -> int:
        """Characters of the whole text."""
        return self.start + len(self.text)

    def add(self, text: str, size: int) -> tuple[list[Span], "OpenPassage"]:
        """Append `text`; returns the passages that are now full, and the open one after them.

        A passage ends with the first sentence (else line, else word) that ends between `size` and 2 `size` characters
        after its start. The next one begins at the first boundary in the last `size` / 4 characters of it.
        """
        last, full = self._replace(text=self.text + text), []
        while len(last.text) >= 2 * size:
            stop = _boundary(last.text, size, 2 * size, default=2 * size)
            passage, rest = last.text[:stop], last.text[stop:]
            full.append(Span.of(passage, last.start, last.start_byte, last.previous.digest))
            last = OpenPassage.after(full[-1], passage, size)
            last = last._replace(text=last.text + rest)
        return full, last

    @classmethod
    def after(cls, previous: Span, text: str, size: int) -> "OpenPassage":
        """The open passage right after the passage `previous`, whose text is `text`, was full."""
        earliest = len(text) - size // 4
        rest = text[_boundary(text, earliest, len(text), default=earliest) :]
        return cls(previous, rest, previous.stop - len(rest), previous.stop_byte - len(rest.encode()))

    def span(self) -> Span | None:
        """The span of the open passage so far; None if everything in it is in the previous one."""
        if not self.text[self.previous.stop - self.start :].strip():
            return None
        return Span.of(self.text, self.start, self.start_byte, self.previous.digest)


def format_passages(passages: Iterable[Passage]) -> str:
    """Passages for people: each with its score and position, on lines of its own."""
    return "\n\n".join(
        f"characters {p.start:,} to {p.stop:,} (score {p.score:.3g})\n{p.text.strip()}" for p in passages
    )


def _boundary(text: str, first: int, last: int, default: int) -> int:
    """The first boundary of the best kind between `first` and `last`, both exclusive."""
    ends = (match.end() for kind in _BOUNDARIES for match in kind.finditer(text, first, last) if match.end() < last)
    return next(ends, default)
