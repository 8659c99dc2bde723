"""The sessions of all owners: which of them are in memory, and how a session is replaced by its next version.

A session is a value that is replaced as a whole, first on disk and then in memory. A change that has begun is completed
even if its client leaves, so that disk and memory always agree. This runs in one event loop and never blocks it.
"""

import asyncio
import functools
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, MutableMapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from ttt_e2e.inference.session import Session
from ttt_e2e.retrieval.notebook import Notebook
from ttt_e2e.server.engine import notebooks
from ttt_e2e.server.engine.records import (
    DamagedSessionError,
    LimitReachedError,
    NoNotebookError,
    SessionNotFoundError,
    SessionSummary,
    StoppingError,
)
from ttt_e2e.server.engine.session_files import SessionFiles
from ttt_e2e.server.engine.shared_store import SharedStore
from ttt_e2e.server.engine.slot import SessionSlot, Wanted
from ttt_e2e.server.engine.store import NewNotebook, Store
from ttt_e2e.server.engine.usage import Usage

_P = ParamSpec("_P")
_T = TypeVar("_T")


def completed(method: Callable[_P, Coroutine[Any, Any, _T]]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """Decorate a change that runs to its end even if the caller is cancelled, and is refused after `close`."""

    @functools.wraps(method)
    async def complete(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        self: Any = args[0]
        if self._files.closed:
            raise StoppingError
        task = asyncio.create_task(method(*args, **kwargs))
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieved, even if nobody waits
        return await asyncio.shield(task)

    return complete


class SessionRegistry:
    """The sessions in a store, with the model, tokenizer, dtype and `learn` of `template`, which has read nothing.

    Beyond `memory_bytes`, sessions used longest ago are kept on disk only. `max_sessions` is per owner. `limits` are
    those of notebooks, which are always on disk only. `close` closes the store.

    An owner is any string, and a session is visible to its owner only. Methods raise SessionNotFoundError if the owner
    has no such session, DamagedSessionError if its file is, UserError if it is not a session of this model, and
    StoppingError for what needs the store after `close`.
    """

    _files_type = SessionFiles

    def __init__(
        self,
        template: Session,
        store: Store | SharedStore,
        memory_bytes: int,
        max_sessions: int,
        max_session_tokens: int,
        limits: notebooks.Limits,
    ) -> None:
        self.template, self.limits = template, limits
        self.store: Any = store  # the two are used in the same way, with records of their own
        self._files = self._files_type(template, store, limits)
        self._memory_bytes, self._max_sessions, self.max_session_tokens = memory_bytes, max_sessions, max_session_tokens
        self._slots: MutableMapping[str, SessionSlot] = {}
        self._in_memory: dict[str, SessionSlot] = {}  # from the least to the most recently used
        self._owner_locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._changes: set[asyncio.Task[Any]] = set()
        self._file_users = Usage()

    async def open(self) -> None:
        """Read the store's records. Raises UserError if the model is not fit for use."""
        for slot in await asyncio.to_thread(self._files.open):
            self._slots[slot.record.id] = slot

    async def close(self) -> None:
        """Wait for changes under way and for files in use, and refuse any further ones."""
        self._files.closed = True
        while self._changes:
            await asyncio.wait(self._changes)
        await self._file_users.wait_until_unused()
        self.store.close()

    def stats(self) -> dict[str, float]:
        """How many sessions there are, and how much memory they take, by name."""
        counts = {"sessions_in_memory": len(self._in_memory), "sessions_on_disk": len(self._slots)}
        return {**counts, "bytes_in_memory": self._bytes_in_memory()}

    def check_length(self, tokens: int) -> None:
        """Raise LimitReachedError if a session cannot hold this many tokens."""
        if tokens > self.max_session_tokens:
            raise LimitReachedError(f"A session holds at most {self.max_session_tokens:,} tokens; use a new one.")

    async def check_room(self, owner: str) -> None:
        """Raise LimitReachedError if the owner has `max_sessions` already."""
        if await self._count(owner) >= self._max_sessions:
            raise LimitReachedError(f"The limit of {self._max_sessions} sessions is reached; delete one first.")

    @completed
    async def create(
        self,
        owner: str,
        session: Session | None = None,
        document: str | None = None,
        id: str | None = None,
        notebook: Wanted = None,
    ) -> SessionSummary:
        """Add a session, an empty one by default. Raises LimitReachedError as `check_room` does.

        document: a text to keep with it. id: from `new_id`, if it is needed earlier. notebook: whether it keeps one; or
        a notebook; or another session, whose notebook it shares if that has one.
        """
        session = session or self.template
        shared = notebook if isinstance(notebook, SessionSlot) and notebook.record.notebook else None
        async with self._owner_locks[owner], shared.file_lock if shared else nullcontext():
            await self.check_room(owner)
            if shared and shared.deleted:
                raise SessionNotFoundError
            record, fingerprint = await asyncio.to_thread(self._files.add, owner, session, document, id, notebook)
            slot = SessionSlot(record, session, fingerprint)
            self._slots[record.id] = slot
            self._mark_used(slot)
            return slot.summary()

    async def summary(self, owner: str, id: str) -> SessionSummary:
        """Describe a session; if a new version of it is being saved, that one."""
        slot = await self.slot(owner, id)
        async with slot.using_files():
            if slot.damaged:
                raise DamagedSessionError
            return slot.summary()

    async def summaries(self, owner: str) -> list[SessionSummary]:
        """All sessions of an owner, the oldest first, including damaged ones, which have an `error`."""
        return [slot.summary() for slot in self._slots.values() if slot.record.owner == owner]

    async def fork(self, owner: str, id: str) -> SessionSummary:
        """Add an independent copy of a session. Raises LimitReachedError as `create` does."""
        slot = await self.slot(owner, id)
        return await self.create(owner, await self.session(slot), notebook=slot)

    @completed
    async def delete(self, owner: str, id: str) -> None:
        """Delete a session. Requests that use it fail with SessionNotFoundError."""
        slot = await self.slot(owner, id)
        async with slot.using_files():
            await asyncio.to_thread(self.store.delete, slot.record)
            slot.deleted = True
            self._slots.pop(id, None)
            self._in_memory.pop(id, None)
        for pooled in list(slot.pooled):
            pooled.fail(SessionNotFoundError())

    async def export_session(self, owner: str, id: str, target: Path) -> str:
        """Write a session to the new file `target`, with its notebook in a tar; returns a name for the file.

        If this fails, a part of it may remain.
        """
        slot = await self.slot(owner, id)
        with self._using_files():
            if slot.record.notebook is None:
                await asyncio.to_thread(self._files.export, await self.session(slot), target)
                return f"{id}.session"
            async with slot.using_files():
                await asyncio.to_thread(self._files.export_with_notebook, slot, target)
                return f"{id}.tar"

    async def import_session(self, owner: str, source: Path) -> SessionSummary:
        """Add the session in an untrusted file, which may be a tar with a notebook as well.

        Raises LimitReachedError if session or notebook are too long, or as `create` does.
        """
        with self._using_files(), self.temporary_folder() as folder:
            session, untrusted = await asyncio.to_thread(self._files.unpack, source, folder)
            self.check_length(session.info().tokens)
            notebook = None
            if untrusted is not None:
                notebook = await asyncio.to_thread(self._files.import_notebook, untrusted, folder / "made")
            return await self.create(owner, session, notebook=notebook)

    async def recall(self, slot: SessionSlot, search: Callable[[Notebook], _T]) -> _T:
        """What `search` finds in the notebook of a session. Raises NoNotebookError if it keeps none."""
        if slot.record.notebook is None:
            raise NoNotebookError
        with self._using_files():
            async with slot.file_lock:
                return await asyncio.to_thread(self._files.search, slot, search)

    @asynccontextmanager
    async def recorded(self, slot: SessionSlot, text: notebooks.NotebookText) -> AsyncIterator[NewNotebook | None]:
        """The notebook of a session with a text added, for `replace`; None if it keeps none. Be `changing` it.

        It exists inside the block. Raises LimitReachedError if it becomes too large.
        """
        if slot.record.notebook is None:
            yield None
            return
        with self._using_files(), self.temporary_folder() as folder:
            making = asyncio.ensure_future(asyncio.to_thread(self._files.record, slot, folder / "notebook", text))
            try:
                notebook = await asyncio.shield(making)
            finally:
                text.stopped = True
                await asyncio.wait([making])  # before its folder is removed
            try:
                yield notebook
            except asyncio.CancelledError:
                async with slot.file_lock:  # a change that is completed after its client has left needs the folder
                    raise

    async def slot(self, owner: str, id: str) -> SessionSlot:
        """The slot of a session."""
        slot = self._slots.get(id)
        if slot is None or slot.record.owner != owner:
            raise SessionNotFoundError
        return slot

    @asynccontextmanager
    async def changing(self, slot: SessionSlot) -> AsyncIterator[None]:
        """Let nobody else change a session inside the block, in which it is replaced once at most."""
        async with slot.write_lock:
            yield

    async def session(self, slot: SessionSlot, *, for_change: bool = False) -> Session:
        """The current version of a session, loaded if necessary.

        for_change: wait for a version that is being saved, and be sure that the file still holds this one.
        """
        session = slot.session
        if session is None or for_change:
            with self._using_files():
                async with slot.using_files():
                    slot.session = await asyncio.to_thread(self._files.load, slot)
                    session = slot.session
        self._mark_used(slot)
        return session

    async def document(self, slot: SessionSlot) -> str | None:
        """The document of a session, if it has one."""
        with self._using_files():
            async with slot.using_files():
                return await asyncio.to_thread(self.store.document, slot.record)

    @completed
    async def set_document(self, slot: SessionSlot, document: str) -> None:
        """Save the document of a session; be `changing` it if the former one matters."""
        async with slot.using_files():
            slot.record = await asyncio.to_thread(self.store.set_document, slot.record, document)

    @completed
    async def replace(
        self, slot: SessionSlot, session: Session, document: str | None = None, notebook: NewNotebook | None = None
    ) -> SessionSummary:
        """Save the next version of a session; once it is on disk it becomes the current one.

        document, notebook: None keeps what it has.
        """
        async with slot.using_files():
            slot.record, slot.fingerprint = await asyncio.to_thread(
                self._files.replace, slot.record, session, document, notebook
            )
            slot.session, slot.damaged = session, False
            self._mark_used(slot)
            return slot.summary()

    def temporary_folder(self) -> AbstractContextManager[Path]:
        """A folder of the store that exists inside the block; see `Store.temporary_folder`."""
        return self._files.temporary_folder()

    @contextmanager
    def _using_files(self) -> Iterator[None]:
        """Keep the store from being closed inside the block: once it is, another process may remove its files."""
        if self._files.closed:
            raise StoppingError
        with self._file_users:
            yield

    async def _count(self, owner: str) -> int:
        return sum(slot.record.owner == owner for slot in self._slots.values())

    def _bytes_in_memory(self) -> int:
        return sum(slot.record.info.memory_bytes for slot in self._in_memory.values())

    def _mark_used(self, slot: SessionSlot) -> None:
        """Mark a session in memory as the most recently used, and drop others from memory if the limit demands it."""
        if slot.deleted:
            return
        self._in_memory.pop(slot.record.id, None)
        self._in_memory[slot.record.id] = slot
        while self._in_memory and self._bytes_in_memory() > self._memory_bytes:
            self._in_memory.pop(next(iter(self._in_memory))).session = None
