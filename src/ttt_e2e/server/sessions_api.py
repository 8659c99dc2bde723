"""Sessions: a memory that outlives a request. Make them, let them read, fork, export, import and delete them."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from typing import IO, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from ttt_e2e.data.text import text_pieces
from ttt_e2e.server import logs
from ttt_e2e.server.engine import Engine
from ttt_e2e.server.fields import Completion, SessionCompletionRequest
from ttt_e2e.server.openai_api import STREAM, Writer, complete_session
from ttt_e2e.server.records import Progress, SessionRecord
from ttt_e2e.server.streams import EVENTS, Stream, event_stream, first_and_rest, unless_gone
from ttt_e2e.server.uploads import save_body, text_body

_EVENT_SECONDS = 0.1  # between two events of a reading, at least
_CHUNK = 1 << 18
_BINARY = "application/octet-stream"


class SessionBody(BaseModel):
    """A session. tokens: read so far. text_bytes: their text's size. text_digest: one for every text.

    memory_bytes: of its memory. in_memory: false if it is on disk only, until it is asked for. error: why it cannot be
    used, if its file is damaged; null otherwise.
    """

    id: str
    object: Literal["session"]
    created: int
    tokens: int
    text_bytes: int | None
    text_digest: str
    memory_bytes: int
    learn: bool
    in_memory: bool
    error: str | None

    @classmethod
    def of(cls, record: SessionRecord) -> "SessionBody":
        """The engine's record, as it is sent."""
        return cls(object="session", **asdict(record) | {"created": int(record.created)})


class SessionList(BaseModel):
    """All sessions of a key, the oldest first."""

    object: Literal["list"]
    data: list[SessionBody]


class Deleted(BaseModel):
    """A session that is no more."""

    id: str
    object: Literal["session.deleted"]
    deleted: bool


class ReadBody(BaseModel):
    """A reading. tokens: of this text, so far, that have a loss. loss: their mean, in nats per token.

    recent_loss: of those since the last event. session: as it is with all of the text, which is then on the disk; null
    on the way there.
    """

    object: Literal["session.read"]
    tokens: int
    loss: float | None
    recent_loss: float | None
    session: SessionBody | None


def _body(kinds: dict[str, Any]) -> dict[str, Any]:
    """The description of a body that is not JSON."""
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind, schema in kinds.items()}}}


_FILE_FORM = {
    "type": "object",
    "properties": {"file": {"type": "string", "format": "binary"}},
    "required": ["file"],
    "additionalProperties": False,
}
_READ_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {EVENTS: {}}}}
_FILE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The session file", "content": {_BINARY: {"schema": {"type": "string", "format": "binary"}}}}
}


