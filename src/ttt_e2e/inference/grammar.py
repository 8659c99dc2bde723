"""Grammars for generated texts: which tokens may come next, as the library llguidance finds out.

A grammar is a text in llguidance's variant of Lark, in which `%json {...}` stands for all JSON texts that a JSON Schema
allows. It describes characters, so any tokenizer whose tokens are bytes or characters will do.

Shapes: V tokens of the vocabulary.
"""

import json
import math
import threading
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError

if TYPE_CHECKING:
    import llguidance

# At most one space between two parts of a JSON text: without a limit, some models write spaces for ever.
_JSON_OPTIONS = {"whitespace_pattern": " "}
# Keywords of JSON Schema whose values are tables of schemas by name, and those whose values are no schemas.
_TABLES = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_VALUES = ("const", "enum", "default", "examples")
# Every object and list matches these. Formats that JSON Schema does not define, such as "path", are annotations, too.
_ANNOTATIONS = (("propertyNames", {"type": "string"}), ("uniqueItems", False))
_FORMATS = (
    *("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6"),
    *("uri", "uri-reference", "iri", "iri-reference", "uuid", "uri-template", "json-pointer"),
    *("relative-json-pointer", "regex"),
)
_MAX_CHARACTERS, _MAX_SYMBOLS = 100_000, 20_000  # of a grammar, so that none takes long to compile


class Matcher:
    """How far one text has come in a grammar. `complete`: the text is whole, and nothing can be added to it."""

    def __init__(self, state: "llguidance.LLMatcher") -> None:
        self._state = state
        self.complete = state.is_stopped()

    def mask(self, logits_V: Tensor) -> Tensor:
        """The logits, with minus infinity for tokens that must not come next. At least one token may.

        Raises UserError if the grammar turns out to be too complex.
        """
        bits = np.unpackbits(np.frombuffer(self._state.compute_bitmask(), np.uint8), bitorder="little")
        if self._state.is_error() or not bits[: len(logits_V)].any():
            raise _error(self._state.get_error())
        return logits_V.masked_fill(torch.from_numpy(bits[: len(logits_V)]) == 0, -math.inf)

    def add(self, token: int) -> None:
        """Go on after a token that may come next. Raises UserError if the grammar turns out to be too complex."""
        if not self._state.consume_token(token):
            raise _error(self._state.get_error())
        self.complete = self._state.is_stopped()


class Grammar:
    """A compiled grammar, for any number of texts."""

    def __init__(self, state: "llguidance.LLMatcher") -> None:
        self._state = state

    def matcher(self) -> Matcher:
        """The beginning of a text."""
        return Matcher(self._state.deep_copy())


class GrammarCompiler:
    """Compiles grammars for a tokenizer and a model's vocabulary size. Can be used by several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size, self._lock = tokenizer, vocab_size, threading.Lock()

    def compile(self, grammar: str) -> Grammar:
        """Compile a grammar, which takes some milliseconds, and the first time up to a second.

        Raises UserError if it is invalid, too complex, or matches nothing.
        """
        with self._lock:  # the first one makes the tokens
            tokens = self._tokens
        from llguidance import LLMatcher, LLParserLimits

        if len(grammar) > _MAX_CHARACTERS:
            raise UserError(f"The schema has more than {_MAX_CHARACTERS:,} characters; send a simpler one.")
        limits = LLParserLimits(max_grammar_size=_MAX_SYMBOLS, verbose_errors=False)
        state = LLMatcher(tokens, grammar, log_level=0, limits=limits)
        if not state.is_error():
            Matcher(state.deep_copy()).mask(torch.zeros(self._vocab_size))  # some errors show with the first token
            return Grammar(state)
        # In front is the place in the grammar, which is not what the client wrote; further lines repeat the grammar.
        raise _error(state.get_error().rpartition("JSON schema: ")[2])

    @cached_property
    def _tokens(self) -> "llguidance.LLTokenizer":
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise UserError('Grammars need llguidance; install it with: pip install "ttt-e2e[serve]"') from error
        ends = sorted(self._tokenizer.end_ids)
        try:
            return LLTokenizer(self._tokenizer.backend.to_str(), n_vocab=self._vocab_size, eos_token=ends)
        except ValueError as error:
            raise UserError(f"The tokenizer of this model does not work with schemas ({error}); omit them.") from error


def json_rule(schema: Mapping[str, Any]) -> str:
    """A JSON text that the schema allows, as a part of a grammar. Raises UserError if it is nested too deeply."""
    try:
        return "%json " + json.dumps({**_without_annotations(schema), "x-guidance": _JSON_OPTIONS})
    except RecursionError as error:
        raise _error("it is nested too deeply") from error


def _without_annotations(schema: Any, *, by_name: bool = False) -> Any:
    """The schema without keywords that allow everything, and that llguidance refuses. Zod and Pydantic write them.

    by_name: this is a table of schemas by name.
    """
    if isinstance(schema, list):
        return [_without_annotations(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if by_name:
        return {name: _without_annotations(one) for name, one in schema.items()}
    return {
        key: value if key in _VALUES else _without_annotations(value, by_name=key in _TABLES)
        for key, value in schema.items()
        if (key, value) not in _ANNOTATIONS
        and not (key == "format" and isinstance(value, str) and value not in _FORMATS)
    }


def text_rule(text: str) -> str:
    """Exactly this text, as a part of a grammar."""
    return json.dumps(text, ensure_ascii=False)


def _error(reason: str) -> UserError:
    reason = reason.partition("\n")[0].rstrip(":.") or "no text matches it"
    return UserError(f"The schema cannot be followed ({reason}); send a simpler one.")
