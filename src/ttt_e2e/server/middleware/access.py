"""Access control before every request: API key, origin, requests per minute, and size of the body."""

import asyncio
import ipaddress
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ttt_e2e.server.errors import ApiError, error_response
from ttt_e2e.server.keys import Caller, is_loopback
from ttt_e2e.server.settings import Settings

_PUBLIC_PATHS = ("/", "/health", "/openapi.json")  # these need no key
DRAIN_SECONDS = 1.0  # how long the body of a refused request is discarded
_MAX_JSON_BYTES = 1 << 20  # held in memory, where text may take 200 times its size while it becomes tokens
_MAX_ADDRESSES = 10_000  # of refused clients that are remembered
_log = logging.getLogger(__name__)


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

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.buckets: dict[str, TokenBucket] = {}  # by owner
        self.refusals: dict[str, TokenBucket] = {}  # by address, the one made last at the end
        self.open_requests: defaultdict[str, int] = defaultdict(int)  # by owner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer why it is refused."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            limited_receive = self._admit(scope, receive)
        except ApiError as refusal:
            error = refusal
            if "caller" not in scope["state"] and (wait := self._count_refusal(scope)):
                message = f"Too many requests without a valid key from this address; try again in {wait} s."
                headers = {"retry-after": str(wait), "connection": "close"}
                error = ApiError(429, message, "rate_limit_exceeded", headers=headers)
            elif "expect" not in Headers(scope=scope):  # else the body has not been sent; draining would request it
                await _drain(receive)
            await error_response(error, scope["path"])(scope, receive, send)
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
            caller = self._authenticate(scope, headers)
            if path.startswith("/v1/"):
                self._check_rate(caller.owner)
        return self._limit_body(headers, path, receive)

    def _authenticate(self, scope: Scope, headers: Headers) -> Caller:
        """Find out who sends the request, and note it. Raises ApiError without a valid key."""
        authorization = headers.get("authorization") or f"Bearer {headers.get('x-api-key', '')}"
        caller = self.settings.keys.caller(authorization)
        if caller is None:
            error = "The API key is missing or wrong; send Authorization: Bearer KEY, or X-Api-Key: KEY."
            raise ApiError(401, error, "invalid_api_key", headers={"www-authenticate": "Bearer"})
        scope["state"]["caller"] = caller
        scope["state"]["log_entry"].key = caller.name
        return caller

    def _check_rate(self, owner: str) -> None:
        """Count a request. Raises ApiError if there are too many, in this minute or at the same time."""
        rate, max_open = self.settings.requests_per_minute, self.settings.open_requests
        wait = math.ceil(self.buckets.setdefault(owner, TokenBucket(rate)).take())
        if wait:
            error = f"More than {rate} requests per minute; try again in {wait} s."
            raise ApiError(429, error, "rate_limit_exceeded", headers={"retry-after": str(wait)})
        if self.open_requests[owner] >= max_open:
            error = f"This key has {max_open} requests open; wait until one of them is answered."
            raise ApiError(429, error, "too_many_requests", headers={"retry-after": "1"})

    def _limit_body(self, headers: Headers, path: str, receive: Receive) -> Receive:
        """A `receive` that raises ApiError when the body gets too large; it is raised at once if the headers say so."""
        max_bytes, remedy = min(_MAX_JSON_BYTES, self.settings.body_bytes), "send a long text to /v1/sessions/ID/read"
        if path == "/v1/sessions/import":
            max_bytes = max(self.settings.file_bytes, self.settings.body_bytes)
            remedy = "the operator of the service can raise --max-body"
        elif path.endswith("/read"):
            max_bytes, remedy = (
                self.settings.body_bytes,
                "send the text in parts, cut before lines that are not indented",
            )
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

    def _count_refusal(self, scope: Scope) -> int:
        """Count a refused request without a valid key; returns 0, or in how many seconds it would be answered fully."""
        address = _network((scope.get("client") or ("",))[0])
        if address not in self.refusals and len(self.refusals) >= _MAX_ADDRESSES:
            del self.refusals[next(iter(self.refusals))]
        bucket = self.refusals.setdefault(address, TokenBucket(self.settings.refusals_per_minute))
        wait = math.ceil(bucket.take())
        if wait:
            scope["state"]["log_entry"].silent = True
            _log.warning("An address sends many requests without a valid key; they get status 429 and are not logged.")
        return wait

    def _check_site(self, headers: Headers) -> None:
        """Refuse pages of other sites that a browser on this machine may show."""
        host = headers.get("host", "")
        try:
            hostname = urlsplit(f"//{host}").hostname or ""
        except ValueError:  # an incomplete IPv6 address
            hostname = ""
        if not self.settings.keys and not is_loopback(hostname):
            raise ApiError(403, "Without keys this service answers to loopback host names only.", "wrong_host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "This service does not answer pages of other sites.", "wrong_origin")


def _network(address: str) -> str:
    """The part of an address that a client cannot choose at will: of an IPv6 address half."""
    try:
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    except ValueError:
        return address


async def _drain(receive: Receive) -> None:
    """Discard the rest of a body: a connection closed with unread data is reset, and the response may be lost."""
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass
