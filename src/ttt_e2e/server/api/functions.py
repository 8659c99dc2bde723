"""Functions that an answer may call, and JSON Schemas that it must match, in the forms that the APIs share."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, ConfigDict, Field

from ttt_e2e.server.api.schemas import RequestModel, Text, contradiction
from ttt_e2e.server.tool_calls import Function, Tools

MAX_FUNCTIONS = 128
FunctionName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,128}$")]


def _check_json(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise ValueError("it is nested too deeply, or holds half of a surrogate pair.") from error
    return value


JsonSchema = Annotated[dict[str, Any], AfterValidator(_check_json)]


class Schema(NamedTuple):
    """A JSON Schema of an answer. place: where it is in the request."""

    schema: dict[str, Any]
    place: str


class FunctionDefinition(RequestModel):
    """A function that an answer may call. Arguments always match `parameters`, whatever `strict` is."""

    model_config = ConfigDict(extra="forbid")

    name: FunctionName
    description: Text | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None


class FunctionReference(RequestModel):
    """A function by its name."""

    model_config = ConfigDict(extra="forbid")

    name: FunctionName


class NamedSchema(RequestModel):
    """A JSON Schema. The answer always matches it, whatever `strict` is."""

    model_config = ConfigDict(extra="forbid")

    name: FunctionName
    json_schema: JsonSchema | None = Field(None, alias="schema")
    description: Text | None = None
    strict: bool | None = None


class TextFormat(RequestModel):
    """Any text."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    """Any JSON object."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["json_object"]


def make_tools(
    definitions: Sequence[tuple[FunctionDefinition, str]], choice: str, named: bool, parallel: bool | None
) -> Tools | None:
    """The functions that an answer may call; None if there are none.

    definitions: each with the place of its parameters in the request. choice: "none", "auto", "required", or, if it is
    `named`, a function. Raises a validation error about `tools` or `tool_choice` if they contradict each other.
    """
    functions = tuple(
        Function(one.name, one.description, one.parameters or {"type": "object", "properties": {}}, place)
        for one, place in definitions
    )
    names = [one.name for one in functions]
    for function in functions:
        if function.parameters.get("type", "object") != "object":
            message = f"{function.place}: arguments are an object; describe it, with the type object."
            raise contradiction("tools", message)
        if names.count(function.name) > 1:
            raise contradiction("tools", f"tools: several functions have the name {function.name}; rename them.")
    if named and choice not in names:
        known = f"name one of tools: {', '.join(names)}" if names else "send it in tools"
        raise contradiction("tool_choice", f"tool_choice: there is no function {choice}; {known}.")
    if choice == "required" and not named and not names:
        raise contradiction("tool_choice", "tool_choice: there is no function to call; send tools, or omit it.")
    if not names or (choice == "none" and not named):
        return None
    return Tools(functions, choice, named, parallel is not False)
