"""Functions that an answer may call: how they are named to a model, how a call is written, and what an answer may be.

A chat template that writes calls in its own way, with the arguments as JSON, is given the functions, as transformers
does it, and calls are written and found in its way. For every other template the functions are described in the first
message, and calls are written as Hermes models do.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ttt_e2e.inference.grammar import json_rule, text_rule

MAX_CALLS = 16  # in an answer
_Message = dict[str, Any]
Literal = tuple[str | int, ...]
"""Texts, and ids of special tokens between them."""


class CallForm(NamedTuple):
    """How an answer calls functions: `begin NAME middle ARGUMENTS joint NAME middle ARGUMENTS ... end`.

    joint: None if an answer has one call only.
    """

    begin: Literal
    middle: Literal
    joint: Literal | None
    end: Literal


HERMES = CallForm(
    ('<tool_call>\n{"name": "',),
    ('", "arguments": ',),
    ('}\n</tool_call>\n<tool_call>\n{"name": "',),
    ("}\n</tool_call>",),
)


class Function(NamedTuple):
    """A function that may be called. place: where the parameters, a JSON Schema, are in the request."""

    name: str
    description: str | None
    parameters: Mapping[str, Any]
    place: str


@dataclass(frozen=True)
class Tools:
    """Functions that an answer may call.

    choice: "auto"; "required", where it must; or, if `named`, which one it calls. parallel: whether several times.
    """

    functions: tuple[Function, ...]
    choice: str = "auto"
    named: bool = False
    parallel: bool = True

    @property
    def definitions(self) -> list[dict[str, Any]]:
        """The functions as transformers gives them to a chat template."""
        definitions = []
        for one in self.functions:
            about = {} if one.description is None else {"description": one.description}
            function = {"name": one.name, **about, "parameters": dict(one.parameters)}
            definitions.append({"type": "function", "function": function})
        return definitions

    @property
    def digest(self) -> str:
        """SHA-256 of the definitions."""
        return hashlib.sha256(json.dumps(self.definitions).encode()).hexdigest()


def visible(literal: Literal) -> str:
    """The text of a literal, without special tokens."""
    return "".join(part for part in literal if isinstance(part, str))


def described(messages: Sequence[_Message], tools: Sequence[Mapping[str, Any]], form: CallForm) -> list[_Message]:
    """The messages with a description of the functions in the user's first one, which every template has."""
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = _call_text(form, [("NAME", {"ARGUMENT": "VALUE"})])
    text = (
        f"You can call these functions, whose parameters are JSON Schemas:\n{lines}\n\n"
        f"To call one, write its name and arguments in this way:\n{example}"
    )
    for at, message in enumerate(messages):
        if message["role"] == "user":
            content = message["content"]
            parts = [{"type": "text", "text": text}, *(content if isinstance(content, list) else ())]
            first = message | {"content": f"{text}\n\n{content}" if isinstance(content, str) else parts}
            return [*messages[:at], first, *messages[at + 1 :]]
    at = sum(message["role"] in ("system", "developer") for message in messages)
    return [*messages[:at], {"role": "user", "content": text}, *messages[at:]]


def written_out(messages: Sequence[_Message], form: CallForm = HERMES) -> list[_Message]:
    """The messages with calls and their results as text, for a template that knows nothing of them."""
    changed: list[_Message] = []
    role = None  # of the message before
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{_text(message['content'])}\n</tool_response>"
            if role == "tool":  # the user has one turn, as many templates require
                changed[-1]["content"] += f"\n{result}"
            else:
                changed.append({"role": "user", "content": result})
        elif calls := message.get("tool_calls"):
            pairs = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
            before = _text(message["content"])
            text = before + "\n" * bool(before) + _call_text(form, pairs)
            changed.append({"role": "assistant", "content": text})
        else:
            changed.append(message)
        role = message["role"]
    return changed


def find_form(one: str, two: str, name: str, arguments: str, special: Mapping[str, int]) -> CallForm | None:
    """The form of an answer `one` that calls the function `name`; None if it is not clear.

    two: an answer that calls it twice; empty if there is none. arguments: a pattern for the arguments. special: the
    special tokens, which answers spell.
    """
    found = re.fullmatch(f"(.*?){name}(.*?){arguments}(.*)", one, re.DOTALL)
    if found is None:
        return None
    begin, middle, end = found.groups()
    joint = re.fullmatch(
        f"{re.escape(begin)}{name}{re.escape(middle)}{arguments}"
        f"(.+?){name}{re.escape(middle)}{arguments}{re.escape(end)}",
        two,
        re.DOTALL,
    )
    form = CallForm(*(_literal(part, special) for part in (begin, middle, joint[1] if joint else "", end)))
    if not visible(form.begin).strip() or not visible(form.middle).strip():
        return None  # it could not be found in a text
    return form if visible(form.joint or ()).strip() else form._replace(joint=None)


def answer_grammar(tools: Tools | None, form: CallForm, schema: Mapping[str, Any] | None) -> str:
    """The grammar of an answer, in llguidance's Lark.

    tools: functions that it may call. schema: of a JSON text, which it is if it calls none; None for any text.
    """
    if tools is None:
        return f"start: {json_rule(schema or {})}"
    names = {tools.choice} if tools.named else {one.name for one in tools.functions}
    chosen = [one for one in tools.functions if one.name in names]
    picks = [f"{_rule((one.name, *form.middle))} {json_rule(parameters_schema(one))}" for one in chosen]
    more = ""
    if tools.parallel and not tools.named and form.joint is not None:
        more = f"({_rule(form.joint)} pick){{0,{MAX_CALLS - 1}}}"
    rules = [f"calls: pick {more} {_rule(form.end)}", f"pick: {' | '.join(picks)}"]
    if tools.choice != "auto":
        return "\n".join([f"start: {_rule(form.begin)} calls", *rules])
    if schema is not None:
        return "\n".join([f"start: {json_rule(schema)} | {_rule(form.begin)} calls", *rules])
    # Text goes over into a call where the call begins: at a special token, or as soon as its beginning is written.
    at = next((i for i, part in enumerate(form.begin) if isinstance(part, int)), None)
    if at is None:
        start = ["start: TEXT | lead calls", f"lead[lazy]: TEXT {_rule(form.begin)}"]
    else:
        start = [f"start: TEXT | TEXT {_rule(form.begin[at:])} calls"]
    return "\n".join([*start, r"TEXT: /(.|\n)*/", *rules])


def parameters_schema(function: Function) -> dict[str, Any]:
    """The schema of a function's arguments, which are always an object."""
    return {"type": "object", **function.parameters}


def _rule(literal: Literal) -> str:
    return " ".join(text_rule(part) if isinstance(part, str) else f"<[{part}]>" for part in literal)


def _literal(text: str, special: Mapping[str, int]) -> Literal:
    """A text in which special tokens are spelled."""
    if not special:
        return (text,)
    names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    return tuple(special.get(part, part) for part in re.split(f"({names})", text) if part)


def _call_text(form: CallForm, calls: Sequence[tuple[str, Any]]) -> str:
    joint, middle = visible(form.joint or ()), visible(form.middle)
    written = joint.join(f"{name}{middle}{_json(arguments)}" for name, arguments in calls)
    return f"{visible(form.begin)}{written}{visible(form.end)}"


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
