"""Streamed responses, and clients that disconnect before they are complete."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ttt_e2e.server.errors import describe, is_expected
from ttt_e2e.server.middleware.logs import log_entry

EVENT_STREAM = "text/event-stream"
KEEPALIVE_SECONDS = 15.0  # proxies close connections on which nothing is sent for longer
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`, which is cancelled if the client disconnects; the request's body must have been received.

    Raises ClientDisconnect in that case, and whatever `work` raises.
    """
    working, disconnect = asyncio.ensure_future(work), asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((working, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        disconnect.cancel()
        await asyncio.gather(working, disconnect, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class StreamResponse(Response):
    """A response whose body is generated in parts.

    Unlike Starlette's `StreamingResponse`, it closes the generator at the end and when the client disconnects.
    """

    def __init__(
        self, parts: AsyncGenerator[bytes, None], media_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self.init_headers(headers)
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the parts as they are generated."""
        await cancel_on_disconnect(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self._parts) as parts:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for part in parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def begin_stream(receive: Receive, items: AsyncGenerator[_Item, None]) -> AsyncGenerator[_Item | None, None]:
    """`items` with keep-alives, once the first of them is available.

    So an error before the first item is raised here and can still become a response with a status.
    """
    stream = with_keepalive(items)
    first = await cancel_on_disconnect(receive, anext(stream))

    async def resumed() -> AsyncGenerator[_Item | None, None]:
        async with aclosing(stream):
            yield first
            async for item in stream:
                yield item

    return resumed()


async def with_keepalive(items: AsyncGenerator[_Item, None]) -> AsyncGenerator[_Item | None, None]:
    """`items`, and None whenever the next item takes longer than another `KEEPALIVE_SECONDS`."""
    async with aclosing(items):
        while True:
            task = asyncio.ensure_future(anext(items))
            try:
                while not (await asyncio.wait((task,), timeout=KEEPALIVE_SECONDS))[0]:
                    yield None
                item = task.result()
            except StopAsyncIteration:
                return
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            yield item


def event_stream(request: Request, events: AsyncGenerator[dict[str, Any] | None, None]) -> StreamResponse:
    """Server-sent events, one per dictionary, with [DONE] at the end; an error becomes the last event.

    None becomes a comment, which clients skip, to keep the connection alive.
    """

    async def parts() -> AsyncGenerator[bytes, None]:
        async with aclosing(events):
            try:
                async for event in events:
                    yield b": waiting\n\n" if event is None else _encode_event(event)
            except Exception as error:
                if not is_expected(error):
                    log_entry(request).set_error(error)
                yield _encode_event(describe(error)[1].model_dump())
            else:
                yield b"data: [DONE]\n\n"

    # Without the second header nginx, for example, would hold events back until its buffer is full.
    return StreamResponse(parts(), EVENT_STREAM, {"cache-control": "no-store", "x-accel-buffering": "no"})


def _encode_event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n".encode()


async def merge(sources: Sequence[AsyncIterator[_Item]]) -> AsyncGenerator[tuple[int, _Item], None]:
    """The items of all `sources` as they come, each with the index of its source.

    The first error ends the stream. All sources are closed at the end, and when this generator is.
    """
    queue: asyncio.Queue[tuple[int, _Item | Exception | None]] = asyncio.Queue(maxsize=1)

    async def forward(index: int, source: AsyncIterator[_Item]) -> None:
        try:
            async with aclosing(source):  # type: ignore[type-var]
                async for item in source:
                    await queue.put((index, item))
            await queue.put((index, None))
        except Exception as error:
            await queue.put((index, error))

    tasks = [asyncio.ensure_future(forward(index, source)) for index, source in enumerate(sources)]
    remaining = len(tasks)
    try:
        while remaining:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                remaining -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
