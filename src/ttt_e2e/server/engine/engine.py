"""Concurrent requests to sessions: which waits for which, and when a change becomes permanent.

A request that changes a session works on a copy in the worker's pool, and its result replaces the session as a whole
(see `registry`). A request that fails, or whose client leaves, has changed nothing. A request that only uses a session
takes its current version and waits for nobody.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ttt_e2e.data.text import short_chunks
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.divergence import Diverged
from ttt_e2e.inference.sampling import SamplingOptions
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_pool import Done, Losses, Token
from ttt_e2e.inference.text_stream import TextStream
from ttt_e2e.model.cost import state_bytes
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.server.engine.records import (
    LimitReachedError,
    Prompt,
    ReadProgress,
    SessionNotFoundError,
    SessionSummary,
    StoppingError,
    TextChunk,
)
from ttt_e2e.server.engine.registry import SessionRegistry, SessionSlot
from ttt_e2e.server.engine.store import Store
from ttt_e2e.server.engine.worker import PooledSession, Worker

_HEADER_BYTES = 1 << 20  # more than the header of a session file takes
_BATCHES_PER_SUBMIT = 4  # mini-batches of a text that are submitted to the pool at a time
_MAX_SUBMITTED = 2  # one submission is read while the next is tokenised


class Engine:
    """Sessions that many clients use at the same time, with one model.

    Args:
        model, tokenizer: As `load_reader` returns them.
        store: An open store; `stop` closes it.
        dtype, learn: As for `Session`.
        max_batch: As for `SessionPool`.
        memory_bytes: How much memory idle sessions may take; beyond it, those used longest ago are kept on disk only.
        max_sessions: Per owner.
        max_session_tokens: Per session.

    An owner is any string, and a session is visible to its owner only. Methods raise SessionNotFoundError if the owner
    has no such session, UserError if its file is damaged, and StoppingError after `stop`; `read` and `generate` raise
    them when their iterator is advanced.
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
        self._template = Session(model, tokenizer, learn=learn, dtype=dtype)
        self._template.info()  # hashes the model once: all sessions are copies of this one and share the digest
        self._registry = SessionRegistry(self._template, store, memory_bytes, max_sessions)
        self._worker = Worker(self._template, max_batch)
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False

    async def start(self) -> None:
        """Start serving, in the event loop that will use the engine. Raises UserError if the model is unfit for use."""
        await self._registry.open()
        self._worker.start()

    async def stop(self, seconds: float = 10.0) -> None:
        """Give running requests `seconds` to finish, let the others fail, and close the store."""
        self._stopping = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        await self._worker.stop()
        await self._registry.close()

    def stats(self) -> dict[str, float]:
        """Current numbers of sessions and requests, and totals since the start, by name."""
        return {
            "sessions_in_memory": self._registry.sessions_in_memory,
            "sessions_on_disk": len(self._registry),
            "bytes_in_memory": self._registry.bytes_in_memory,
            "running": self._running,
            "tokens_read": self._worker.tokens_read,
            "tokens_written": self._worker.tokens_written,
            "steps": self._worker.steps,
        }

    @property
    def ready(self) -> bool:
        """Whether the engine serves requests: it is not stopping, and the model does not fail at every step."""
        return not self._stopping and self._worker.healthy

    @property
    def max_file_bytes(self) -> int:
        """How large a session file can become."""
        size = self._template.dtype.itemsize
        states = state_bytes(self._template.model.config, self._max_tokens, size)
        return states + 8 * self._template.chunk_size + _HEADER_BYTES

    # -- sessions --------------------------------------------------------------------------------------------------

    async def create(self, owner: str) -> SessionSummary:
        """A new, empty session. Raises LimitReachedError if the owner has `max_sessions` already."""
        return (await self._registry.add(owner)).summary()

    async def session(self, owner: str, id: str) -> SessionSummary:
        """One session; if a new version of it is being saved, that one."""
        slot = self._registry.slot(owner, id)
        async with slot.file_lock:
            if slot.deleted:
                raise SessionNotFoundError
            if slot.error:
                raise UserError(slot.error)
            return slot.summary()

    async def sessions(self, owner: str) -> list[SessionSummary]:
        """All sessions of an owner, the oldest first, including damaged ones, which have an `error`."""
        return [slot.summary() for slot in self._registry.slots(owner)]

    async def fork(self, owner: str, id: str) -> SessionSummary:
        """A new session that starts from the state of this one. Raises LimitReachedError as `create` does."""
        session = await self._registry.session(self._registry.slot(owner, id))
        return (await self._registry.add(owner, session)).summary()

    async def delete(self, owner: str, id: str) -> None:
        """Delete a session. Requests that use it fail."""
        await self._registry.delete(self._registry.slot(owner, id))

    def temporary_folder(self) -> AbstractContextManager[Path]:
        """A folder beside the sessions for files on their way in or out; it never outlives the service."""
        return self._registry.store.temporary_folder()

    async def export_session(self, owner: str, id: str, target: Path) -> None:
        """Write a session to the new file `target`, whole or not at all."""
        session = await self._registry.session(self._registry.slot(owner, id))
        await asyncio.to_thread(session.save, target)

    async def import_session(self, owner: str, source: Path) -> SessionSummary:
        """A new session from a file that `export_session` wrote.

        Raises UserError unless it is a valid session of this model, and LimitReachedError if it is too long or the
        owner has `max_sessions` already.
        """
        session = await self._registry.load(source)
        self._check_length(_num_tokens(session))
        return (await self._registry.add(owner, session)).summary()

    # -- reading and generating ------------------------------------------------------------------------------------

    async def read(self, owner: str, id: str, chunks: Iterable[str]) -> AsyncIterator[ReadProgress]:
        """Let a session read a text, given in chunks; either all of it becomes part of the session or nothing.

        Requests that change the same session run one after another. The chunks are taken in a thread, slightly ahead of
        the reading; an exception raised by their iterator ends the reading. Raises LimitReachedError if the session
        would become too long, and Diverged.
        """
        slot = self._registry.slot(owner, id)
        with self._request():
            async with slot.write_lock:
                session = await self._registry.session(slot, wait_for_writes=True)
                mean, length = _MeanLoss(skip=session.pending), _num_tokens(session)
                batches, more, submitted = self._batches(chunks), True, 0
                with self._pooled(slot, session) as pooled:
                    while more or submitted:
                        if more and submitted < _MAX_SUBMITTED:
                            ids = await asyncio.to_thread(next, batches, None)
                            more = ids is not None
                            if ids is not None:
                                length += len(ids)
                                self._check_length(length)
                                pooled.read(ids)
                                submitted += 1
                            continue
                        event = await pooled.next_event()
                        if isinstance(event, Done):
                            _raise_error(event)
                            submitted -= 1
                        elif isinstance(event, Losses) and (progress := mean.add(event.losses)):
                            yield progress
                    session = await _leave(pooled)
                summary = await self._registry.replace(slot, session)
                yield ReadProgress(mean.tokens, mean.value, None, summary)

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
        limit: asyncio.Semaphore | None = None,
    ) -> AsyncIterator[TextChunk]:
        """Generate text after what a session has read and `prompt`.

        The session stays as it is unless `learn` is set: then the model learns from what it writes, and prompt and
        generated text become part of the session, which is saved before the last TextChunk comes. If that chunk does
        not come, nothing has changed. Requests with `learn` wait for others that change the session.

        Args:
            owner, id: The session; None to start from the prompt alone.
            prompt: A prompt, or a function that returns one, given whether the session has read anything.
            max_tokens: Maximum number of generated tokens. A token that ends texts ends the generation earlier.
            stop: Strings before which the text ends.
            options: How tokens are sampled.
            learn: Whether prompt and generated text become part of the session.
            closing: What the session reads after the generated text, with `learn`.
            limit: Held while the model generates, but not while waiting for other changes of the session.

        Raises:
            UserError: For values out of range.
            LimitReachedError: If prompt, `max_tokens` and, with `learn`, the session are too long together.
            Diverged: If learning diverged; the session is unchanged.
        """
        slot = None if id is None else self._registry.slot(owner, id)
        if max_tokens < 0:
            raise UserError(f"Cannot generate {max_tokens} tokens; max_tokens must be 0 or more.")
        with self._request():
            async with slot.write_lock if slot and learn else nullcontext(), limit or nullcontext():
                session = self._template
                if slot:
                    session = await self._registry.session(slot, wait_for_writes=learn)
                if callable(prompt):
                    prompt = prompt(_num_tokens(session) > 1)  # more than the BOS token
                ids = await asyncio.to_thread(self._encode, prompt)
                closing_ids, prompt_tokens = self._encode(closing), len(ids)
                self._check_length((_num_tokens(session) if learn else 0) + len(ids) + max_tokens + len(closing_ids))
                context = np.concatenate((session.state().pending, ids))
                stream = TextStream(self._tokenizer, stop, context)
                if learn:
                    session, ids = await self._after_reading(slot, session, ids), ids[:0]
                tokens: list[int] = []
                complete = 0  # how many of the tokens have been given out as text entirely
                reason: Literal["stop", "length"] | None = None
                with self._pooled(slot, session) as pooled:
                    pooled.generate(ids, max_tokens, options, learn)
                    while reason is None:
                        event = await pooled.next_event()
                        text = ""
                        if isinstance(event, Done):
                            _raise_error(event)
                            reason = "stop" if len(tokens) < max_tokens else "length"
                        elif isinstance(event, Token):
                            tokens.append(event.token)
                            text = stream.add(event.token)
                            complete = complete if stream.has_pending else len(tokens)
                            reason = "stop" if stream.stopped else None
                        if text:
                            yield TextChunk(text, None, prompt_tokens, len(tokens))
                rest = stream.flush()
                if learn and slot:
                    partial = stream.emitted_tokens() if complete < len(tokens) else []
                    learned = np.array([*tokens[:complete], *partial, *closing_ids], np.int64)
                    await self._registry.replace(slot, await self._after_reading(slot, session, learned))
                yield TextChunk(rest, reason, prompt_tokens, len(tokens))

    # -- inside ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _request(self) -> Iterator[None]:
        """Count a request as running inside the block."""
        if self._stopping:
            raise StoppingError
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    @contextmanager
    def _pooled(self, slot: SessionSlot | None, session: Session) -> Iterator[PooledSession]:
        """A copy of the session in the worker's pool, inside the block."""
        if slot and slot.deleted:
            raise SessionNotFoundError
        pooled = self._worker.add(session)
        users = slot.pooled if slot else set()
        users.add(pooled)
        try:
            yield pooled
        finally:
            users.discard(pooled)
            pooled.drop()

    async def _after_reading(self, slot: SessionSlot | None, session: Session, ids: np.ndarray) -> Session:
        """The session once it has read the tokens `ids` [n]."""
        with self._pooled(slot, session) as pooled:
            pooled.read(ids)
            while not isinstance(event := await pooled.next_event(), Done):
                pass
            _raise_error(event)
            return await _leave(pooled)

    def _encode(self, prompt: Prompt) -> np.ndarray:
        parts = [prompt] if isinstance(prompt, str) else prompt
        ids = [self._tokenizer.encode(part) if isinstance(part, str) else np.array([part], np.int64) for part in parts]
        return np.concatenate([np.empty(0, np.int64), *ids])

    def _batches(self, chunks: Iterable[str]) -> Iterator[np.ndarray]:
        """The tokens of a text, at most a few mini-batches at a time."""
        size = _BATCHES_PER_SUBMIT * self._template.mini_batch_size
        for ids in self._tokenizer.encode_chunks(short_chunks(chunks)):
            yield from np.split(ids, range(size, len(ids), size))

    def _check_length(self, tokens: int) -> None:
        if tokens > self._max_tokens:
            raise LimitReachedError(f"A session holds at most {self._max_tokens:,} tokens; continue in a new one.")


