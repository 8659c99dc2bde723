"""Items of OpenAI's responses and conversations: messages of text."""

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ttt_e2e.server.api.schemas import MAX_MESSAGES, MAX_PARTS, RequestModel, Text
from ttt_e2e.server.errors import ApiError

Metadata = Annotated[
    dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]], Field(max_length=16)
]
Order = Literal["asc", "desc"]
Limit = Annotated[int, Field(ge=1, le=100)]


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
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Literal["commentary", "final_answer"] | None = None

    def item(self) -> dict[str, Any]:
        """The message as an item with an id of its own."""
        texts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return message_item(self.role, texts)


InputMessages = Annotated[list[InputMessage], Field(max_length=MAX_MESSAGES, fail_fast=True)]


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
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[ItemPart]


class ItemList(BaseModel):
    """A part of a list of items."""

    object: Literal["list"]
    data: list[MessageItem]
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


def for_template(item: dict[str, Any]) -> dict[str, Any]:
    """Role and content of an item, as chat templates expect them."""
    parts = [{"type": "text", "text": part["text"]} for part in item["content"]]
    return {"role": item["role"], "content": parts}


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
