"""The sessions of all owners: which of them are in memory, and how a session is replaced by its next version.

A session is a value that is replaced as a whole, first on disk and then in memory. A change that has begun is completed
even if its client leaves, so that disk and memory always agree. This runs in one event loop and never blocks it.
"""

import asyncio
from collections import defaultdict
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import SessionInfo
from ttt_e2e.server.engine.loading import SessionLoader
from ttt_e2e.server.engine.records import LimitReachedError, SessionNotFoundError, SessionSummary, StoppingError
from ttt_e2e.server.engine.store import SessionRecord, Store
from ttt_e2e.server.engine.worker import PooledSession

_T = TypeVar("_T")


@dataclass(eq=False)
class SessionSlot:
    """A session of the registry; only `SessionRegistry` changes it, apart from `pooled` and `write_lock`.

    info: None if the session's file is damaged, and `error` says how. session: None while it is on disk only. pooled:
    its copies in the worker's pool, which fail when it is deleted. write_lock: held by a request that is going to
    replace the session. file_lock: held while its file is read or written.
    """

    record: SessionRecord
    info: SessionInfo | None
    session: Session | None = None
    error: str | None = None
    deleted: bool = False
    pooled: set[PooledSession] = field(default_factory=set)
    write_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    file_lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def summary(self) -> SessionSummary:
        """The session as clients see it."""
        info = self.info
        return SessionSummary(
            id=self.record.id,
            created=int(self.record.created),
            tokens=info.tokens if info else 0,
            text_bytes=info.text_bytes if info else None,
            text_digest=info.text_digest if info else "",
            memory_bytes=info.memory_bytes if info else 0,
            learn=info.learn if info else False,
            in_memory=self.session is not None,
            error=self.error,
        )


class SessionRegistry:
    """The sessions in a store, with the model, tokenizer, dtype and `learn` of `template`, which has read nothing.

    store: closed by `close`. memory_bytes: how much memory sessions may take; beyond it, those used longest ago are
    kept on disk only. max_sessions: per owner.
    """

    def __init__(self, template: Session, store: Store, memory_bytes: int, max_sessions: int) -> None:
        self.template, self.store = template, store
        self.memory_bytes, self.max_sessions = memory_bytes, max_sessions
        self._slots: dict[str, SessionSlot] = {}
        self._in_memory: dict[str, SessionSlot] = {}  # from the least to the most recently used
        self._owner_locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._changes: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def open(self) -> None:
        """Read the store's records. Raises UserError if the model is not fit for use."""

        def find() -> list[SessionSlot]:
            self._loader = SessionLoader(self.template)
            return [self._find(record) for record in self.store.records()]

        self._slots = {slot.record.id: slot for slot in await asyncio.to_thread(find)}

    async def close(self) -> None:
        """Wait for changes under way, and refuse any further ones."""
        self._closed = True
        while self._changes:
            await asyncio.wait(self._changes)
        self.store.close()

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def sessions_in_memory(self) -> int:
        """How many sessions are in memory."""
        return len(self._in_memory)

    @property
    def bytes_in_memory(self) -> int:
        """How much memory they take."""
        return sum(slot.info.memory_bytes for slot in self._in_memory.values() if slot.info)

    def slot(self, owner: str, id: str) -> SessionSlot:
        """One session. Raises SessionNotFoundError if the owner has no such session."""
        slot = self._slots.get(id)
        if slot is None or slot.record.owner != owner:
            raise SessionNotFoundError
        return slot

    def slots(self, owner: str) -> list[SessionSlot]:
        """All sessions of an owner, the oldest first."""
        return [slot for slot in self._slots.values() if slot.record.owner == owner]

    async def session(self, slot: SessionSlot, *, wait_for_writes: bool = False) -> Session:
        """The current version of a session, loaded from disk if necessary.

        wait_for_writes: if a new version is being saved, wait for it. Raises SessionNotFoundError if the session was
        deleted, and UserError if its file is missing or damaged.
        """
        session = slot.session
        if session is None or wait_for_writes:
            async with slot.file_lock:
                if slot.deleted:
                    raise SessionNotFoundError
                if slot.session is None:
                    path, name = self.store.path(slot.record.id), f"The session {slot.record.id}"
                    slot.session = await asyncio.to_thread(self._loader.load, path, name)
                session = slot.session
        self._mark_used(slot)
        return session

    async def load(self, path: Path) -> Session:
        """Load a session from an untrusted file. Raises UserError unless it is a valid session of this model."""
        return await asyncio.to_thread(self._loader.load, path, "The file")

    async def add(self, owner: str, session: Session | None = None) -> SessionSlot:
        """Add a session, an empty one by default. Raises LimitReachedError if the owner has `max_sessions` already."""

        def save() -> SessionSlot:
            value = session or self.template
            return SessionSlot(self.store.add(owner, value), value.info(), value)

        async def add() -> SessionSlot:
            async with self._owner_locks[owner]:
                if len(self.slots(owner)) >= self.max_sessions:
                    raise LimitReachedError(f"The limit of {self.max_sessions} sessions is reached; delete one first.")
                slot = await asyncio.to_thread(save)
                self._slots[slot.record.id] = slot
                self._mark_used(slot)
                return slot

        return await self._complete(add())

    async def replace(self, slot: SessionSlot, session: Session) -> SessionSummary:
        """Save the next version of a session; once it is on disk it becomes the current one."""

        def save() -> SessionInfo:
            self.store.save(slot.record.id, session)
            return session.info()

        async def replace() -> SessionSummary:
            async with slot.file_lock:
                if slot.deleted:
                    raise SessionNotFoundError
                slot.info = await asyncio.to_thread(save)
                slot.session = session
                self._mark_used(slot)
                return slot.summary()

        return await self._complete(replace())

    async def delete(self, slot: SessionSlot) -> None:
        """Delete a session. Requests that use it fail with SessionNotFoundError."""

        async def delete() -> None:
            async with slot.file_lock:
                if slot.deleted:
                    raise SessionNotFoundError
                await asyncio.to_thread(self.store.delete, slot.record.id)
                slot.deleted = True
                del self._slots[slot.record.id]
                self._in_memory.pop(slot.record.id, None)
            for pooled in list(slot.pooled):
                pooled.fail(SessionNotFoundError())

        await self._complete(delete())

    # -- inside ----------------------------------------------------------------------------------------------------

    def _find(self, record: SessionRecord) -> SessionSlot:
        try:
            info = self._loader.read_info(self.store.path(record.id), f"The session {record.id}")
            return SessionSlot(record, info)
        except UserError as error:
            return SessionSlot(record, None, error=str(error))

    def _mark_used(self, slot: SessionSlot) -> None:
        """Mark a session in memory as the most recently used, and drop others from memory if the limit demands it."""
        if slot.deleted:
            return
        self._in_memory.pop(slot.record.id, None)
        self._in_memory[slot.record.id] = slot
        while self._in_memory and self.bytes_in_memory > self.memory_bytes:
            self._in_memory.pop(next(iter(self._in_memory))).session = None

    async def _complete(self, change: Coroutine[Any, Any, _T]) -> _T:
        """Run a change to its end, even if the caller is cancelled."""
        if self._closed:
            change.close()
            raise StoppingError
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieved, even if nobody waits
        return await asyncio.shield(task)
