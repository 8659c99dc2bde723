"""A session of the registry: its record, what of it is in memory, and who uses it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from ttt_e2e.inference.session import Session
from ttt_e2e.server.engine.database import SessionRecord
from ttt_e2e.server.engine.records import (
    DamagedNotebookError,
    DamagedSessionError,
    NotebookSummary,
    SessionNotFoundError,
    SessionSummary,
)
from ttt_e2e.server.engine.store import NewNotebook
from ttt_e2e.server.engine.worker import PooledSession


@dataclass(eq=False)
class SessionSlot:
    """A session of the registry; only the registry and `SessionFiles` change it, apart from `pooled`.

    session: None while it is on disk only. fingerprint: of its file, when it was last known to hold what the record
    says. damaged: it was later found not to. notebook_fingerprint, notebook_damaged: likewise of its notebook. pooled:
    its copies in the worker's pool, which fail when it is deleted. write_lock: held by a request that is going to
    replace the session. file_lock: held while its files are read or written.
    """

    record: SessionRecord
    session: Session | None = None
    fingerprint: tuple[int | str, ...] = ()
    damaged: bool = False
    notebook_fingerprint: tuple[int, ...] = ()
    notebook_damaged: bool = False
    deleted: bool = False
    pooled: set[PooledSession] = field(default_factory=set)
    write_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    file_lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @asynccontextmanager
    async def using_files(self) -> AsyncIterator[None]:
        """Hold `file_lock` inside the block. Raises SessionNotFoundError if the session was deleted meanwhile."""
        async with self.file_lock:
            if self.deleted:
                raise SessionNotFoundError
            yield

    def summary(self) -> SessionSummary:
        """The session as clients see it."""
        id, created, info = self.record.id, int(self.record.created), self.record.info
        if self.damaged:
            return SessionSummary(id, created, error=str(DamagedSessionError()))
        size, in_memory, kept = info.memory_bytes, self.session is not None, self.record.notebook
        notebook = None if kept is None else NotebookSummary(kept.characters, kept.bytes, kept.documents)
        return SessionSummary(
            id,
            created,
            info.tokens,
            info.text_bytes,
            info.text_digest,
            size,
            info.learn,
            in_memory,
            str(DamagedNotebookError()) if self.notebook_damaged else None,
            notebook,
        )


Wanted = bool | NewNotebook | SessionSlot | None
"""The notebook that a new session is to have; see `SessionRegistry.create`."""