class _MeanLoss:
    """Mean loss of a text. skip: how many losses come first that belong to what the session had read before."""

    def __init__(self, skip: int) -> None:
        self._skip, self.tokens, self._sum = skip, 0, 0.0

    @property
    def value(self) -> float | None:
        """In nats per token; None before the first loss."""
        return self._sum / self.tokens if self.tokens else None

    def add(self, losses: np.ndarray) -> ReadProgress | None:
        """Progress after further losses [n]; None if all of them belong to what had been read before."""
        own = losses[self._skip :]
        self._skip -= len(losses) - len(own)
        if len(own) == 0:
            return None
        self.tokens += len(own)
        self._sum += float(own.sum(dtype=np.float64))
        return ReadProgress(self.tokens, self.value, float(own.mean(dtype=np.float64)))


def _num_tokens(session: Session) -> int:
    return session.position + len(session.state().pending)


def _raise_error(done: Done) -> None:
    if isinstance(done.error, Diverged):
        raise _unchanged(done.error)
    if done.error is not None:
        raise done.error


async def _leave(pooled: PooledSession) -> Session:
    try:
        return await pooled.leave()
    except Diverged as error:
        raise _unchanged(error) from None


def _unchanged(error: Diverged) -> Diverged:
    """The error of a copy that diverged, as it concerns the session, which is unchanged."""
    if not error.what:
        return error
    return Diverged(
        f"Learning diverged: {error.what}. The session is unchanged; send another text, or serve a model with a "
        "smaller inner_loop.lr.",
        error.position,
        error.what,
    )
