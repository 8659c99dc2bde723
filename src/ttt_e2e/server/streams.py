"""Answers that come in parts, and clients that leave before they are done."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from ttt_e2e.server.errors import described, is_expected

EVENTS = "text/event-stream"
WAITING = 15.0  # seconds without a word, after which proxies begin to think that nobody is there
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class ClientGone(Exception):  # noqa: N818 - nobody's error
    """The client has closed the connection; nobody waits for an answer."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """What comes of `work`, which is cancelled if the client leaves before. The request's body must have been read.

    Raises ClientGone then, and whatever `work` raises.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Stream(Response):
    """An answer whose body comes in parts; the generator that makes them is closed at the end and if the client goes.

    `StreamingResponse` leaves a generator that is not finished to the garbage collector.
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
        """Send the parts as they come."""
        await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self._parts) as parts:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for part in parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def first_and_rest(receive: Receive, items: AsyncGenerator[_Item, None]) -> AsyncGenerator[_Item | None, None]:
    """The same items, the first of which is there: an error before it can still be an answer with a status.

    Whatever takes longer than `WAITING` seconds, be it the first, has a None before it.
    """
    waiting = patient(items)
    first = await unless_gone(receive, anext(waiting))

    async def rest() -> AsyncGenerator[_Item | None, None]:
        async with aclosing(waiting):
            yield first
            async for item in waiting:
                yield item

    return rest()


async def patient(items: AsyncGenerator[_Item, None]) -> AsyncGenerator[_Item | None, None]:
    """The same items, and a None whenever none has come for `WAITING` seconds."""
    async with aclosing(items):
        while True:
            coming = asyncio.ensure_future(anext(items))
            try:
                while not (await asyncio.wait((coming,), timeout=WAITING))[0]:
                    yield None
                item = coming.result()
            except StopAsyncIteration:
                return
            finally:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
            yield item


def event_stream(request: Request, events: AsyncGenerator[dict[str, Any] | None, None]) -> Stream:
    """Server-sent events, one a dictionary, with [DONE] at the end; an error on the way is the last event.

    A None is a comment, which clients skip: it tells whoever stands between that the connection is in use.
    """

    async def parts() -> AsyncGenerator[bytes, None]:
        async with aclosing(events):
            try:
                async for event in events:
                    yield b": waiting\n\n" if event is None else _event(event)
            except Exception as error:
                if not is_expected(error):
                    request.state.entry.failed(error)
                yield _event(described(error)[1].model_dump())
            else:
                yield b"data: [DONE]\n\n"

    # nginx, for one, would hold events back until it has a bufferful.
    return Stream(parts(), EVENTS, {"cache-control": "no-store", "x-accel-buffering": "no"})


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n".encode()


async def together(sources: Sequence[AsyncIterator[_Item]]) -> AsyncGenerator[tuple[int, _Item], None]:
    """The items of all `sources` as they come, each with the number of its source.

    An error of one ends all. All are closed at the end, and when this generator is.
    """
    queue: asyncio.Queue[tuple[int, _Item | Exception | None]] = asyncio.Queue(maxsize=1)

    async def run(number: int, source: AsyncIterator[_Item]) -> None:
        try:
            async with aclosing(source):  # type: ignore[type-var]
                async for item in source:
                    await queue.put((number, item))
            await queue.put((number, None))
        except Exception as error:
            await queue.put((number, error))

    running = [asyncio.ensure_future(run(number, source)) for number, source in enumerate(sources)]
    left = len(running)
    try:
        while left:
            number, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield number, item
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
