"""The sessions of a shared store: what a replica knows of them is a cache; it asks the store before every use."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from weakref import WeakValueDictionary

from ttt_e2e.inference.session import Session
from ttt_e2e.server.engine.records import (
    DamagedNotebookError,
    DamagedSessionError,
    NotebookRecord,
    SessionNotFoundError,
    SessionSummary,
    StoppingError,
)
from ttt_e2e.server.engine.registry import SessionRegistry, completed
from ttt_e2e.server.engine.session_files import SessionFiles
from ttt_e2e.server.engine.shared_store import SharedRecord, SharedStore
from ttt_e2e.server.engine.slot import SessionSlot, Wanted
from ttt_e2e.server.engine.storage import ConflictError, StorageError
from ttt_e2e.server.engine.store import NewNotebook

_POLL_SECONDS = 0.2  # while another replica changes a session


class SharedSessionFiles(SessionFiles):
    """`SessionFiles` over a `SharedStore`: another replica may replace a session while its files are read."""

    _store: SharedStore

    def _find_sessions(self) -> list[SessionSlot]:
        """None: only those in use have slots. Other replicas are told of this one."""
        self._store.start_beating()
        return []

    def load(self, slot: SessionSlot) -> Session:
        """The session of a slot; if another replica replaces it meanwhile, its next version."""
        while True:
            record = _record(slot)
            try:
                return super().load(slot)
            except FileNotFoundError as error:
                if not self._was_replaced(slot, record):
                    self._set_damaged(slot, "it is missing")
                    raise DamagedSessionError from error

    @contextmanager
    def _checked_notebook(self, slot: SessionSlot) -> Iterator[Path]:
        with ExitStack() as stack:
            while True:
                record = _record(slot)
                try:
                    folder = stack.enter_context(super()._checked_notebook(slot))
                    break
                except FileNotFoundError as error:
                    if not self._was_replaced(slot, record):
                        self._set_notebook_damaged(slot, "it is missing, or was altered")
                        raise DamagedNotebookError from error
            yield folder

    @contextmanager
    def _notebook_of_new(self, notebook: Wanted) -> Iterator[NotebookRecord | NewNotebook | None]:
        if isinstance(notebook, SessionSlot) and notebook.record.notebook:
            with self._checked_notebook(notebook) as folder:  # a copy: files in a session's folder are its own
                yield NewNotebook(folder, notebook.record.notebook)
        else:
            with super()._notebook_of_new(notebook) as new:
                yield new

    def _was_replaced(self, slot: SessionSlot, record: SharedRecord) -> bool:
        """Whether another replica has replaced this version of a session; the slot has its successor then."""
        found = self._store.find(record.owner, record.id)
        if found is None:
            raise SessionNotFoundError
        if found.file == record.file:
            return False
        _adopt(slot, found)
        return True


class SharedRegistry(SessionRegistry):
    """A `SessionRegistry` over a `SharedStore`. Its methods also raise StorageError, and TakenOverError for changes.

    max_sessions: can be exceeded by requests that replicas serve at the same moment.
    """

    store: SharedStore
    _files_type = SharedSessionFiles

    async def open(self) -> None:
        """Prepare the model, and tell other replicas of this one."""
        self._slots = WeakValueDictionary()  # of sessions that are in memory or in use
        await super().open()

    async def slot(self, owner: str, id: str) -> SessionSlot:
        """The slot of a session, with its current record."""
        record = await asyncio.to_thread(self.store.find, owner, id)
        if record is None:
            if (gone := self._slots.pop(id, None)) is not None:
                self._in_memory.pop(id, None)
                gone.deleted = True
            raise SessionNotFoundError
        slot = self._slots.setdefault(id, SessionSlot(record))
        _adopt(slot, record)
        return slot

    async def summaries(self, owner: str) -> list[SessionSummary]:
        """All sessions of an owner, the oldest first."""
        summaries = []
        for record in await asyncio.to_thread(self.store.records_of, owner):
            slot = self._slots.get(record.id)
            known = slot is not None and slot.record.file == record.file
            summaries.append((slot if slot and known else SessionSlot(record)).summary())
        return summaries

    async def session(self, slot: SessionSlot, *, for_change: bool = False) -> Session:
        """The current version of a session; see `SessionRegistry.session`."""
        session = await super().session(slot, for_change=for_change)
        if slot.fingerprint != self.store.fingerprint(_record(slot)):
            slot.session = None  # another replica has replaced it while it was loaded
        return session

    @asynccontextmanager
    async def changing(self, slot: SessionSlot) -> AsyncIterator[None]:
        """Hold a session inside the block, in which it is replaced once at most: no other replica changes it."""
        async with super().changing(slot):
            try:
                while not await self._claim(slot):
                    await asyncio.sleep(_POLL_SECONDS)
                yield
            finally:  # also of a claim whose request was cancelled meanwhile
                with suppress(StorageError, StoppingError):  # the store, or its end, will release it
                    await self._release(slot)

    @completed
    async def _claim(self, slot: SessionSlot) -> bool:
        """Whether this replica holds a session now."""
        async with slot.file_lock:
            record = await asyncio.to_thread(self.store.find, slot.record.owner, slot.record.id)
            if record is None:
                raise SessionNotFoundError
            if record.holder is not None and record.holder != self.store.holder:  # noqa: SIM102
                if not await asyncio.to_thread(self.store.is_gone, record.holder):
                    return False
            with suppress(ConflictError):
                _adopt(slot, await asyncio.to_thread(self.store.claim, record))
                return True
            return False

    @completed
    async def _release(self, slot: SessionSlot) -> None:
        """Let a session go, unless that was done with its new version."""
        async with slot.file_lock:
            record = _record(slot)
            if record.holder == self.store.holder and not slot.deleted:
                with suppress(ConflictError):  # it was taken over, or deleted
                    _adopt(slot, await asyncio.to_thread(self.store.release, record))

    async def _count(self, owner: str) -> int:
        return await asyncio.to_thread(self.store.count, owner)


def _record(slot: SessionSlot) -> SharedRecord:
    assert isinstance(slot.record, SharedRecord)
    return slot.record


def _adopt(slot: SessionSlot, record: SharedRecord) -> None:
    """Give a slot a record of its session, unless it has a newer one."""
    if record.generation >= _record(slot).generation:
        if record.file != slot.record.file:
            slot.session, slot.damaged = None, False
        if record.notebook != slot.record.notebook:
            slot.notebook_damaged = False
        slot.record = record
