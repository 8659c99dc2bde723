"""The thread that does all model work: it owns the pool and steps it while there is something to do.

From an event loop, a session at work in the pool is a `Job`. What it is told goes to the thread as a command; what
happens comes back as events. Nobody waits in a loop: without work the thread sleeps until the next command.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

import numpy as np

from ttt_e2e.inference.sampling import SamplingOptions
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_pool import Event, Losses, SessionPool, Token
from ttt_e2e.server.records import Stopping

_FAILED = 3  # steps one after the other: not one too large for memory, but a device that is lost
_log = logging.getLogger(__name__)


class Worker:
    """A thread with a pool. fresh, max_batch: as for `SessionPool`. All methods are for the loop that called `start`.

    steps, tokens_read, tokens_written: what was done so far. Where a step of the pool fails as a whole, all jobs do;
    sound: whether the last few steps did not all fail so.
    """

    def __init__(self, fresh: Session, max_batch: int) -> None:
        self.steps = self.tokens_read = self.tokens_written = 0
        self._failed = 0  # steps, since the last one that went well
        self._pool = SessionPool(fresh, max_batch=max_batch)
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._jobs: dict[int, Job] = {}  # those in the pool, by their ids there; only the thread looks at them
        self._thread = threading.Thread(target=self._work, name="ttt-e2e-worker", daemon=True)
        self._open = False

    @property
    def sound(self) -> bool:
        """Whether there is a point in giving it more to do."""
        return self._failed < _FAILED

    def start(self) -> None:
        """Begin to work."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._open = True

    async def stop(self) -> None:
        """End the thread after the step that it is at. Jobs that are left fail."""
        if self._open:
            self._open = False
            self._commands.put(self._give_up)
            self._commands.put(None)
            await asyncio.to_thread(self._thread.join)

    def begin(self, session: Session) -> "Job":
        """Let a session join the pool; it stays as it is. Raises Stopping after `stop`."""
        job = Job(self)

        def join() -> None:
            try:
                job.id = self._pool.add(session)
                self._jobs[job.id] = job
            except Exception as error:
                self._lose(job, error)

        self._tell(join)
        return job

    def _tell(self, command: Callable[[], None]) -> None:
        if not self._open:
            raise Stopping()
        self._commands.put(command)

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            while not self._pool.busy or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return
                command()
            self._step()

    def _step(self) -> None:
        try:
            events = self._pool.step()
        except Exception as error:  # too little memory, for instance; whose fault it is cannot be told
            self._failed += 1
            _log.exception("A step of the model failed; what was at work is given up.")
            for job in list(self._jobs.values()):
                self._lose(job, error)
            return
        self._failed = 0
        self.steps += 1
        for event in events:
            if isinstance(event, Losses):
                self.tokens_read += len(event.losses)
            elif isinstance(event, Token):
                self.tokens_written += 1
        self._loop.call_soon_threadsafe(_hand_out, [(self._jobs[event.id], event) for event in events])

    def _order(self, job: "Job", order: Callable[[SessionPool, int], None]) -> None:
        """Have the pool do something for a job, if it is still there; where that cannot be done, the job fails."""
        if job.id is not None:
            try:
                order(self._pool, job.id)
            except Exception as error:
                self._lose(job, error)

    def _drop(self, job: "Job") -> None:
        id, job.id = job.id, None
        if id is not None:
            del self._jobs[id]
            self._pool.drop(id)

    def _lose(self, job: "Job", error: Exception) -> None:
        self._drop(job)
        self._loop.call_soon_threadsafe(job.fail, error)

    def _give_up(self) -> None:
        for job in list(self._jobs.values()):
            self._lose(job, Stopping())


class Job:
    """A session at work in the pool; see `Worker.begin`. What it is told to do, it does in that order.

    Every method but `drop` and `fail` raises Stopping once the worker has stopped, and the error of a job that failed.
    """

    def __init__(self, worker: Worker) -> None:
        self.id: int | None = None  # in the pool; only the worker's thread looks at it
        self._worker = worker
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._error: Exception | None = None

    def read(self, tokens: np.ndarray) -> None:
        """Read on: `Losses`, one a mini-batch, then `Done`."""
        self._order(lambda pool, id: pool.submit_read(id, tokens))

    def write(self, prompt: np.ndarray, max_tokens: int, options: SamplingOptions, learn: bool) -> None:
        """Write on after the prompt, as `SessionPool.submit_generate` does: `Token`, one at a time, then `Done`."""
        self._order(
            lambda pool, id: pool.submit_generate(
                id, prompt, max_tokens=max_tokens, options=options, learn_from_writing=learn
            )
        )

    async def next(self) -> Event:
        """What happens next."""
        event = None if self._error else await self._events.get()
        if event is None:
            raise self._error or Stopping()
        return event

    async def leave(self) -> Session:
        """Leave the pool, with the session as it stands. Raises Diverged if what it learned last has spoiled it."""
        if self._error:
            raise self._error
        sessions: list[Session] = []
        left: Future[None] = Future()

        def take() -> None:
            self._worker._order(self, lambda pool, id: sessions.append(_judged(pool.peek(id))))
            self._worker._drop(self)
            if left.set_running_or_notify_cancel():
                left.set_result(None)

        self._worker._tell(take)
        await asyncio.wrap_future(left)
        if self._error:
            raise self._error
        return sessions[0]

    def drop(self) -> None:
        """Leave the pool, whatever the job is at; nothing if it has left."""
        if self._worker._open:
            self._worker._tell(lambda: self._worker._drop(self))

    def fail(self, error: Exception) -> None:
        """Leave the pool; whoever waits for the job gets the error."""
        if self._error is None:
            self._error = error
            self._events.put_nowait(None)
            self.drop()

    def _order(self, order: Callable[[SessionPool, int], None]) -> None:
        if self._error:
            raise self._error
        self._worker._tell(lambda: self._worker._order(self, order))


def _judged(session: Session) -> Session:
    """The same. A mini-batch's loss judges the update before it; the last one's judge would come in the next request,
    when there is no way back any more.
    """
    if session.learn and session.position:
        look = session.fork()
        if look.pending:
            look.score_pending()
        else:  # there is no loss to be had, but it can be seen whether it would be a number
            next(look.generate_tokens(max_tokens=1, temperature=0), None)
    return session


def _hand_out(events: list[tuple[Job, Event]]) -> None:
    for job, event in events:
        job._events.put_nowait(event)
