"""The gate before every request: key, origin, requests a minute, size of the body."""

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ttt_e2e.server import errors
from ttt_e2e.server.errors import Refused
from ttt_e2e.server.keys import Keys, is_loopback

OPEN = ("/", "/health", "/openapi.json")  # for everyone: nothing here is anybody's
_IMPORT = "/v1/sessions/import"
_DRAIN = 1.0  # seconds
_JSON_BYTES = 4 << 20  # JSON is held in memory; a longer text is read into a session


@dataclass(frozen=True)
class Limits:
    """What one client may ask for.

    body: bytes of a text that is sent, and of a session file unless `file` is more. rate: requests a minute of a key.
    generations: that a key has running at once; further ones wait for their turn. open: requests that a key has open at
    once; further ones are refused.
    """

    body: int = 64 << 20
    file: int = 0
    rate: int = 600
    generations: int = 32
    open: int = 128


@dataclass
class Bucket:
    """A token bucket: `rate` requests a minute, as many at once as a minute has. clock: seconds, going on evenly."""

    rate: int
    clock: Callable[[], float] = time.monotonic
    _left: float = field(init=False)
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self._left, self._at = float(self.rate), self.clock()

    def take(self) -> float:
        """Take one request out; returns 0, or in how many seconds there will be one."""
        now = self.clock()
        self._left = min(self.rate, self._left + (now - self._at) * self.rate / 60)
        self._at = now
        if self._left < 1:
            return (1 - self._left) * 60 / self.rate
        self._left -= 1
        return 0.0


class Gate:
    """ASGI middleware that lets a request through if it may come in, and counts its body while it comes in."""

    def __init__(self, app: ASGIApp, keys: Keys, limits: Limits) -> None:
        self.app = app
        self.keys = keys
        self.limits = limits
        self.buckets: dict[str, Bucket] = {}
        self.opened: defaultdict[str, int] = defaultdict(int)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request, or say why not."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            counted = self._let_in(scope, receive)
        except Refused as error:
            if "expect" not in Headers(scope=scope):  # else the body has not been sent, and asking for it would
                await _drained(receive)
            await errors.response(error)(scope, receive, send)
            return
        owner = scope["state"]["caller"].owner if "caller" in scope["state"] else ""
        self.opened[owner] += 1
        try:
            await self.app(scope, counted, send)
        finally:
            self.opened[owner] -= 1

    def _let_in(self, scope: Scope, receive: Receive) -> Receive:
        headers, path = Headers(scope=scope), scope["path"]
        self._check_site(headers)
        if path not in OPEN:
            caller = self.keys.caller(headers.get("authorization", ""))
            if caller is None:
                raise Refused(
                    401,
                    "The API key is missing or wrong; send Authorization: Bearer KEY.",
                    "invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
            scope["state"]["caller"] = caller
            scope["state"]["entry"].key = caller.name
            if path.startswith("/v1/"):
                wait = self.buckets.setdefault(caller.owner, Bucket(self.limits.rate)).take()
                if wait:
                    raise Refused(
                        429,
                        f"More than {self.limits.rate} requests a minute; go on in {math.ceil(wait)} s.",
                        "rate_limit_exceeded",
                        headers={"retry-after": str(math.ceil(wait))},
                    )
                if self.opened[caller.owner] >= self.limits.open:
                    raise Refused(
                        429,
                        f"This key has {self.limits.open} requests open; wait until one of them has been answered.",
                        "too_many_requests",
                        headers={"retry-after": "1"},
                    )
        most, instead = self._most(path)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise _too_large(most, instead)
        return _counted(receive, most, instead)

    def _most(self, path: str) -> tuple[int, str]:
        """How many bytes a body may have at this address, and what to do where it has more."""
        if path == _IMPORT:
            return max(self.limits.file, self.limits.body), "whoever runs the service can raise --max-body"
        if path.endswith("/read"):
            return self.limits.body, "send the text in parts, cut before lines that are not indented"
        return min(_JSON_BYTES, self.limits.body), "send a long text to /v1/sessions/ID/read"

    def _check_site(self, headers: Headers) -> None:
        """Keep other sites out, whose pages a browser on this machine may show: they have no business here."""
        host = headers.get("host", "")
        if not self.keys and not is_loopback(_host(f"//{host}")):
            raise Refused(403, "Without keys this service answers under the names of this machine only.", "wrong_host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refused(403, "This service does not answer the pages of other sites.", "wrong_origin")


async def _drained(receive: Receive) -> None:
    """Take in a body for nothing, for a moment: a connection that is closed with a part of it unread is reset, and
    the client may never see the answer.
    """

    async def drain() -> None:
        while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
            pass

    with suppress(TimeoutError):
        await asyncio.wait_for(drain(), _DRAIN)


def _host(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:  # half an IPv6 address
        return ""


def _counted(receive: Receive, most: int, instead: str) -> Receive:
    got = 0

    async def count() -> Message:
        nonlocal got
        message = await receive()
        got += len(message.get("body", b""))
        if got > most:
            raise _too_large(most, instead)
        return message

    return count


def _too_large(most: int, instead: str) -> Refused:
    return Refused(
        413, f"The body has more than {most:,} bytes; {instead}.", "too_large", headers={"connection": "close"}
    )
