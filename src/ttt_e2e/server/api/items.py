"""Items of OpenAI's responses and conversations: messages of text, calls of functions, and their results."""

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from ttt_e2e.server.api.answers import Call, arguments_value
from ttt_e2e.server.api.schemas import MAX_MESSAGES, MAX_PARTS, RequestModel, Text
from ttt_e2e.server.errors import ApiError

Metadata = Annotated[
    dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]], Field(max_length=16)
]
Order = Literal["asc", "desc"]
Limit = Annotated[int, Field(ge=1, le=100)]
Status = Literal["in_progress", "completed", "incomplete"]


class InputPart(RequestModel):
    """A text in a message. The other fields are those of parts that this server sent, and change nothing."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


class InputMessage(RequestModel):
    """A message. The fields behind `content` are those of items that this server sent, and change nothing."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[InputPart], Field(max_length=MAX_PARTS, fail_fast=True)]
    id: str | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None

    def item(self) -> dict[str, Any]:
        """The message as an item with an id of its own."""
        texts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return message_item(self.role, texts)


class InputCall(RequestModel):
    """A call of a function. `id` and `status` are those of items that this server sent, and change nothing."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function_call"]
    call_id: Text = Field(max_length=256)
    name: Text = Field(max_length=128)
    arguments: Text
    id: str | None = None
    status: Status | None = None

    def item(self) -> dict[str, Any]:
        """The call as an item with an id of its own."""
        return call_item(Call(self.call_id, self.name, self.arguments, complete=True))


class InputCallOutput(RequestModel):
    """The result of a call. `id`, `status` and `name` change nothing."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function_call_output"]
    call_id: Text = Field(max_length=256)
    output: Text | Annotated[list[InputPart], Field(max_length=MAX_PARTS, fail_fast=True)]
    id: str | None = None
    status: Status | None = None
    name: str | None = None

    def item(self) -> dict[str, Any]:
        """The result as an item with an id of its own."""
        text = self.output if isinstance(self.output, str) else "\n".join(part.text for part in self.output)
        about = {"type": "function_call_output", "call_id": self.call_id, "output": text, "status": "completed"}
        return {"id": f"fco_{secrets.token_hex(16)}", **about}


class InputReasoning(RequestModel):
    """What another model thought before it answered. It is left out, with all its fields."""

    type: Literal["reasoning"]


class ItemReference(RequestModel):
    """An item of a stored response's output. It is replaced with the item by `documents.resolve_references`."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["item_reference"]
    id: str

    def item(self) -> dict[str, Any]:
        """The reference itself."""
        return {"type": self.type, "id": self.id}


_KINDS = ("message", "function_call", "function_call_output", "item_reference", "reasoning")


def _kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if isinstance(kind, str) and kind not in _KINDS:
        return None
    return kind if kind in _KINDS else "message"


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[ItemReference, Tag("item_reference")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="item_type",
        custom_error_message=f"an item is a {', '.join(_KINDS[:-1])} or {_KINDS[-1]}; omit others",
    ),
]
InputItems = Annotated[list[InputItem], Field(max_length=MAX_MESSAGES, fail_fast=True)]


def new_items(given: Sequence[InputItem]) -> list[dict[str, Any]]:
    """The items of a request with ids of their own, without reasoning."""
    return [one.item() for one in given if not isinstance(one, InputReasoning)]


class ItemPart(BaseModel):
    """A text in an item."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class MessageItem(BaseModel):
    """A message that was sent or generated."""

    id: str
    type: Literal["message"]
    role: Literal["system", "developer", "user", "assistant"]
    status: Status
    content: list[ItemPart]


class CallItem(BaseModel):
    """A call of a function. arguments: JSON that matches the parameters, unless the call is incomplete."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Status


class CallOutputItem(BaseModel):
    """The result of a call."""

    id: str
    type: Literal["function_call_output"]
    call_id: str
    output: str
    status: Status


Item = MessageItem | CallItem | CallOutputItem


class ItemList(BaseModel):
    """A part of a list of items."""

    object: Literal["list"]
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


def message_item(role: str, texts: Sequence[str], status: str = "completed", id: str | None = None) -> dict[str, Any]:
    """A message as an item."""
    content = [output_text(text) if role == "assistant" else {"type": "input_text", "text": text} for text in texts]
    id = id or f"msg_{secrets.token_hex(16)}"
    return {"id": id, "type": "message", "role": role, "status": status, "content": content}


def output_text(text: str) -> dict[str, Any]:
    """The content of a generated message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def call_item(call: Call, status: str | None = None, id: str | None = None) -> dict[str, Any]:
    """A call as an item."""
    status = status or ("completed" if call.complete else "incomplete")
    about = {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.arguments}
    return {"id": id or f"fc_{secrets.token_hex(16)}", **about, "status": status}


def for_template(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items as messages, as chat templates expect them. Calls belong to the assistant's message before them."""
    messages: list[dict[str, Any]] = []
    for item in items:
        if item["type"] == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            function = {"name": item["name"], "arguments": arguments_value(item["arguments"])}
            call = {"id": item["call_id"], "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif item["type"] == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
        else:
            parts = [{"type": "text", "text": part["text"]} for part in item["content"]]
            messages.append({"role": item["role"], "content": parts})
    return messages


def page(items: list[dict[str, Any]], after: str | None, limit: int, order: Order) -> dict[str, Any]:
    """The part of a list of items behind the one with the id `after`. order: "desc" begins with the last one."""
    if order == "desc":
        items = items[::-1]
    if after is not None:
        items = items[index_of(items, after, "after") + 1 :]
    data = items[:limit]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ends, "has_more": len(items) > limit}


def index_of(items: list[dict[str, Any]], id: str, param: str) -> int:
    """The place of the item with this id. Raises ApiError, about the parameter `param`, if there is none."""
    for index, item in enumerate(items):
        if item["id"] == id:
            return index
    raise ApiError(404, "There is no such item; it may have been deleted.", "item_not_found", param)
