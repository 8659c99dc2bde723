"""An answer while its text comes: which part of it is text, and which part calls functions."""

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ttt_e2e.inference.text_stream import partial_stop_length
from ttt_e2e.server.tool_calls import CallForm, visible


class TextPart(NamedTuple):
    """The next part of the text."""

    text: str


class CallBegins(NamedTuple):
    """The call with this number, from 0, begins."""

    number: int
    id: str
    name: str


class ArgumentsPart(NamedTuple):
    """The next part of a call's arguments, which are JSON."""

    number: int
    text: str


class CallEnds(NamedTuple):
    """The arguments of a call are complete."""

    number: int


Part = TextPart | CallBegins | ArgumentsPart | CallEnds


@dataclass
class Call:
    """A call of a function. arguments: JSON, perhaps incomplete."""

    id: str
    name: str
    arguments: str = ""
    complete: bool = False


@dataclass
class Answer:
    """An answer that is parsed while its text is added.

    form: how calls are written; None if there are none. ids: those of the calls, made where there are too few, so that
    another parser that has the same list gives the same ids.
    """

    form: CallForm | None = None
    ids: list[str] = field(default_factory=list)
    text: str = ""
    calls: list[Call] = field(default_factory=list)
    _rest: str = ""  # what is not parsed yet
    _expects: str = "text"  # or "name", "arguments", "end"
    _depth: int = 0  # of the arguments: how many brackets are open
    _in_string: bool = False
    _escaped: bool = False

    def add(self, text: str) -> Iterator[Part]:
        """Parse more text; yields the parts that cannot change any more."""
        self._rest += text
        while self._rest:
            before = self._rest, self._expects
            yield from {"text": self._text, "name": self._name, "arguments": self._arguments, "end": self._joint}[
                self._expects
            ]()
            if before == (self._rest, self._expects):
                return

    def end(self) -> Iterator[Part]:
        """Parse what is left, once no more text comes. A call without a complete name is left out."""
        if self._expects == "text" and self._rest:
            yield self._tell(self._rest)
            self._rest = ""

    @property
    def called(self) -> bool:
        """Whether there are calls, all complete."""
        return bool(self.calls) and self.calls[-1].complete

    def _tell(self, text: str) -> TextPart:
        self.text += text
        return TextPart(text)

    def _text(self) -> Iterator[Part]:
        if self.form is None:
            yield self._tell(self._rest)
            self._rest = ""
            return
        begin = visible(self.form.begin).lstrip()
        before, found, after = self._rest.partition(begin)
        if not found:
            before = before[: len(before) - partial_stop_length(before, (begin,))]
        text = before.rstrip()  # if a call comes next, the space before it is none of the text
        if text:
            yield self._tell(text)
        self._rest = after if found else self._rest[len(text) :]
        if found:
            self._expects = "name"

    def _name(self) -> Iterator[Part]:
        assert self.form is not None
        name, found, after = self._rest.partition(visible(self.form.middle))
        if found:
            number = len(self.calls)
            if number == len(self.ids):
                # Mistral's chat templates require nine characters.
                self.ids.append(secrets.token_hex(5)[:9])
            self.calls.append(Call(self.ids[number], name))
            self._rest, self._expects = after, "arguments"
            yield CallBegins(number, self.ids[number], name)

    def _arguments(self) -> Iterator[Part]:
        end = None
        for at, character in enumerate(self._rest, 1):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = character == "\\", character != '"'
            else:
                self._in_string = character == '"'
                self._depth += (character in "{[") - (character in "}]")
                if self._depth == 0 and character in "}]":
                    end = at
                    break
        taken, self._rest = self._rest[:end], "" if end is None else self._rest[end:]
        number = len(self.calls) - 1
        self.calls[number].arguments += taken
        yield ArgumentsPart(number, taken)
        if end is not None:
            self.calls[number].complete, self._expects = True, "end"
            yield CallEnds(number)

    def _joint(self) -> Iterator[Part]:
        assert self.form is not None
        joint = visible(self.form.joint or ())
        if joint and self._rest.startswith(joint):
            self._rest, self._expects = self._rest[len(joint) :], "name"
        yield from ()


def parse_answer(text: str, form: CallForm | None, ids: list[str]) -> Answer:
    """The answer with this whole text."""
    answer = Answer(form, ids)
    for _ in (*answer.add(text), *answer.end()):
        pass
    return answer


def arguments_value(arguments: str) -> object:
    """The value of a call's arguments; the text itself if it is not JSON."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
