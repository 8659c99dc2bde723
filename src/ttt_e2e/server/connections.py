"""Connections, below HTTP: fewer than the process may open files, and none is kept for a client that sends nothing."""

import asyncio
import logging
import resource
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ttt_e2e.errors import UserError

MAX_CONNECTIONS = 1000
ACCEPTED_AT_ONCE = 16  # before it is seen whether there are too many
REQUEST_SECONDS = 30.0  # for the head of a request
RESPONSE_SECONDS = 60.0  # for a client to take the next part of a response
_FILES_PER_CONNECTION = 3  # the socket, and those that a form is written to
_OTHER_FILES = 50  # of the process, and sockets that were accepted or closed a moment ago
_READ_BYTES = 1 << 14  # parsed without a pause; in chunks of a byte each, more would keep everybody waiting
_log = logging.getLogger(__name__)


def connection_limit() -> int:
    """How many connections this process can hold, once it is allowed as many open files as possible.

    Raises UserError if they are too few for a service.
    """
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS * _FILES_PER_CONNECTION + _OTHER_FILES
    if 0 <= allowed < wanted:
        allowed = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
    limit = MAX_CONNECTIONS if allowed < 0 else min(MAX_CONNECTIONS, (allowed - _OTHER_FILES) // _FILES_PER_CONNECTION)
    if limit < 8:
        raise UserError(f"A process may open {allowed} files here, too few to serve; raise that with `ulimit -n 1024`.")
    return limit


def uvicorn_config(app: Any, **options: Any) -> uvicorn.Config:
    """How uvicorn serves the ASGI application `app`, by HTTP alone; options: of uvicorn, besides.

    Event loop and parser are those that every machine has: uvicorn would choose others where they are installed, such
    as uvloop, and the service would behave in another way there. Idle connections are kept for longer than by clients,
    which mostly close them after 5 seconds: a request would be lost that meets the end of its connection.
    """
    options = {"http": "h11", "timeout_keep_alive": REQUEST_SECONDS, **options}
    return uvicorn.Config(app, ws="none", loop="asyncio", server_header=False, **options)


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 for at most `limit` connections: the oldest without a request gives way to a new one.

    Also ends connections whose client sends no request, or does not take its response. stopping: the server stops, so
    a connection that is made ends.
    """

    limit = MAX_CONNECTIONS
    stopping = False
    waiting_since = 0.0
    aborted = False
    _no_request: asyncio.TimerHandle | None = None
    _not_taken: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        """Count the connection in."""
        super().connection_made(transport)
        transport.max_size = _READ_BYTES
        self._wait_for_request()
        if self.stopping:  # the server has told all others
            self.shutdown()
            return
        connections: Any = self.connections
        kept = [one for one in connections if one is not self and not one.aborted]
        if len(kept) >= self.limit:
            _log.warning("There are %d connections, as many as possible; those without a request end.", self.limit)
            waiting = [one for one in kept if one.waiting] or [self]
            # Those that never sent a request come first.
            min(waiting, key=lambda one: (one.cycle is not None, one.waiting_since)).abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        for timer in (self._no_request, self._not_taken):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._wait_for_request()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Wait until the client has taken what was sent."""
        super().pause_writing()
        self._not_taken = self.loop.call_later(RESPONSE_SECONDS, self.abort)

    def resume_writing(self) -> None:
        """Go on sending."""
        super().resume_writing()
        if self._not_taken is not None:
            self._not_taken.cancel()

    def abort(self) -> None:
        """End the connection, whatever was not sent yet."""
        self.aborted = True
        self.transport.abort()

    def _wait_for_request(self) -> None:
        self.waiting_since = self.loop.time()
        if self._no_request is not None:
            self._no_request.cancel()
        self._no_request = self.loop.call_later(REQUEST_SECONDS, self._abort_if_waiting)

    def _abort_if_waiting(self) -> None:
        if self.waiting:
            self.abort()


def bounded_protocol(limit: int) -> type[BoundedProtocol]:
    """A `BoundedProtocol` of its own for a server with at most `limit` connections."""

    class LimitedProtocol(BoundedProtocol):
        pass

    LimitedProtocol.limit = limit
    return LimitedProtocol
