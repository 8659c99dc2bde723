"""One line of JSON a request: what was asked for, how it went and what it took, and never anybody's text or key."""

import asyncio
import json
import logging
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

from ttt_e2e.server import errors
from ttt_e2e.server.metrics import Metrics
from ttt_e2e.server.records import Stopping
from ttt_e2e.server.streams import ClientGone

GONE = 499  # nginx' status for a client that left before its answer; only logs and metrics know it
_log = logging.getLogger("ttt_e2e.server.requests")


@dataclass
class Entry:
    """What a request's line will say, filled in while the request is served. key: the name of the key."""

    key: str | None = None
    tokens_read: int = 0
    tokens_written: int = 0
    error: str | None = None

    def failed(self, error: BaseException) -> None:
        """Note an error that whoever runs the service should look into."""
        self.error = _where_from(error)


def entry(request: Request) -> Entry:
    """The request's line, to be filled in."""
    found: Entry = request.state.entry
    return found


class RequestLog:
    """ASGI middleware around everything else: request ids, the log, the metrics, and what nobody expected."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request and write its line."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = f"req-{secrets.token_hex(12)}"
        line = Entry()
        scope.setdefault("state", {})["entry"] = line
        status: int | None = None

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update({"x-request-id": request_id, "x-content-type-options": "nosniff"})
            await send(message)

        gone = False
        try:
            await self.app(scope, receive, noted)
        except (ClientGone, ClientDisconnect):
            gone = True
        except asyncio.CancelledError:
            # The server ends and waits no longer; without an answer it would send one of its own.
            if status is not None:
                raise
            await errors.response(Stopping())(scope, receive, noted)
        except Exception as error:
            # Not raised on: the server would write it to its log with all that it says.
            line.failed(error)
            if status is None:
                await errors.response(error)(scope, receive, noted)
        finally:
            seconds = time.perf_counter() - started
            final = GONE if gone or status is None else status
            route = getattr(scope.get("route"), "path", "-")  # never the path: it holds ids, or anything at all
            method = scope["method"] if route != "-" and final != 405 else "-"  # a client makes up methods, too
            self.metrics.request(method, route, final, seconds)
            _log.log(
                logging.INFO if final < 500 else logging.ERROR,
                _json(
                    time=_now(),
                    request=request_id,
                    key=line.key,
                    method=method,
                    route=route,
                    status=final,
                    ms=round(1000 * seconds, 1),
                    tokens_read=line.tokens_read,
                    tokens_written=line.tokens_written,
                    **({"error": line.error} if line.error else {}),
                ),
            )


def configure() -> None:
    """Send the requests' lines, and warnings of everything below them, to standard error."""
    plain = logging.StreamHandler(sys.stderr)
    plain.setFormatter(logging.Formatter("%(message)s"))
    _log.addHandler(plain)
    _log.setLevel(logging.INFO)
    _log.propagate = False
    others = logging.StreamHandler(sys.stderr)
    others.setFormatter(_OneLine())
    # Why the service cannot start is said by whoever started it, in a sentence.
    others.addFilter(lambda record: not record.getMessage().startswith("Traceback "))
    for name in ("ttt_e2e", "uvicorn", "asyncio", "python_multipart"):
        logger = logging.getLogger(name)
        logger.handlers = [others]
        logger.setLevel(logging.WARNING)
        logger.propagate = False


class _OneLine(logging.Formatter):
    """A message as a line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        name = {"error": _where_from(error)} if error else {}
        return _json(
            time=_now(), level=record.levelname.lower(), message=record.getMessage().partition("\n")[0], **name
        )


def _where_from(error: BaseException) -> str:
    """What kind of error it is and where it came from, but not what it says: it may quote a text."""
    last = traceback.extract_tb(error.__traceback__)[-3:]
    at = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(last))
    cause = f" from {type(error.__cause__).__name__}" if error.__cause__ else ""
    return f"{type(error).__name__}{cause} at {at}"


def _json(**values: Any) -> str:
    return json.dumps(values, ensure_ascii=False)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
