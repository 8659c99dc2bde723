"""uvicorn with an engine: how the service begins to listen, and how it ends without a request that is cut off."""

import asyncio
import logging
import socket

import uvicorn

from ttt_e2e.server.connections import ACCEPTED_AT_ONCE, BoundedProtocol, uvicorn_config
from ttt_e2e.server.engine.engine import Engine

CLIENT_SECONDS = 5.0  # for clients to send the rest of a request, or to take the rest of a response, at the end
_CUT_OFF_SECONDS = 1.0  # for the answer to a request that is cut off
_TURNS = 100  # of the event loop, more than a request needs that waits for nothing else
_log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Serves `app`, the one over `engine`, until it is told to end or the engine has lost its store.

    protocol: a class of its own for every server, which learns here that the server stops. queue: how many connections
    the system holds until they are accepted.
    """

    def __init__(self, app: object, engine: Engine, protocol: type[BoundedProtocol], queue: int) -> None:
        super().__init__(
            uvicorn_config(app, http=protocol, backlog=ACCEPTED_AT_ONCE, log_config=None, access_log=False)
        )
        self._engine, self._protocol, self._queue = engine, protocol, queue

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop."""
        return await super().on_tick(counter) or self._engine.sessions.store.lost is not None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the engine, and listen."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(self._queue)  # uvicorn has made it as short as what is accepted at once

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing new, let the engine finish or refuse what runs, and cut off what waits for its client.

        In this order no request is cut off while it changes a session: it would be told that nothing was done. And none
        outlives this method, after which the event loop has no threads for it.
        """
        self._protocol.stopping = True
        closing = asyncio.create_task(super().shutdown(sockets))
        stopping = asyncio.create_task(self._engine.stop())
        await asyncio.wait((closing, stopping), return_when=asyncio.FIRST_COMPLETED)
        if self.force_exit:  # the second Ctrl-C
            await self._engine.stop(0)
        await stopping
        await asyncio.wait((closing,), timeout=CLIENT_SECONDS)
        for _ in range(_TURNS):  # on a machine that gave the event loop none in this time
            await asyncio.sleep(0)
        if tasks := set(self.server_state.tasks):
            _log.warning("Requests that waited for their clients were cut off: %d.", len(tasks))
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=_CUT_OFF_SECONDS)
        for connection in list(self.server_state.connections):
            assert isinstance(connection, BoundedProtocol)
            connection.abort()  # its client does not take the response
        await closing
