"""Which sessions there are and whose, which of them are in memory, and how one becomes another.

A session is a value that is replaced whole: first on disk, then in memory. What is under way when its client goes away
is done to its end, so that both always say the same.

This runs in one event loop and never blocks it: files and digests are done in threads.
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
from ttt_e2e.server.loading import Loader
from ttt_e2e.server.records import NoSession, SessionRecord, Stopping, TooMuch
from ttt_e2e.server.store import Record, Store
from ttt_e2e.server.worker import Job

_T = TypeVar("_T")


@dataclass(eq=False)
class Entry:
    """A session on the shelf; changed by `Shelf` alone, but for `jobs` and `turn`.

    value: None where it is on disk only. error: why its file cannot be used; there is no info then. jobs: those at work
    on it, which fail when it is deleted. turn: held by what is to change it. disk: held by what touches its file.
    """

    record: Record
    info: SessionInfo | None
    value: Session | None = None
    error: str | None = None
    deleted: bool = False
    jobs: set[Job] = field(default_factory=set)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    disk: asyncio.Lock = field(default_factory=asyncio.Lock)

    def told(self) -> SessionRecord:
        """What there is to know of it."""
        record, info = self.record, self.info
        if info is None:
            return SessionRecord(record.id, record.created, 0, None, "", 0, False, False, self.error)
        return SessionRecord(
            record.id,
            record.created,
            info.tokens,
            info.text_bytes,
            info.text_digest,
            info.memory_bytes,
            info.learn,
            self.value is not None,
        )


class Shelf:
    """The sessions in a store, all made as `fresh` is. store: opened; `close` closes it.

    memory_bytes: of sessions in memory; beyond, those used longest ago are on disk only. max_sessions: of an owner.
    """

    def __init__(self, fresh: Session, store: Store, memory_bytes: int, max_sessions: int) -> None:
        self.fresh, self.store = fresh, store
        self.memory_bytes, self.max_sessions = memory_bytes, max_sessions
        self._entries: dict[str, Entry] = {}
        self._recent: dict[str, Entry] = {}  # those in memory, from the one used longest ago on
        self._making: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by owner
        self._changes: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def open(self) -> None:
        """Find what is in the store. Raises UserError if the model is not fit for use."""

        def found() -> list[Entry]:
            self._loader = Loader(self.fresh)
            return [self._found(record) for record in self.store.records()]

        self._entries = {entry.record.id: entry for entry in await asyncio.to_thread(found)}

    async def close(self) -> None:
        """Let changes under way end, and change nothing any more."""
        self._closed = True
        while self._changes:
            await asyncio.wait(self._changes)
        self.store.close()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def in_memory(self) -> int:
        """How many sessions are in memory."""
        return len(self._recent)

    @property
    def bytes_in_memory(self) -> int:
        """How much memory those take."""
        return sum(entry.info.memory_bytes for entry in self._recent.values() if entry.info)

    def entry(self, owner: str, id: str) -> Entry:
        """The session of that name. Raises NoSession if the owner has none."""
        entry = self._entries.get(id)
        if entry is None or entry.record.owner != owner:
            raise NoSession
        return entry

    def entries(self, owner: str) -> list[Entry]:
        """All of an owner, the oldest first."""
        return [entry for entry in self._entries.values() if entry.record.owner == owner]

    async def value(self, entry: Entry, *, settled: bool = False) -> Session:
        """The session as it is now, from disk if it is not in memory; settled: after a change that is under way.

        Raises NoSession if it was deleted, and UserError if its file is not there or damaged.
        """
        value = entry.value
        if value is None or settled:
            async with entry.disk:
                if entry.deleted:
                    raise NoSession
                if entry.value is None:
                    entry.value = await asyncio.to_thread(self._loaded, entry)
                value = entry.value
        self._use(entry)
        return value

    async def load(self, path: Path) -> Session:
        """A session from a file that comes from anywhere. Raises UserError unless it is a sound one of this model."""
        return await asyncio.to_thread(self._loader.load, path, "The file")

    async def add(self, owner: str, value: Session | None = None) -> Entry:
        """A new session, a fresh one if None. Raises TooMuch if the owner has as many as can be."""

        def make() -> Entry:
            session = value or self.fresh
            return Entry(self.store.add(owner, session), session.info(), session)

        async def add() -> Entry:
            async with self._making[owner]:
                if len(self.entries(owner)) >= self.max_sessions:
                    raise TooMuch(f"There are {self.max_sessions} sessions, which is the limit; delete one first.")
                entry = await asyncio.to_thread(make)
                self._entries[entry.record.id] = entry
                self._use(entry)
                return entry

        return await self._whole(add())

    async def keep(self, entry: Entry, value: Session) -> SessionRecord:
        """Save what became of a session; then, and only then, it is the session."""

        def save() -> SessionInfo:
            self.store.save(entry.record.id, value)
            return value.info()

        async def keep() -> SessionRecord:
            async with entry.disk:
                if entry.deleted:
                    raise NoSession
                entry.info = await asyncio.to_thread(save)
                entry.value = value
                self._use(entry)
                return entry.told()

        return await self._whole(keep())

    async def delete(self, entry: Entry) -> None:
        """Forget a session; what is at work on it fails."""

        async def delete() -> None:
            async with entry.disk:
                if entry.deleted:
                    raise NoSession
                await asyncio.to_thread(self.store.delete, entry.record.id)
                entry.deleted = True
                del self._entries[entry.record.id]
                self._recent.pop(entry.record.id, None)
            for job in list(entry.jobs):
                job.fail(NoSession())

        await self._whole(delete())

    # -- inside ----------------------------------------------------------------------------------------------------

    def _found(self, record: Record) -> Entry:
        try:
            return Entry(record, self._loader.info_of(self.store.path(record.id), f"The session {record.id}"))
        except UserError as error:
            return Entry(record, None, error=str(error))

    def _loaded(self, entry: Entry) -> Session:
        return self._loader.load(self.store.path(entry.record.id), f"The session {entry.record.id}")

    def _use(self, entry: Entry) -> None:
        """Mark a session in memory as the one used last, and let go of others as far as memory demands."""
        if entry.deleted:
            return
        self._recent.pop(entry.record.id, None)
        self._recent[entry.record.id] = entry
        while self._recent and self.bytes_in_memory > self.memory_bytes:
            self._recent.pop(next(iter(self._recent))).value = None

    async def _whole(self, change: Coroutine[Any, Any, _T]) -> _T:
        """Do it to its end, even if whoever waits for it goes away."""
        if self._closed:
            change.close()
            raise Stopping
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # maybe nobody asks any more
        return await asyncio.shield(task)
