"""The token ids of a rendered chat template: those of transformers, but what a message spells stays text."""

import copy
import re
from functools import cached_property
from typing import TypeVar

import tokenizers
from tokenizers import AddedToken, models

from ttt_e2e.data.tokenizer import Tokenizer, rename_special_tokens
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
        self._special = [t.content for t in self._backend.get_added_tokens_decoder().values() if t.special]
        # Without a vocabulary it finds special tokens and nothing else, in linear time, and gives them their numbers.
        self._finder = tokenizers.Tokenizer(models.BPE())
        self._finder.add_tokens([AddedToken(token, normalized=False) for token in self._special])

    def escape(self, value: _T) -> _T:
        """`value`, a string or JSON that holds some, with its special tokens marked as a message's.

        Raises UserError for half of a surrogate pair, and for JSON that is nested too deeply.
        """
        try:
            if isinstance(value, dict):
                return {self.escape(key): self.escape(item) for key, item in value.items()}  # type: ignore[return-value]
            if isinstance(value, list):
                return [self.escape(item) for item in value]  # type: ignore[return-value]
        except RecursionError as error:
            raise UserError("A variable of the chat template is nested too deeply; send simpler ones.") from error
        return self._mark(_MARKS.sub("", value), _SPELLED) if isinstance(value, str) else value  # type: ignore

    def encode(self, text: str, after: str = "") -> list[int]:
        """The ids of a rendered text; only those behind the last `after` in it, if given, which ends with a token."""
        backend = self._backend
        if _SPELLED in text:
            backend = self._renamed
            text = _SPELLED_NUMBER.sub(lambda found: self._special[int(found[1])], self._mark(text, _WRITTEN))
        before = text[: text.rindex(after) + len(after)] if after else ""
        # A batch, even of one text, leaves other threads their turn.
        whole, first = backend.encode_batch_fast([text, before], add_special_tokens=False)
        ids: list[int] = whole.ids[len(first.ids) :]
        return ids

    @cached_property
    def _renamed(self) -> tokenizers.Tokenizer:
        """The tokenizer with marks as the names of its special tokens, so that no text spells one."""
        names = {token: f"{_WRITTEN}{number}{_WRITTEN}" for number, token in enumerate(self._special)}
        return rename_special_tokens(self._backend, names)

    def _mark(self, text: str, mark: str) -> str:
        """`text` with the number of each special token in its place."""
        try:
            (found,) = self._finder.encode_batch([text])
        except TypeError as error:
            raise UserError("A message holds half of a surrogate pair; remove it.") from error
        pieces, end = [], 0
        for number, (start, stop) in zip(found.ids, found.offsets, strict=True):
            pieces += [text[end:start], mark, str(number), mark]
            end = stop
        return "".join([*pieces, text[end:]])
