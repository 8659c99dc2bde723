"""Streamed responses, and clients that disconnect before they are complete."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ttt_e2e.server.errors import describe, is_expected
from ttt_e2e.server.middleware.logs import log_entry

EVENT_STREAM = "text/event-stream"
KEEPALIVE_SECONDS = 15.0  # proxies close connections on which nothing is sent for longer
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`; cancels it and raises ClientDisconnect if the client, whose body has come, disconnects."""
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


class StreamResponse(StreamingResponse):
    """A `StreamingResponse` that closes its generator at the end and when the client disconnects."""

    body_iterator: AsyncGenerator[bytes, None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the parts as they are generated."""
        async with aclosing(self.body_iterator):
            await cancel_on_disconnect(receive, self.stream_response(send))


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


async def event_stream(
    request: Request,
    events: AsyncGenerator[dict[str, Any], None],
    headers: Mapping[str, str] | None = None,
    describe_error: Callable[[Exception], dict[str, Any]] | None = None,
) -> StreamResponse:
    """Server-sent events, one per dictionary, with [DONE] at the end; comments keep the connection alive.

    An error before the first event is raised here and can still become a response with a status. A later one becomes
    the last event.

    describe_error: the event for an error, in an API whose events have a `type`. It becomes the event's name, and no
        [DONE] comes.
    """
    typed = describe_error is not None
    describe_error = describe_error or (lambda error: describe(error)[1].model_dump())
    stream = with_keepalive(events)
    first = await cancel_on_disconnect(request.receive, anext(stream))

    async def parts() -> AsyncGenerator[bytes, None]:
        async with aclosing(stream):
            try:
                yield _encode_event(first, typed)
                async for event in stream:
                    yield _encode_event(event, typed)
            except Exception as error:
                if not is_expected(error):
                    log_entry(request).set_error(error)
                yield _encode_event(describe_error(error), typed)
            else:
                if not typed:
                    yield b"data: [DONE]\n\n"

    # The second header is for nginx, which otherwise holds events back until its buffer is full.
    headers = {"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})}
    return StreamResponse(parts(), headers=headers, media_type=EVENT_STREAM)


def _encode_event(value: dict[str, Any] | None, typed: bool) -> bytes:
    if value is None:
        return b": waiting\n\n"  # a comment, which clients skip
    name = f"event: {value['type']}\n" if typed else ""
    return f"{name}data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n".encode()


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
