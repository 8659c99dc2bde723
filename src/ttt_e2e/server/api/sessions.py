"""Endpoints for sessions: create, list, read a text, fork, export, import and delete."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import IO, Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from ttt_e2e.retrieval.documents import MAX_NAME
from ttt_e2e.retrieval.generate import DEFAULT_PASSAGES, MAX_PASSAGES, MAX_QUERY
from ttt_e2e.server.api.schemas import RequestModel, Text
from ttt_e2e.server.api.streams import EVENT_STREAM, StreamResponse, cancel_on_disconnect, event_stream
from ttt_e2e.server.api.uploads import receive_file, receive_text
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.records import ReadProgress, SessionSummary, Source
from ttt_e2e.server.middleware.logs import LogEntry, log_entry

EVENT_SECONDS = 0.1  # minimum time between two progress events
_CHUNK_BYTES = 1 << 18
_BINARY = "application/octet-stream"
_BINARY_SCHEMA = {"type": "string", "format": "binary"}
_BINARY_CONTENT = {_BINARY: {"schema": _BINARY_SCHEMA}}
_FORM_SCHEMA = {"type": "object", "properties": {"file": _BINARY_SCHEMA}, "required": ["file"]}
_TEXT_CONTENT = {
    "text/plain": {"schema": {"type": "string", "minLength": 1}},
    "multipart/form-data": {"schema": {**_FORM_SCHEMA, "additionalProperties": False}},
}


class SessionRequest(RequestModel):
    """A new session. notebook: whether it keeps the exact text of what it reads, to be searched."""

    model_config = ConfigDict(extra="forbid")

    notebook: bool = False


class RecallRequest(RequestModel):
    """What to search a notebook for. count: how many passages at most."""

    model_config = ConfigDict(extra="forbid")

    query: Text = Field(max_length=MAX_QUERY)
    count: int = Field(DEFAULT_PASSAGES, ge=1, le=MAX_PASSAGES)


class SourceList(BaseModel):
    """Passages of a notebook, the best first."""

    object: Literal["list"]
    data: list[Source]


class SessionList(BaseModel):
    """All sessions of a key, the oldest first."""

    object: Literal["list"]
    data: list[SessionSummary]


class DeletedSession(BaseModel):
    """Confirms that a session was deleted."""

    id: str
    object: Literal["session.deleted"]
    deleted: bool


def routes(engine: Engine) -> APIRouter:
    """The endpoints under /v1/sessions, except completions."""
    router = APIRouter(prefix="/v1/sessions", tags=["sessions"])

    @router.post("", status_code=201)
    async def create(request: Request, body: SessionRequest | None = None) -> SessionSummary:
        """Create an empty session."""
        return await engine.sessions.create(_owner(request), notebook=body is not None and body.notebook)

    @router.get("")
    async def sessions(request: Request) -> SessionList:
        """List all sessions of this key, the oldest first."""
        return SessionList(object="list", data=await engine.sessions.summaries(_owner(request)))

    @router.post(
        "/import", status_code=201, openapi_extra={"requestBody": {"required": True, "content": _BINARY_CONTENT}}
    )
    async def import_session(request: Request) -> SessionSummary:
        """Create a session from a session file, as export returns and `ttt-e2e read --save` writes; or from a tar.

        A tar has a session file, and the notebook beside it.
        """
        with engine.sessions.temporary_folder() as folder:
            file = folder / "import.session"
            await receive_file(request, file)
            return await engine.sessions.import_session(_owner(request), file)

    @router.get("/{session}")
    async def session(session: str, request: Request) -> SessionSummary:
        """Describe a session."""
        return await engine.sessions.summary(_owner(request), session)

    @router.delete("/{session}")
    async def delete(session: str, request: Request) -> DeletedSession:
        """Delete a session from memory and disk."""
        await engine.sessions.delete(_owner(request), session)
        return DeletedSession(id=session, object="session.deleted", deleted=True)

    @router.post("/{session}/fork", status_code=201)
    async def fork(session: str, request: Request) -> SessionSummary:
        """Create an independent copy of a session."""
        return await engine.sessions.fork(_owner(request), session)

    @router.post(
        "/{session}/read",
        response_model=ReadProgress,
        responses={200: {"content": {EVENT_STREAM: {}}}},
        openapi_extra={"requestBody": {"required": True, "content": _TEXT_CONTENT}},
    )
    async def read(
        session: str, request: Request, name: Annotated[str | None, Query(max_length=MAX_NAME)] = None
    ) -> Response:
        """Read a text and learn from it: all of it or, if anything fails, nothing.

        `name` is that of the document in the session's notebook; by default a form gives that of its file. A text with
        the name of the one before it continues that one.

        With `Accept: text/event-stream` the response is a stream of progress events, of which the last one has the
        session.
        """
        await engine.sessions.summary(_owner(request), session)  # before a long text is uploaded in vain
        text = await receive_text(request)
        name = text.name if name is None else name
        events = _events(engine.read(_owner(request), session, text, name), log_entry(request))
        if EVENT_STREAM in request.headers.get("accept", ""):
            return await event_stream(request, events)
        return JSONResponse(await cancel_on_disconnect(request.receive, _final(events)))

    @router.post("/{session}/recall")
    async def recall(session: str, body: RecallRequest, request: Request) -> SourceList:
        """Find passages of what a session has read that share words with the query, the best first."""
        found = await engine.recall(_owner(request), session, body.query, body.count)
        return SourceList(object="list", data=found)

    @router.get("/{session}/export", response_class=Response, responses={200: {"content": _BINARY_CONTENT}})
    async def export_session(session: str, request: Request) -> Response:
        """Download a session as a file, for import or the command line; with a notebook as a tar with both."""
        with engine.sessions.temporary_folder() as folder:
            target = folder / "export.session"
            name = await engine.sessions.export_session(_owner(request), session, target)
            size, file = target.stat().st_size, target.open("rb")
        # The file has no name any more and is removed when it is closed.
        headers = {"content-length": str(size), "content-disposition": f'attachment; filename="{name}"'}
        return StreamResponse(_chunks(file), headers=headers, media_type=_BINARY)

    return router


def _owner(request: Request) -> str:
    owner: str = request.state.caller.owner
    return owner


async def _events(progress: AsyncIterator[ReadProgress], entry: LogEntry) -> AsyncGenerator[dict[str, Any], None]:
    """Progress events, merged so that `EVENT_SECONDS` pass between two of them; `entry` gets the tokens."""
    sent_at, sent_tokens, recent_sum = -math.inf, 0, 0.0
    async with aclosing(progress):  # type: ignore[type-var]
        async for event in progress:
            if event.recent_loss is not None:
                recent_sum += event.recent_loss * (event.tokens - entry.tokens_read)
            entry.tokens_read = event.tokens
            if event.session or time.monotonic() - sent_at >= EVENT_SECONDS:
                recent = event.tokens - sent_tokens
                yield asdict(replace(event, recent_loss=recent_sum / recent if recent else None))
                sent_at, sent_tokens, recent_sum = time.monotonic(), event.tokens, 0.0


async def _final(events: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any]:
    async with aclosing(events):
        async for event in events:
            final = event
    return {**final, "recent_loss": final["loss"]}


async def _chunks(file: IO[bytes]) -> AsyncGenerator[bytes, None]:
    with file:
        while chunk := await asyncio.to_thread(file.read, _CHUNK_BYTES):
            yield chunk
