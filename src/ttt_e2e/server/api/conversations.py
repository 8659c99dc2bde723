"""OpenAI's conversations: sessions with a list of the messages, calls and results in them.

Items that are added are read with the next response: a chat template needs what they are an answer to, and what
comes next.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from ttt_e2e.server.api.documents import load_document, public_id, resolve_references, to_text
from ttt_e2e.server.api.items import (
    InputItem,
    Item,
    ItemList,
    Limit,
    Metadata,
    Order,
    index_of,
    new_items,
    page,
)
from ttt_e2e.server.api.schemas import RequestModel
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.slot import SessionSlot
from ttt_e2e.server.errors import ApiError

_NewItems = Annotated[list[InputItem], Field(max_length=20, fail_fast=True)]


class ConversationRequest(RequestModel):
    """A new conversation."""

    model_config = ConfigDict(extra="forbid")

    items: _NewItems | None = None
    metadata: Metadata | None = None


class ConversationUpdate(RequestModel):
    """New metadata of a conversation."""

    model_config = ConfigDict(extra="forbid")

    metadata: Metadata | None


class NewItems(RequestModel):
    """Messages to add to a conversation."""

    model_config = ConfigDict(extra="forbid")

    items: _NewItems


class Conversation(BaseModel):
    """A conversation. created_at: Unix time."""

    id: str
    object: Literal["conversation"]
    created_at: int
    metadata: dict[str, str]


class DeletedConversation(BaseModel):
    """Confirms that a conversation was deleted."""

    id: str
    object: Literal["conversation.deleted"]
    deleted: bool


def routes(engine: Engine) -> APIRouter:
    """The endpoints under /v1/conversations."""
    router = APIRouter(prefix="/v1/conversations", tags=["OpenAI"])

    async def load(request: Request, id: str) -> tuple[SessionSlot, dict[str, Any]]:
        return await load_document(engine, request.state.caller.owner, "conversation", id, "conversation_id")

    async def resolve(request: Request, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return await resolve_references(engine, request.state.caller.owner, items, "items")

    @router.post("")
    async def create(request: Request, body: ConversationRequest | None = None) -> Conversation:
        """Create a conversation, which is a session."""
        body = body or ConversationRequest()
        items = await resolve(request, new_items(body.items or ()))
        document = {"kind": "conversation", "metadata": body.metadata or {}, "items": items, "read": 0}
        made = await engine.sessions.create(request.state.caller.owner, document=to_text(document))
        return _conversation(public_id("conversation", made.id), made.created, document)

    @router.get("/{conversation_id}")
    async def conversation(conversation_id: str, request: Request) -> Conversation:
        """Describe a conversation."""
        slot, document = await load(request, conversation_id)
        return _conversation(conversation_id, slot.record.created, document)

    @router.post("/{conversation_id}")
    async def update(conversation_id: str, body: ConversationUpdate, request: Request) -> Conversation:
        """Replace the metadata of a conversation."""
        slot, _ = await load(request, conversation_id)
        async with engine.sessions.changing(slot):
            _, document = await load(request, conversation_id)
            document["metadata"] = body.metadata or {}
            await engine.sessions.set_document(slot, to_text(document))
        return _conversation(conversation_id, slot.record.created, document)

    @router.delete("/{conversation_id}")
    async def delete(conversation_id: str, request: Request) -> DeletedConversation:
        """Delete a conversation and its session."""
        slot, _ = await load(request, conversation_id)
        await engine.sessions.delete(request.state.caller.owner, slot.record.id)
        return DeletedConversation(id=conversation_id, object="conversation.deleted", deleted=True)

    @router.get("/{conversation_id}/items")
    async def items(
        conversation_id: str,
        request: Request,
        after: str | None = None,
        limit: Annotated[Limit, Query()] = 20,
        order: Order = "desc",
    ) -> ItemList:
        """List the messages of a conversation."""
        _, document = await load(request, conversation_id)
        return ItemList(**page(document["items"], after, limit, order))

    @router.post("/{conversation_id}/items")
    async def add_items(conversation_id: str, body: NewItems, request: Request) -> ItemList:
        """Add messages to a conversation, which the model reads with the next response."""
        slot, _ = await load(request, conversation_id)
        new = await resolve(request, new_items(body.items))
        async with engine.sessions.changing(slot):
            _, document = await load(request, conversation_id)
            document["items"] += new
            await engine.sessions.set_document(slot, to_text(document))
        return ItemList(**page(new, None, len(new), "asc"))

    @router.get("/{conversation_id}/items/{item_id}")
    async def item(conversation_id: str, item_id: str, request: Request) -> Item:
        """Give an item of a conversation."""
        _, document = await load(request, conversation_id)
        item = document["items"][index_of(document["items"], item_id, "item_id")]
        found: Item = TypeAdapter(Item).validate_python(item)
        return found

    @router.delete("/{conversation_id}/items/{item_id}")
    async def delete_item(conversation_id: str, item_id: str, request: Request) -> Conversation:
        """Delete a message that the model has not read yet."""
        slot, _ = await load(request, conversation_id)
        async with engine.sessions.changing(slot):
            _, document = await load(request, conversation_id)
            index = index_of(document["items"], item_id, "item_id")
            if index < document["read"]:
                message = "The model has learned from this item and cannot forget it; begin another conversation."
                raise ApiError(400, message, "item_was_read", "item_id")
            del document["items"][index]
            await engine.sessions.set_document(slot, to_text(document))
        return _conversation(conversation_id, slot.record.created, document)

    return router


def _conversation(id: str, created: float, document: dict[str, Any]) -> Conversation:
    return Conversation(id=id, object="conversation", created_at=int(created), metadata=document["metadata"])
