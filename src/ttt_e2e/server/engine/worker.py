"""The thread that runs the model: it owns the session pool, and steps it while there is work.

In the event loop, a `PooledSession` stands for a session in the pool: commands go to the thread, events come back.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from ttt_e2e.inference.pool_requests import Done, Event, Losses, Token
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_pool import SessionPool
from ttt_e2e.server.engine.records import StoppingError

_MAX_FAILED_STEPS = 3  # in a row: one may be too large for memory, but then the device is lost
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Worker:
    """A thread with a `SessionPool(template, max_batch)`. Call its methods from the event loop that called `start`.

    steps, tokens_read, tokens_written: totals since the start. If a step fails as a whole, all sessions in the pool do.
    """

    def __init__(self, template: Session, max_batch: int) -> None:
        self.steps = self.tokens_read = self.tokens_written = 0
        self._failed_steps = 0  # since the last one that succeeded
        self._pool = SessionPool(template, max_batch=max_batch)
        self._commands: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._sessions: dict[int, PooledSession] = {}  # by their ids in the pool; only the thread uses it
        self._thread = threading.Thread(target=self._run, name="ttt-e2e-worker", daemon=True)
        self._open = False

    @property
    def healthy(self) -> bool:
        """Whether the last few steps did not all fail."""
        return self._failed_steps < _MAX_FAILED_STEPS

    def start(self) -> None:
        """Start the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._open = True

    async def stop(self) -> None:
        """End the thread after the current step. Sessions still in the pool fail with StoppingError."""
        if self._open:
            self._open = False
            self._commands.put(lambda: self._fail_all(StoppingError()))
            self._commands.put(None)
            await asyncio.to_thread(self._thread.join)

    def add(self, session: Session) -> "PooledSession":
        """Add a copy of `session` to the pool. Raises StoppingError after `stop`."""
        pooled = PooledSession(self)

        def join() -> None:
            try:
                pooled.id = self._pool.add(session)
                self._sessions[pooled.id] = pooled
            except Exception as error:
                self._fail(pooled, error)

        self._send(join)
        return pooled

    def _send(self, command: Callable[[], object]) -> None:
        if not self._open:
            raise StoppingError
        self._commands.put(command)

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            while not self._pool.busy or not self._commands.empty():
                command = self._commands.get()  # an idle thread sleeps here
                if command is None:
                    return
                command()
            try:
                events = self._pool.step()
            except Exception as error:  # out of memory, for example; which session caused it is unknown
                self._failed_steps += 1
                _log.exception("A step of the model failed, and with it every request that was running.")
                self._fail_all(error)
                continue
            self._failed_steps = 0
            self.steps += 1
            self.tokens_read += sum(len(event.losses) for event in events if isinstance(event, Losses))
            self.tokens_written += sum(isinstance(event, Token) for event in events)
            self._loop.call_soon_threadsafe(_deliver, [(self._sessions[event.id], event) for event in events])

    def _apply(self, pooled: "PooledSession", command: Callable[[SessionPool, int], _T]) -> _T | None:
        """Run a command on a session that is still in the pool; the session fails if the command does."""
        if pooled.id is not None:
            try:
                return command(self._pool, pooled.id)
            except Exception as error:
                self._fail(pooled, error)
        return None

    def _drop(self, pooled: "PooledSession") -> None:
        if pooled.id is not None:
            del self._sessions[pooled.id]
            self._pool.drop(pooled.id)
            pooled.id = None

    def _fail(self, pooled: "PooledSession", error: Exception) -> None:
        self._drop(pooled)
        self._loop.call_soon_threadsafe(pooled.fail, error)

    def _fail_all(self, error: Exception) -> None:
        for pooled in list(self._sessions.values()):
            self._fail(pooled, error)


class PooledSession:
    """A session in the worker's pool; see `Worker.add`. Its commands run in order.

    `submit`, `next_event` and `leave` raise the error of a session that failed, and StoppingError after `Worker.stop`.
    """

    def __init__(self, worker: Worker) -> None:
        self.id: int | None = None  # in the pool; only the worker's thread uses it
        self._worker = worker
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._error: Exception | None = None

    def submit(self, command: Callable[..., None], **arguments: Any) -> None:
        """Call `command(pool, id, **arguments)` in the thread, to submit work for this session."""
        if self._error:
            raise self._error
        self._worker._send(lambda: self._worker._apply(self, lambda pool, id: command(pool, id, **arguments)))

    async def next_event(self) -> Event:
        """Wait for the next event. Raises the error of a request that failed."""
        event = None if self._error else await self._events.get()
        if event is None:
            raise self._error or StoppingError()
        if isinstance(event, Done) and event.error:
            raise event.error
        return event

    async def leave(self) -> Session:
        """Leave the pool; returns the session. Raises Diverged if its last update made the model diverge."""
        if self._error:
            raise self._error
        result: Future[Session | None] = Future()

        def leave() -> None:
            session = self._worker._apply(self, _peek_checked)
            self._worker._drop(self)
            if result.set_running_or_notify_cancel():
                result.set_result(session)

        self._worker._send(leave)
        session = await asyncio.wrap_future(result)
        if session is None:
            raise self._error or StoppingError()
        return session

    def drop(self) -> None:
        """Leave the pool and abandon all work; does nothing if the session has left."""
        if self._worker._open:
            self._worker._send(lambda: self._worker._drop(self))

    def fail(self, error: Exception) -> None:
        """Leave the pool and raise `error` wherever the session is waited for."""
        if self._error is None:
            self._error = error
            self._events.put_nowait(None)
            self.drop()


def _peek_checked(pool: SessionPool, id: int) -> Session:
    """A session in the pool, unless its last update made it diverge: with the next request it would be too late."""
    session = pool.peek(id)
    session.check()
    return session


def _deliver(events: list[tuple[PooledSession, Event]]) -> None:
    for pooled, event in events:
        pooled._events.put_nowait(event)