def routes(engine: Engine, writer: Writer) -> APIRouter:
    """The addresses of sessions."""
    router = APIRouter(prefix="/v1/sessions", tags=["sessions"])

    @router.post("", status_code=201)
    async def create(request: Request) -> SessionBody:
        """A new session that has read nothing."""
        return SessionBody.of(await engine.create(_owner(request)))

    @router.get("")
    async def sessions(request: Request) -> SessionList:
        """All sessions of this key, the oldest first."""
        records = await engine.sessions(_owner(request))
        return SessionList(object="list", data=[SessionBody.of(record) for record in records])

    @router.post("/import", status_code=201, openapi_extra=_body({_BINARY: {"type": "string", "format": "binary"}}))
    async def import_(request: Request) -> SessionBody:
        """A new session from a session file, such as export gives or `ttt-e2e read --save` writes."""
        with engine.temporary_folder() as folder:
            file = folder / "import.session"
            await save_body(request, file)
            return SessionBody.of(await engine.take_in(_owner(request), file))

    @router.get("/{session}")
    async def session(session: str, request: Request) -> SessionBody:
        """One session."""
        return SessionBody.of(await engine.session(_owner(request), session))

    @router.delete("/{session}")
    async def delete(session: str, request: Request) -> Deleted:
        """Delete a session, from memory and from disk."""
        await engine.delete(_owner(request), session)
        return Deleted(id=session, object="session.deleted", deleted=True)

    @router.post("/{session}/fork", status_code=201)
    async def fork(session: str, request: Request) -> SessionBody:
        """A new session that has read what this one has, and goes its own way."""
        return SessionBody.of(await engine.fork(_owner(request), session))

    @router.post(
        "/{session}/read",
        response_model=ReadBody,
        responses=_READ_STREAM,
        openapi_extra=_body({"text/plain": {"type": "string", "minLength": 1}, "multipart/form-data": _FILE_FORM}),
    )
    async def read(session: str, request: Request) -> Response:
        """Read a text and learn from it, all of it or, if anything goes wrong on the way, nothing.

        With `Accept: text/event-stream` the answer is a stream of events that say how far the reading has come; the
        last one has the session.
        """
        await engine.session(_owner(request), session)  # before a long text comes for nothing
        file = await text_body(request)
        progress = _noted(request, engine.read(_owner(request), session, text_pieces(file)))
        if EVENTS in request.headers.get("accept", ""):
            return event_stream(request, await first_and_rest(request.receive, _events(progress)))
        return JSONResponse(await unless_gone(request.receive, _last(progress)))

    @router.post("/{session}/completions", response_model=Completion, responses=STREAM)
    async def completions(session: str, body: SessionCompletionRequest, request: Request) -> Response:
        """Write on after what the session has read, and then the prompt; as /v1/completions."""
        return await complete_session(writer, request, session, body)

    @router.get("/{session}/export", response_class=Response, responses=_FILE)
    async def export(session: str, request: Request) -> Response:
        """The session as a file, for import or the command line."""
        with engine.temporary_folder() as folder:
            target = folder / "export.session"
            await engine.export(_owner(request), session, target)
            size, file = target.stat().st_size, target.open("rb")
        # The file has lost its name; what is open of it goes when it is closed.
        headers = {"content-length": str(size), "content-disposition": f'attachment; filename="{session}.session"'}
        return Stream(_chunks(file), _BINARY, headers)

    return router


def _owner(request: Request) -> str:
    owner: str = request.state.caller.owner
    return owner


async def _noted(request: Request, progress: AsyncIterator[Progress]) -> AsyncGenerator[Progress, None]:
    """The same, with the tokens that were read in the request's log line."""
    async with aclosing(progress):  # type: ignore[type-var]
        async for step in progress:
            logs.entry(request).tokens_read = step.tokens
            yield step


async def _last(progress: AsyncGenerator[Progress, None]) -> dict[str, Any]:
    last = None
    async with aclosing(progress):
        async for step in progress:
            last = step
    assert last is not None and last.saved is not None  # the engine's word
    return _read(last, last.total_loss)


async def _events(progress: AsyncGenerator[Progress, None]) -> AsyncGenerator[dict[str, Any], None]:
    """Events of a reading, at most so many a second; what comes between two of them is put together."""
    sent, tokens, since, total = 0.0, 0, 0, 0.0
    async with aclosing(progress):
        async for step in progress:
            if step.loss is not None:
                total += step.loss * (step.tokens - tokens)
                since += step.tokens - tokens
            tokens = step.tokens
            if step.saved or time.monotonic() - sent >= _EVENT_SECONDS:
                yield _read(step, total / since if since else None)
                sent, since, total = time.monotonic(), 0, 0.0


def _read(step: Progress, recent_loss: float | None) -> dict[str, Any]:
    session = None if step.saved is None else SessionBody.of(step.saved)
    body = ReadBody(
        object="session.read", tokens=step.tokens, loss=step.total_loss, recent_loss=recent_loss, session=session
    )
    return body.model_dump()


async def _chunks(file: IO[bytes]) -> AsyncGenerator[bytes, None]:
    with file:
        while chunk := await asyncio.to_thread(file.read, _CHUNK):
            yield chunk
