"""Access control before every request: API key, origin, requests per minute, and size of the body."""

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ttt_e2e.server.errors import ApiError, error_response
from ttt_e2e.server.middleware.keys import Keys, is_loopback

_PUBLIC_PATHS = ("/", "/health", "/openapi.json")  # these need no key
_IMPORT_PATH = "/v1/sessions/import"
DRAIN_SECONDS = 1.0  # how long the body of a refused request is discarded
_MAX_JSON_BYTES = 4 << 20  # JSON is held in memory


@dataclass(frozen=True)
class Limits:
    """What one client may request.

    body_bytes: size of a text. file_bytes: size of a session file, if more than `body_bytes`. requests_per_minute: per
    key. generations: how many a key may have running at once; further ones wait. open_requests: how many a key may have
    open at once; further ones are refused.
    """

    body_bytes: int = 64 << 20
    file_bytes: int = 0
    requests_per_minute: int = 600
    generations: int = 32
    open_requests: int = 128


class TokenBucket:
    """Rate limiter with a burst of one minute's requests. clock: monotonic time in seconds."""

    def __init__(self, requests_per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = requests_per_minute, clock
        self._available, self._updated = float(requests_per_minute), clock()

    def take(self) -> float:
        """Take one request; returns 0, or the seconds until one will be available."""
        now, rate = self._clock(), self._rate
        self._available = min(rate, self._available + (now - self._updated) * rate / 60)
        self._updated = now
        if self._available < 1:
            return (1 - self._available) * 60 / rate
        self._available -= 1
        return 0.0


class AccessMiddleware:
    """ASGI middleware that admits or refuses a request, and limits its body while it is received."""

    def __init__(self, app: ASGIApp, keys: Keys, limits: Limits) -> None:
        self.app, self.keys, self.limits = app, keys, limits
        self.buckets: dict[str, TokenBucket] = {}  # by owner
        self.open_requests: defaultdict[str, int] = defaultdict(int)  # by owner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer why it is refused."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            limited_receive = self._admit(scope, receive)
        except ApiError as error:
            if "expect" not in Headers(scope=scope):  # else the body has not been sent, and draining would request it
                await _drain(receive)
            await error_response(error)(scope, receive, send)
            return
        owner = scope["state"]["caller"].owner if "caller" in scope["state"] else ""
        self.open_requests[owner] += 1
        try:
            await self.app(scope, limited_receive, send)
        finally:
            self.open_requests[owner] -= 1

    def _admit(self, scope: Scope, receive: Receive) -> Receive:
        """Check the request and return a `receive` that limits its body. Raises ApiError if it is refused."""
        headers, path = Headers(scope=scope), scope["path"]
        self._check_site(headers)
        if path not in _PUBLIC_PATHS:
            caller = self.keys.caller(headers.get("authorization", ""))
            if caller is None:
                error = "The API key is missing or wrong; send Authorization: Bearer KEY."
                raise ApiError(401, error, "invalid_api_key", headers={"www-authenticate": "Bearer"})
            scope["state"]["caller"] = caller
            scope["state"]["log_entry"].key = caller.name
            if path.startswith("/v1/"):
                self._check_rate(caller.owner)
        max_bytes, remedy = self._body_limit(path)
        error = f"The body has more than {max_bytes:,} bytes; {remedy}."
        too_large = ApiError(413, error, "too_large", headers={"connection": "close"})
        length, received = headers.get("content-length", "0"), 0
        if length.isdecimal() and int(length) > max_bytes:
            raise too_large

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > max_bytes:
                raise too_large
            return message

        return limited_receive

    def _check_site(self, headers: Headers) -> None:
        """Refuse pages of other sites that a browser on this machine may show."""
        host = headers.get("host", "")
        try:
            hostname = urlsplit(f"//{host}").hostname or ""
        except ValueError:  # an incomplete IPv6 address
            hostname = ""
        if not self.keys and not is_loopback(hostname):
            raise ApiError(403, "Without keys this service answers to loopback host names only.", "wrong_host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "This service does not answer pages of other sites.", "wrong_origin")

    def _check_rate(self, owner: str) -> None:
        limits = self.limits
        wait = math.ceil(self.buckets.setdefault(owner, TokenBucket(limits.requests_per_minute)).take())
        if wait:
            message = f"More than {limits.requests_per_minute} requests per minute; try again in {wait} s."
            raise ApiError(429, message, "rate_limit_exceeded", headers={"retry-after": str(wait)})
        if self.open_requests[owner] >= limits.open_requests:
            message = f"This key has {limits.open_requests} requests open; wait until one of them is answered."
            raise ApiError(429, message, "too_many_requests", headers={"retry-after": "1"})

    def _body_limit(self, path: str) -> tuple[int, str]:
        """How many bytes a body sent to `path` may have, and what to do if it has more."""
        limits = self.limits
        if path == _IMPORT_PATH:
            return max(limits.file_bytes, limits.body_bytes), "the operator of the service can raise --max-body"
        if path.endswith("/read"):
            return limits.body_bytes, "send the text in parts, cut before lines that are not indented"
        return min(_MAX_JSON_BYTES, limits.body_bytes), "send a long text to /v1/sessions/ID/read"


async def _drain(receive: Receive) -> None:
    """Discard the rest of a body: a connection closed with unread data is reset, and the response may be lost."""
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass
