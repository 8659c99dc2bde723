"""Concurrent requests to sessions: which waits for which, and when a change becomes permanent.

A request that changes a session works on a copy in the worker's pool, and its result replaces the session as a whole
(see `registry`). A request that fails, or whose client leaves, has changed nothing. A request that only uses a session
takes its current version and waits for nobody.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress

import numpy as np

from ttt_e2e.data.text import short_chunks
from ttt_e2e.inference.divergence import Diverged
from ttt_e2e.inference.grammar import GrammarCompiler
from ttt_e2e.inference.pool_requests import Done, Event
from ttt_e2e.inference.sampling import check_max_tokens
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import MAX_HEADER_BYTES
from ttt_e2e.inference.session_pool import SessionPool
from ttt_e2e.model.cost import state_bytes
from ttt_e2e.retrieval.documents import document_name
from ttt_e2e.retrieval.generate import DEFAULT_PASSAGES, find_passages, retrieve
from ttt_e2e.retrieval.notebook import Notebook, passage_size
from ttt_e2e.server.engine.chats import begin_chat, num_tokens, without_bos
from ttt_e2e.server.engine.generated_text import GeneratedText, TokenTexts
from ttt_e2e.server.engine.notebooks import Limits, NotebookText, as_sources
from ttt_e2e.server.engine.records import (
    ChatPrompt,
    GenerateRequest,
    LimitReachedError,
    Prompt,
    PromptTooLongError,
    ReadProgress,
    SessionNotFoundError,
    Source,
    StoppingError,
    TextChunk,
)
from ttt_e2e.server.engine.registry import SessionRegistry
from ttt_e2e.server.engine.shared_sessions import SharedRegistry
from ttt_e2e.server.engine.shared_store import SharedStore
from ttt_e2e.server.engine.slot import SessionSlot
from ttt_e2e.server.engine.store import Store
from ttt_e2e.server.engine.text_reading import TextReading
from ttt_e2e.server.engine.usage import Usage
from ttt_e2e.server.engine.worker import PooledSession, Worker

_BATCHES_PER_SUBMIT = 4  # mini-batches of a text that are submitted to the pool at a time
_MAX_PROMPT_LOGPROBS = 100_000  # in an answer with the prompt's: of its tokens, and of the likeliest in their places


class Engine:
    """Reads and generates for many clients at the same time, with one model.

    The arguments are those of `SessionPool` and `SessionRegistry`; `template` has a tokenizer, and `max_notebook_bytes`
    are of text. `sessions` is the registry, and `grammars` compiles what `generate` takes. Errors are those of the
    registry, and StoppingError after `stop`; `read` and `generate` raise them when their iterator is advanced.
    """

    def __init__(
        self,
        template: Session,
        store: Store | SharedStore,
        *,
        max_batch: int = 16,
        memory_bytes: int = 2 << 30,
        max_sessions: int = 100,
        max_session_tokens: int = 10_000_000,
        max_notebook_bytes: int = 64 << 20,
    ) -> None:
        assert template.tokenizer is not None
        self._template, self._tokenizer = template, template.tokenizer
        self._token_texts = TokenTexts(template.tokenizer)
        self.grammars = GrammarCompiler(template.tokenizer, template.model.config.vocab_size)
        template.info()  # hashes the model once: all sessions are copies of this one and share the digest
        registry = SharedRegistry if isinstance(store, SharedStore) else SessionRegistry
        limits = Limits(passage_size(template.model.config.sliding_window), max_notebook_bytes)
        self.sessions = registry(template, store, memory_bytes, max_sessions, max_session_tokens, limits)
        self._worker = Worker(template, max_batch)
        self._requests = Usage()
        self._stopping = False

    async def start(self) -> None:
        """Start serving, in the event loop that will use the engine. Raises UserError if the model is unfit for use."""
        await self.sessions.open()
        self._worker.start()

    async def stop(self, seconds: float = 10.0) -> None:
        """Give running requests `seconds` to finish, let the others fail, and close the store."""
        self._stopping = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._requests.wait_until_unused(), seconds)
        await self._worker.stop()
        await self.sessions.close()

    def stats(self) -> dict[str, float]:
        """Current numbers of sessions and requests, and totals since the start, by name."""
        totals = {name: getattr(self._worker, name) for name in ("tokens_read", "tokens_written", "steps")}
        return {**self.sessions.stats(), "running": self._requests.count, **totals}

    @property
    def ready(self) -> bool:
        """Whether the engine serves requests: not if it is stopping, has lost its store, or every step fails."""
        return not self._stopping and self._worker.healthy and self.sessions.store.lost is None

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return self._template.model.config.vocab_size

    @property
    def max_file_bytes(self) -> int:
        """How large an exported session can become, with its notebook."""
        template = self._template
        states = state_bytes(template.model.config, self.sessions.max_session_tokens, template.dtype.itemsize)
        return states + 8 * template.chunk_size + MAX_HEADER_BYTES + self.sessions.limits.disk_bytes

    async def retrieve(
        self, slot: SessionSlot, question: str, count: int = DEFAULT_PASSAGES
    ) -> tuple[str, list[Source]]:
        """The question with passages of the session's notebook before it, and these, at most `count`, the best first.

        Together they have at most half as many tokens as the window. Raises NoNotebookError if there is no notebook.
        """

        def search(notebook: Notebook) -> tuple[str, list[Source]]:
            text, found = retrieve(self._template, notebook, question, count)
            return text, as_sources(notebook, found)

        return await self.sessions.recall(slot, search)

    async def recall(self, owner: str, id: str, query: str, count: int) -> list[Source]:
        """At most `count` passages of the session's notebook that match `query`, the best first. Errors as above."""

        def search(notebook: Notebook) -> list[Source]:
            return as_sources(notebook, find_passages(notebook, query, count))

        return await self.sessions.recall(await self.sessions.slot(owner, id), search)

    async def read(self, owner: str, id: str, chunks: Iterable[str], name: str = "") -> AsyncIterator[ReadProgress]:
        """Let a session read a text, given in chunks; either all of it becomes part of the session or nothing.

        If it keeps a notebook, the chunks are taken twice: first they are recorded, as a document of this name.

        Requests that change the same session run one after another. The chunks are taken in a thread, slightly ahead of
        the reading; an exception raised by their iterator ends the reading. Raises LimitReachedError if the session
        would become too long, and Diverged.
        """
        slot = await self.sessions.slot(owner, id)
        async with self._request(), self.sessions.changing(slot):
            session = await self.sessions.session(slot, for_change=True)
            text = NotebookText(document_name(name), chunks, continues=True)
            async with self.sessions.recorded(slot, text) as notebook:
                with self._pooled(slot, session) as pooled:
                    reading = TextReading(pooled, self._batches(session, chunks), session.pending)
                    while progress := await reading.advance():
                        yield progress
                    session = await pooled.leave()
                summary = await self.sessions.replace(slot, session, notebook=notebook)
            yield reading.finished(summary)

    async def generate(
        self, slot: SessionSlot | None, request: GenerateRequest, limit: asyncio.Semaphore | None = None
    ) -> AsyncIterator[TextChunk]:
        """Generate text after what a session has read, and then the prompt.

        The session does not change unless `learn` is set: then the model learns from what it writes, and prompt and
        generated text become part of the session, which is saved before the last TextChunk is yielded. If that chunk is
        not yielded, nothing has changed. Requests with `learn` wait for others that change the session.

        Args:
            slot: The session; None to start from the prompt alone.
            request: What to generate.
            limit: Held while the model generates, but not while waiting for other changes of the session.

        Raises UserError for values out of range, PromptTooLongError if `echo` and `logprobs` would tell too much,
        LimitReachedError if the prompt is too long or, with `learn`, if session, prompt and `max_tokens` are together,
        and Diverged. Without `learn` the text ends, as at `max_tokens`, once it is with its prompt as long as a session
        may be.
        """
        check_max_tokens(request.max_tokens)
        learn = request.learn
        replaced = slot if learn and request.save is None else None
        changing = self.sessions.changing(replaced) if replaced else nullcontext()
        async with self._request(), changing, limit or nullcontext():
            session = await self.sessions.session(slot, for_change=learn) if slot else self._template
            unread = np.array([], np.int64)  # what the session is to read before the generated text
            if learn and request.kept is not None:
                _, unread = await asyncio.to_thread(self._begin, session, request.kept, request.tools)
            session, ids = await asyncio.to_thread(self._begin, session, request.prompt, request.tools)
            closing = self._encode(request.closing)
            max_tokens = self._max_tokens(session, request, len(ids), len(closing))

            written = GeneratedText(request, session.state().pending, ids, self._token_texts)
            learn_from_writing = learn and request.kept is None
            if learn_from_writing:
                session, ids = await self._after_reading(slot, session, ids), ids[:0]
            matcher = request.grammar.matcher() if request.grammar else None
            with self._pooled(slot, session) as pooled:
                pooled.submit(
                    SessionPool.submit_generate,
                    prompt=ids,
                    max_tokens=max_tokens,
                    options=request.sampling,
                    learn_from_writing=learn_from_writing,
                    top_logprobs=request.logprobs,
                    score_prompt=request.echo,
                    matcher=matcher,
                )
                event: Event | None = None
                while not (written.stopped or isinstance(event, Done)):
                    event = await pooled.next_event()
                    for chunk in written.add(event):
                        yield chunk
            complete = written.stopped or written.num_tokens < max_tokens or (matcher and matcher.complete)
            last = written.end("stop" if complete else "length")

            if learn:
                learned = np.array([*unread, *written.learned_tokens(), *closing], np.int64)
                session = await self._after_reading(slot, session, learned)
                if request.save:
                    await request.save(session, written.whole, last)
                elif replaced:
                    await self.sessions.replace(replaced, session)
            yield last

    async def count_prompt(self, slot: SessionSlot | None, prompt: Prompt | ChatPrompt, tools: str = "") -> int:
        """How many tokens of the prompt `generate` would read; arguments as in `GenerateRequest`."""
        async with self._request():
            session = await self.sessions.session(slot) if slot else self._template
            return len((await asyncio.to_thread(self._begin, session, prompt, tools))[1])

    @asynccontextmanager
    async def _request(self) -> AsyncIterator[None]:
        """Count a request as running inside the block."""
        if self._stopping:
            raise StoppingError
        with self._requests:
            yield

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
        except Diverged as error:
            if not error.what:
                raise
            raise Diverged(
                f"Learning diverged: {error.what}. The session is unchanged; send another text, or serve a model with "
                "a smaller inner_loop.lr.",
                error.position,
                error.what,
            ) from None
        finally:
            users.discard(pooled)
            pooled.drop()

    async def _after_reading(self, slot: SessionSlot | None, session: Session, ids: np.ndarray) -> Session:
        """The session once it has read the tokens `ids` [n]."""
        with self._pooled(slot, session) as pooled:
            pooled.submit(SessionPool.submit_read, tokens=ids)
            while not isinstance(await pooled.next_event(), Done):
                pass
            return await pooled.leave()

    def _begin(self, session: Session, prompt: Prompt | ChatPrompt, tools: str) -> tuple[Session, np.ndarray]:
        """The session in which the prompt begins, and the ids of the prompt, which it has not read."""
        if callable(prompt):
            session, prompt = begin_chat(session, prompt, tools)
            return session, self._encode(prompt)
        ids = self._encode(prompt)
        if not isinstance(prompt, str) and len(ids) and ids[0] == self._tokenizer.bos:
            session = without_bos(session)  # the ids are those of a whole text
        return session, ids

    def _max_tokens(self, session: Session, request: GenerateRequest, num_prompt: int, num_closing: int) -> int:
        """How many tokens may be generated, where prompt and closing have so many.

        Raises PromptTooLongError or LimitReachedError as `generate` does.
        """
        most = _MAX_PROMPT_LOGPROBS // (1 + (request.logprobs or 0))
        if request.echo and request.logprobs is not None and num_prompt > most:
            raise PromptTooLongError(num_prompt, most)
        if request.learn:
            self.sessions.check_length(num_tokens(session) + num_prompt + request.max_tokens + num_closing)
            return request.max_tokens
        # Nothing is kept, but meanwhile the model holds as much as for a session of this length.
        limit = self.sessions.max_session_tokens
        if num_prompt + min(request.max_tokens, 1) > limit:
            raise LimitReachedError(f"Prompt and answer have at most {limit:,} tokens together; send a shorter prompt.")
        return min(request.max_tokens, limit - num_prompt)

    def _encode(self, prompt: Prompt) -> np.ndarray:
        return self._tokenizer.encode(prompt) if isinstance(prompt, str) else np.array(prompt, np.int64)

    def _batches(self, session: Session, chunks: Iterable[str]) -> Iterator[tuple[np.ndarray, int]]:
        """The tokens of a text, at most a few mini-batches at a time, and how many bytes of text they are.

        Raises LimitReachedError once the session would become too long.
        """
        length, size = num_tokens(session), _BATCHES_PER_SUBMIT * self._template.mini_batch_size
        for ids in self._tokenizer.encode_chunks(short_chunks(chunks)):
            for batch in np.split(ids, range(size, len(ids), size)):
                length += len(batch)
                self.sessions.check_length(length)
                yield batch, len(self._tokenizer.decode(batch).encode())
