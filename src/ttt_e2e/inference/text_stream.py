"""Tokens as text while they are generated: in whole characters, and up to the first stop string."""

from collections.abc import Sequence

import numpy as np

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError

_BROKEN = "\ufffd"  # what a tokenizer gives for a character whose bytes are not all there
_CONTEXT = 16  # tokens before a text that are looked at to decode it: more than a character has bytes


class TextStream:
    """Turns tokens into text, which it emits as soon as it cannot change any more.

    A character waits until all its bytes are there, and what may be the beginning of a stop string until it turns out
    not to be. The text ends before the stop string that is complete first, which is `stopped_by` then, else None.

    context: the tokens before the text. The last few are enough. Raises UserError for an empty stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: str | Sequence[str] = (), context: Sequence[int] | np.ndarray = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise UserError("A stop string is empty, so there would be no text at all; leave it out.")
        # Some tokenizers drop a space where a text begins, so decoding needs what came before, special tokens aside.
        self._special = frozenset(tokenizer.special.values())
        self._context = self._ordinary(context)[-_CONTEXT:]
        while self._context and tokenizer.decode(self._context).startswith(_BROKEN):
            del self._context[0]  # it is the end of a character
        self._tokens: list[int] = []
        self._text = ""  # of these tokens
        self._emitted = 0  # how many of its characters
        self.stopped_by: str | None = None

    @property
    def has_pending(self) -> bool:
        """Whether some text was not emitted yet."""
        return self._emitted < len(self._text)

    def add(self, token: int) -> str:
        """Add a token; returns the text that cannot change any more, which may be empty."""
        if not self.has_pending:
            last = self._ordinary(self._tokens)
            # Tokens that show nothing by themselves do not stand for a text before.
            self._context = last if self._tokenizer.decode(last) else self._context + last
            self._tokens, self._emitted = [], 0
        self._tokens.append(token)
        self._text = self._decode(self._tokens)
        whole = self._text.rstrip(_BROKEN)  # some tokenizers give one for every byte of an incomplete character
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := whole.find(stop, self._emitted)) >= 0]
        if not found:
            return self._emit(len(whole) - partial_stop_length(whole, self._stop))
        _, at, self.stopped_by = min(found)
        return self._emit(at)

    def flush(self) -> str:
        """The pending text, once no more tokens come. An incomplete character is left out."""
        return "" if self.stopped_by else self._emit(len(self._text.rstrip(_BROKEN)))

    def emitted_tokens(self) -> list[int]:
        """The tokens of the text that was emitted since nothing was pending; a token that was cut is encoded anew."""
        emitted = self._text[: self._emitted]
        counts = range(len(self._tokens), -1, -1)
        whole = next(n for n in counts if emitted.startswith(self._decode(self._tokens[:n])))
        kept = self._tokens[:whole]
        rest = emitted[len(self._decode(kept)) :]
        anew: list[list[int]] = []
        for before in ("", "\n", self._tokenizer.decode(self._context + kept)):  # some begin a text with a space
            ids = self._tokenizer.encode(before + rest).tolist()
            anew.append(ids[len(self._tokenizer.encode(before)) :])
            if self._decode(kept + anew[-1]) == emitted:
                return kept + anew[-1]
        return kept + anew[0]

    def _emit(self, stop: int) -> str:
        text = self._text[self._emitted : max(stop, self._emitted)]
        self._emitted += len(text)
        return text

    def _ordinary(self, tokens: Sequence[int] | np.ndarray) -> list[int]:
        return [int(token) for token in tokens if int(token) not in self._special]

    def _decode(self, tokens: list[int]) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + tokens)[len(before) :]


def partial_stop_length(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    lengths = (n for one in stop for n in range(min(len(one) - 1, len(text)), 0, -1) if text.endswith(one[:n]))
    return max(lengths, default=0)
