"""Responses and conversations as sessions: the ids, and the documents that the store keeps beside the sessions.

The response `resp_X` and the conversation `conv_X` are the session `sess-X`. What the model has learned is in the
session; its document has what OpenAI's API says of it. A session without a document is a conversation of which no
items are known.
"""

import json
import re
from contextlib import suppress
from typing import Any, Literal

from ttt_e2e.inference.session import Session
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.records import DamagedSessionError, LimitReachedError, SessionNotFoundError
from ttt_e2e.server.engine.slot import SessionSlot
from ttt_e2e.server.errors import ApiError

Kind = Literal["response", "conversation"]
_MAX_CHARACTERS = 16 << 20  # of a document, which is read and written as a whole
_PREFIXES: dict[Kind, str] = {"response": "resp_", "conversation": "conv_"}


def session_id(id: str) -> str:
    """The id of the session behind a response or conversation."""
    return "sess-" + id[5:]


def public_id(kind: Kind, session: str) -> str:
    """The id of a session as a response or conversation."""
    return _PREFIXES[kind] + session.removeprefix("sess-")


async def load_document(
    engine: Engine, owner: str, kind: Kind, id: str, param: str | None = None
) -> tuple[SessionSlot, dict[str, Any]]:
    """The session of a response or conversation, and its document. A conversation may also have a session's id.

    Raises ApiError, about the parameter `param`, if the owner has none with this id.
    """
    prefix = f"{_PREFIXES[kind]}|sess-" if kind == "conversation" else _PREFIXES[kind]
    try:
        if not re.fullmatch(f"({prefix})[0-9a-f]{{32}}", id):
            raise SessionNotFoundError
        slot = await engine.sessions.slot(owner, session_id(id))
        text = await engine.sessions.document(slot)
    except SessionNotFoundError as error:
        raise _not_found(kind, param) from error
    document: dict[str, Any] = {"kind": "conversation", "metadata": {}, "items": [], "read": 0}
    if text is not None:
        document = json.loads(text)
    if document["kind"] != kind:
        raise _not_found(kind, param)
    return slot, document


async def resolve_references(
    engine: Engine, owner: str, items: list[dict[str, Any]], param: str
) -> list[dict[str, Any]]:
    """The items, with those of the owner's stored responses in place of references to them.

    The id of an item of a response begins with the response's own. Raises ApiError, about the parameter `param`, if
    there is no such item.
    """
    outputs: dict[str, list[dict[str, Any]]] = {}  # of responses, each of which is read once

    async def referenced(id: str) -> dict[str, Any]:
        response = public_id("response", id.partition("_")[2][:32])
        if response not in outputs:
            outputs[response] = []
            with suppress(ApiError):
                _, document = await load_document(engine, owner, "response", response)
                outputs[response] = document["response"]["output"]
        for item in outputs[response]:
            if item["id"] == id:
                return item
        message = f"{param}: no stored response has the item {id[:64]}; send the item itself."
        raise ApiError(404, message, "item_not_found", param)

    return [await referenced(item["id"]) if item["type"] == "item_reference" else item for item in items]


async def superfluous(engine: Engine, owner: str, kept: str | None) -> str | None:
    """The session of the owner's oldest stored response, but for `kept`, if there is no room for another session.

    Clients store responses unless told otherwise, and few delete them. Raises LimitReachedError if there is neither
    room nor such a response.
    """
    try:
        await engine.sessions.check_room(owner)
        return None
    except LimitReachedError:
        for summary in await engine.sessions.summaries(owner):
            if summary.id != kept:
                with suppress(SessionNotFoundError, DamagedSessionError):  # deleted meanwhile; or not to be judged
                    text = await engine.sessions.document(await engine.sessions.slot(owner, summary.id))
                    if text is not None and json.loads(text)["kind"] == "response":
                        return summary.id
        raise


async def store_response(
    engine: Engine, owner: str, session: Session, document: str, id: str, previous: SessionSlot | None
) -> None:
    """Add the session of a response, in place of the owner's oldest response if there is no room for another session.

    Other requests do the same meanwhile, and may take the room that was made. previous: what the response follows; it
    is kept, and its notebook shared. Raises LimitReachedError as `superfluous` does.
    """
    while True:
        oldest = await superfluous(engine, owner, previous.record.id if previous else None)
        if oldest is not None:
            with suppress(SessionNotFoundError):  # another request has deleted it
                await engine.sessions.delete(owner, oldest)
        with suppress(LimitReachedError):  # another request has taken the room
            await engine.sessions.create(owner, session, document, id, notebook=previous)
            return


def to_text(document: dict[str, Any]) -> str:
    """The document as the store keeps it. Raises LimitReachedError if it is too long."""
    text = json.dumps(document)
    if len(text) > _MAX_CHARACTERS:
        raise LimitReachedError("The conversation has too many items; begin another one.")
    return text


def _not_found(kind: Kind, param: str | None) -> ApiError:
    return ApiError(404, f"There is no such {kind}; it may have been deleted.", f"{kind}_not_found", param)
