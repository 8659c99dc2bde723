"""The token ids of a rendered chat template: those of transformers, but what a message spells stays text."""

import copy
import re
from functools import cached_property
from typing import TypeVar

import tokenizers

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError

ANSWER = "\ufdd2"
"""Stands for a text. Like the marks below it is a noncharacter, which no meaningful text has; messages lose them."""

_WRITTEN, _SPELLED = "\ufdd0", "\ufdd1"  # around the number of a special token: of the template, and of a message
_MARKS = re.compile(f"[{_WRITTEN}{_SPELLED}{ANSWER}]")
_SPELLED_NUMBER = re.compile(f"{_SPELLED}([0-9]+){_SPELLED}")
_T = TypeVar("_T")


class ChatTokens:
    """Encodes what a chat template gives for messages that have been escaped.

    As in transformers, the text is encoded as a whole: some tokenizers treat its beginning, or what stands beside a
    special token, in their own way.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = copy.deepcopy(tokenizer.backend)
        self._backend.encode_special_tokens = False
        self._special = [(i, t) for i, t in self._backend.get_added_tokens_decoder().items() if t.special]
        self._numbers = {token.content: str(number) for number, (_, token) in enumerate(self._special)}
        longest_first = sorted(self._numbers, key=len, reverse=True)
        self._texts = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def escape(self, value: _T) -> _T:
        """`value`, a string or JSON that holds some, with its special tokens marked as a message's."""
        if isinstance(value, dict):
            return {key: self.escape(item) for key, item in value.items()}  # type: ignore[return-value]
        if isinstance(value, list):
            return [self.escape(item) for item in value]  # type: ignore[return-value]
        return self._mark(_MARKS.sub("", value), _SPELLED) if isinstance(value, str) else value  # type: ignore

    def encode(self, text: str, after: str = "") -> list[int]:
        """The ids of a rendered text; only those behind the last `after` in it, if given.

        Raises UserError for half of a surrogate pair.
        """
        backend = self._backend
        if _SPELLED in text:
            backend = self._marked_backend
            text = _SPELLED_NUMBER.sub(lambda found: self._content(found[1]), self._mark(text, _WRITTEN))
        start = text.rindex(after) + len(after) if after else 0
        try:
            encoding = backend.encode(text, add_special_tokens=False)
        except TypeError as error:
            raise UserError("A message holds half of a surrogate pair; remove it.") from error
        rows = zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True)
        return [self._id(token) if _WRITTEN in token else i for i, token, (begin, _) in rows if begin >= start]

    @cached_property
    def _marked_backend(self) -> tokenizers.Tokenizer:
        """A tokenizer to which special tokens are text; marked by their numbers they are tokens."""
        backend = copy.deepcopy(self._backend)
        backend.encode_special_tokens = True
        marks = [
            tokenizers.AddedToken(self._mark(t.content, _WRITTEN), lstrip=t.lstrip, rstrip=t.rstrip, normalized=False)
            for _, t in self._special
        ]
        backend.add_tokens(marks)
        return backend

    def _mark(self, text: str, mark: str) -> str:
        return self._texts.sub(lambda found: mark + self._numbers[found[0]] + mark, text)

    def _content(self, number: str) -> str:
        return str(self._special[int(number)][1].content)

    def _id(self, token: str) -> int:
        """The id of a marked token, which may have taken spaces around it."""
        return self._special[int(token.split(_WRITTEN)[1])][0]
