"""The request log: one line of JSON per request, which never contains a text or a key."""

import asyncio
import json
import logging
import math
import secrets
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ttt_e2e.server.engine.records import StoppingError
from ttt_e2e.server.errors import error_response
from ttt_e2e.server.middleware.metrics import ServiceMetrics

SECONDS_BETWEEN_EQUAL_LINES = 60.0
_log = logging.getLogger("ttt_e2e.server.requests")


@dataclass
class LogEntry:
    """What the log will say about a request, filled in while it is served.

    key: the name of the key. silent: no line is written, as there would be too many of this kind.
    """

    key: str | None = None
    tokens_read: int = 0
    tokens_written: int = 0
    error: str | None = None
    silent: bool = False

    def set_error(self, error: BaseException) -> None:
        """Record an error that the operator of the service should look into."""
        self.error = _describe_error(error)


def log_entry(request: Request) -> LogEntry:
    """The log entry of a request, to be filled in."""
    entry: LogEntry = request.state.log_entry
    return entry


class RequestLogMiddleware:
    """The outermost ASGI middleware: request ids, log, metrics, and the response to unexpected errors."""

    def __init__(self, app: ASGIApp, metrics: ServiceMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request and log it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = f"req-{secrets.token_hex(12)}"
        entry = LogEntry()
        scope.setdefault("state", {})["log_entry"] = entry
        status: int | None = None

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.setdefault("x-request-id", request_id)  # that of a replica, which has logged the request
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        disconnected = False
        try:
            await self.app(scope, receive, observed_send)
        except ClientDisconnect:
            disconnected = True
        except asyncio.CancelledError:
            # The server is stopping and waits no longer; without a response it would send one of its own.
            if status is not None:
                raise
            await error_response(StoppingError(), scope["path"])(scope, receive, observed_send)
        except Exception as error:
            # Not re-raised: the server would log the message, which may quote a text.
            entry.set_error(error)
            if status is None:
                await error_response(error, scope["path"])(scope, receive, observed_send)
        finally:
            seconds = time.perf_counter() - started
            final = 499 if disconnected or status is None else status  # as in nginx; only log and metrics show it
            route = getattr(scope.get("route"), "path", "-")  # never the path: it contains ids, or anything at all
            method = scope["method"] if route != "-" and final != 405 else "-"  # clients can invent methods, too
            self.metrics.observe_request(method, route, final, seconds)
            line = {"request": request_id, "key": entry.key, "method": method, "route": route, "status": final}
            line |= {"ms": round(1000 * seconds, 1), "tokens_read": entry.tokens_read}
            line |= {"tokens_written": entry.tokens_written} | ({"error": entry.error} if entry.error else {})
            if not entry.silent:
                _log.log(logging.INFO if final < 500 else logging.ERROR, _json_line(**line))


def configure_logging() -> None:
    """Send the request log, and warnings of the service and its libraries, to standard error.

    The same warning appears once a minute at most: clients can cause some as often as they like.
    """
    plain = logging.StreamHandler(sys.stderr)
    plain.setFormatter(logging.Formatter("%(message)s"))
    _log.addHandler(plain)
    _log.setLevel(logging.INFO)
    _log.propagate = False
    others = logging.StreamHandler(sys.stderr)
    others.setFormatter(_JsonFormatter())
    # If the service cannot start, the command says why in a sentence.
    others.addFilter(lambda record: not record.getMessage().startswith("Traceback "))
    others.addFilter(_Seldom())
    for name in ("ttt_e2e", "uvicorn", "asyncio", "python_multipart"):
        logger = logging.getLogger(name)
        logger.handlers = [others]
        logger.setLevel(logging.WARNING)
        logger.propagate = False


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _json_line(level=record.levelname.lower(), **_content(record))


class _Seldom(logging.Filter):
    """Passes each message once in `SECONDS_BETWEEN_EQUAL_LINES`."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: dict[tuple[str, ...], float] = {}  # when each message was last passed

    def filter(self, record: logging.LogRecord) -> bool:
        now, content = time.monotonic(), tuple(_content(record).values())
        if now - self._passed.get(content, -math.inf) < SECONDS_BETWEEN_EQUAL_LINES:
            return False
        if len(self._passed) >= 1000:
            self._passed.clear()
        self._passed[content] = now
        return True


def _content(record: logging.LogRecord) -> dict[str, str]:
    error = record.exc_info[1] if record.exc_info else None
    return {"message": record.getMessage().partition("\n")[0]} | ({"error": _describe_error(error)} if error else {})


def _describe_error(error: BaseException) -> str:
    """The type of an error and where it was raised, but not its message, which may quote a text."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    at = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames))
    cause = f" from {type(error.__cause__).__name__}" if error.__cause__ else ""
    return f"{type(error).__name__}{cause} at {at}"


def _json_line(**values: Any) -> str:
    return json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **values}, ensure_ascii=False)
