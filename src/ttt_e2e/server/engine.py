"""Sessions that many people use at once: who waits for whom, and when something is done.

Whatever changes a session works on a copy in the pool (see `worker`), and what comes of it replaces the session whole
(see `shelf`). What fails on the way, or is left by its client, has changed nothing. What only looks at a session takes
the value as it is and holds nobody up.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch

from ttt_e2e.data.text import short_pieces
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.sampling import CONTEXT, SamplingOptions, TextStream
from ttt_e2e.inference.session import Diverged, Session
from ttt_e2e.inference.session_pool import Done, Losses, Token
from ttt_e2e.model.cost import state_bytes
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.server.records import NoSession, Piece, Progress, Prompt, SessionRecord, Stopping, TooMuch
from ttt_e2e.server.shelf import Entry, Shelf
from ttt_e2e.server.store import Store
from ttt_e2e.server.worker import Job, Worker

_HEADER = 1 << 20  # bytes, more than a session file's has
_CHUNK = 4  # mini-batches that a text is handed to the pool in
_AHEAD = 2  # chunks that are there at most: one is read while the next is tokenised


class Engine:
    """The sessions in a store, read and written on with one model.

    model, tokenizer: as `load_reader` gives them. store: opened; `stop` closes it. dtype, learn: as for `Session`.
    max_batch: as for `SessionPool`. memory_bytes: of sessions that are kept in memory beside those at work; beyond,
    those used longest ago are on disk only. max_sessions: of an owner. max_session_tokens: of a session.

    An owner is any string; a session is known to its owner alone. Methods raise NoSession for a session that the owner
    does not have, UserError with a sentence for one whose file is damaged, and Stopping after `stop`; `read` and
    `generate` when their iterator is advanced.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        store: Store,
        *,
        dtype: torch.dtype = torch.float32,
        learn: bool = True,
        max_batch: int = 16,
        memory_bytes: int = 2 << 30,
        max_sessions: int = 100,
        max_session_tokens: int = 10_000_000,
    ) -> None:
        self._tokenizer, self._max_tokens = tokenizer, max_session_tokens
        self._fresh = Session(model, tokenizer, learn=learn, dtype=dtype)
        self._fresh.info()  # hashes the model, once: all sessions are copies of this one, and know the digest then
        self._shelf = Shelf(self._fresh, store, memory_bytes, max_sessions)
        self._worker = Worker(self._fresh, max_batch)
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False

    async def start(self) -> None:
        """Begin to serve, from the event loop that uses the engine. Raises UserError for a model unfit for use."""
        await self._shelf.open()
        self._worker.start()

    async def stop(self, seconds: float = 10.0) -> None:
        """Let what runs end, for so long; then it fails. What was acknowledged is on disk; the store is closed."""
        self._stopping = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        await self._worker.stop()
        await self._shelf.close()

    def numbers(self) -> dict[str, float]:
        """What there is and what was done since the start, by name."""
        return {
            "sessions_in_memory": self._shelf.in_memory,
            "sessions_on_disk": len(self._shelf),
            "bytes_in_memory": self._shelf.bytes_in_memory,
            "running": self._running,
            "tokens_read": self._worker.tokens_read,
            "tokens_written": self._worker.tokens_written,
            "steps": self._worker.steps,
        }

    @property
    def ready(self) -> bool:
        """Whether it serves: it is not about to stop, and the model does not fail at every step."""
        return not self._stopping and self._worker.sound

    @property
    def file_bytes(self) -> int:
        """How large the file of a session can become."""
        size = self._fresh.dtype.itemsize
        return state_bytes(self._fresh.model.config, self._max_tokens, size) + 8 * self._fresh.piece + _HEADER

    # -- sessions --------------------------------------------------------------------------------------------------

    async def create(self, owner: str) -> SessionRecord:
        """A fresh session. Raises TooMuch if the owner has as many as can be."""
        return (await self._shelf.add(owner)).told()

    async def session(self, owner: str, id: str) -> SessionRecord:
        """What there is to know of a session, once a change that is being saved is done."""
        entry = self._shelf.entry(owner, id)
        async with entry.disk:
            if entry.deleted:
                raise NoSession
            if entry.error:
                raise UserError(entry.error)
            return entry.told()

    async def sessions(self, owner: str) -> list[SessionRecord]:
        """All of an owner, the oldest first; a damaged one has an `error`."""
        return [entry.told() for entry in self._shelf.entries(owner)]

    async def fork(self, owner: str, id: str) -> SessionRecord:
        """A new session that goes on from where this one stands. Raises TooMuch as `create` does."""
        value = await self._shelf.value(self._shelf.entry(owner, id))
        return (await self._shelf.add(owner, value)).told()

    async def delete(self, owner: str, id: str) -> None:
        """Forget a session; what is at work on it fails."""
        await self._shelf.delete(self._shelf.entry(owner, id))

    def temporary_folder(self) -> AbstractContextManager[Path]:
        """A folder beside the sessions, for files that come or go; nothing outlives it, not even after a kill."""
        return self._shelf.store.temporary_folder()

    async def export(self, owner: str, id: str, target: Path) -> None:
        """Write a session to the file `target`, which is not there yet, whole or not at all."""
        value = await self._shelf.value(self._shelf.entry(owner, id))
        await asyncio.to_thread(value.save, target)

    async def take_in(self, owner: str, source: Path) -> SessionRecord:
        """A new session from a file as `export` writes it.

        Raises UserError if it holds no sound session of this model, TooMuch as `create` does and for one too long.
        """
        value = await self._shelf.load(source)
        self._check_length(_tokens(value))
        return (await self._shelf.add(owner, value)).told()

    # -- reading and writing ---------------------------------------------------------------------------------------

    async def read(self, owner: str, id: str, pieces: Iterable[str]) -> AsyncIterator[Progress]:
        """Have a session read a text that comes in pieces; all of it becomes part of the session, or nothing.

        The pieces are asked for in a thread, a little ahead of what is read; what is raised there ends the reading.
        Readings of one session wait for one another. Raises TooMuch if the session would be too long, and Diverged.
        """
        entry = self._shelf.entry(owner, id)
        with self._at_work():
            async with entry.turn:
                value = await self._shelf.value(entry, settled=True)
                count, length = _Count(before=value.pending), _tokens(value)
                chunks, more, unread = self._chunks(pieces), True, 0
                with self._job(entry, value) as job:
                    while more or unread:
                        if more and unread < _AHEAD:
                            ids = await asyncio.to_thread(next, chunks, None)
                            more = ids is not None
                            if ids is not None:
                                length += len(ids)
                                self._check_length(length)
                                job.read(ids)
                                unread += 1
                            continue
                        event = await job.next()
                        if isinstance(event, Done):
                            _raise(event)
                            unread -= 1
                        elif isinstance(event, Losses) and (progress := count.add(event.losses)):
                            yield progress
                    value = await _left(job)
                record = await self._shelf.keep(entry, value)
                yield count.end(record)

    async def generate(
        self,
        owner: str,
        id: str | None,
        prompt: Prompt | Callable[[bool], Prompt],
        *,
        max_tokens: int = 200,
        stop: Sequence[str] = (),
        options: SamplingOptions,
        learn: bool = False,
        closing: Prompt = "",
        turns: asyncio.Semaphore | None = None,
    ) -> AsyncIterator[Piece]:
        """Write on after what a session has read and `prompt`; without an id, after the prompt alone.

        prompt: may depend on whether something has been read. turns: held while the model writes, not while this waits
        for other changes of the session.

        The session stays as it is. With `learn`, the model learns from what it writes, and prompt and written text
        become part of the session, saved before the last Piece comes; if it does not come, nothing has changed. Such a
        writing waits as a reading does. stop: strings before which the text ends; it also ends with a token that ends
        texts. closing: what the session reads after that, where it learns. Raises UserError for numbers out of range,
        TooMuch if prompt and `max_tokens` (with `learn`, what was read, too) do not fit into a session, and Diverged.
        """
        entry = None if id is None else self._shelf.entry(owner, id)
        if max_tokens < 0:
            raise UserError(f"Cannot write {max_tokens} tokens; max_tokens must be 0 or more.")
        with self._at_work():
            async with entry.turn if entry and learn else nullcontext(), turns or nullcontext():
                value = self._fresh if entry is None else await self._shelf.value(entry, settled=learn)
                if callable(prompt):
                    prompt = prompt(_tokens(value) > 1)  # more than the token that begins every text
                ids = await asyncio.to_thread(self._encoded, prompt)
                after = self._encoded(closing)
                self._check_length((_tokens(value) if learn else 0) + len(ids) + max_tokens + len(after))
                stream = TextStream(
                    self._tokenizer, stop, before=np.concatenate((value.standing().pending, ids))[-CONTEXT:].tolist()
                )
                asked = len(ids)
                if learn:
                    value, ids = await self._after(entry, value, ids), ids[:0]
                tokens: list[int] = []
                sure, reason = 0, None  # so many tokens have been given out as text, to the last byte
                with self._job(entry, value) as job:
                    job.write(ids, max_tokens, options, learn)
                    while reason is None:
                        event = await job.next()
                        text = ""
                        if isinstance(event, Done):
                            _raise(event)
                            reason = "stop" if len(tokens) < max_tokens else "length"
                        elif isinstance(event, Token):
                            tokens.append(event.token)
                            text = stream.add(event.token)
                            sure = sure if stream.waiting else len(tokens)
                            reason = "stop" if stream.stopped else None
                        if text:
                            yield Piece(text, None, asked, len(tokens))
                rest = stream.rest()
                if learn and entry:
                    given = [*tokens[:sure], *(stream.tokens_given() if sure < len(tokens) else []), *after]
                    value = await self._after(entry, value, np.array(given, np.int64))
                    await self._shelf.keep(entry, value)
                yield Piece(rest, reason, asked, len(tokens))

    # -- inside ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        if self._stopping:
            raise Stopping
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    @contextmanager
    def _job(self, entry: Entry | None, value: Session) -> Iterator[Job]:
        """A copy of the session in the pool, as long as the block lasts."""
        if entry and entry.deleted:
            raise NoSession
        job = self._worker.begin(value)
        jobs = entry.jobs if entry else set()
        jobs.add(job)
        try:
            yield job
        finally:
            jobs.discard(job)
            job.drop()

    async def _after(self, entry: Entry | None, value: Session, ids: np.ndarray) -> Session:
        """The session once it has read so many tokens more."""
        with self._job(entry, value) as job:
            job.read(ids)
            while not isinstance(event := await job.next(), Done):
                pass
            _raise(event)
            return await _left(job)

    def _encoded(self, prompt: Prompt) -> np.ndarray:
        parts = [prompt] if isinstance(prompt, str) else prompt
        ids = [self._tokenizer.encode(part) if isinstance(part, str) else np.array([part], np.int64) for part in parts]
        return np.concatenate([np.empty(0, np.int64), *ids])

    def _chunks(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """The tokens of a text, a few mini-batches at a time."""
        size = _CHUNK * self._fresh.mini_batch
        for ids in self._tokenizer.encode_pieces(short_pieces(pieces)):
            yield from np.split(ids, range(size, len(ids), size))

    def _check_length(self, tokens: int) -> None:
        if tokens > self._max_tokens:
            raise TooMuch(f"A session holds at most {self._max_tokens:,} tokens; go on in a new one.")


class _Count:
    """The losses of a text. before: so many that come first belong to what the session had read before."""

    def __init__(self, before: int) -> None:
        self.before, self.tokens, self.total = before, 0, 0.0

    def add(self, losses: np.ndarray) -> Progress | None:
        """Progress after losses [n]; None if they tell nothing of this text."""
        own = losses[self.before :]
        self.before -= len(losses) - len(own)
        if len(own) == 0:
            return None
        self.tokens += len(own)
        self.total += float(own.sum(dtype=np.float64))
        return Progress(self.tokens, float(own.mean(dtype=np.float64)), self.total / self.tokens)

    def end(self, record: SessionRecord) -> Progress:
        """The last Progress."""
        return Progress(self.tokens, None, self.total / self.tokens if self.tokens else None, record)


def _tokens(value: Session) -> int:
    state, _, pending = value.standing()
    return state.position + len(pending)


def _raise(done: Done) -> None:
    """Raise what went wrong, if something did."""
    if isinstance(done.error, Diverged):
        raise _kept(done.error)
    if done.error is not None:
        raise done.error


async def _left(job: Job) -> Session:
    """The session that was at work, if what it learned last is sound, too."""
    try:
        return await job.leave()
    except Diverged as error:
        raise _kept(error) from None


def _kept(error: Diverged) -> Diverged:
    """The same, told of a session of which only a copy went wrong."""
    if not error.what:
        return error
    return Diverged(
        f"Learning diverged: {error.what}. The session is as it was; send another text, or have the service run with "
        "a model of a smaller inner_loop.lr.",
        error.position,
        error.what,
    )
