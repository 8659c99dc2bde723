"""The files behind the sessions of a registry: whether they hold what was saved, and what is read and made of them.

All this blocks, so that the registry calls it in threads. While it does, it holds the `file_lock` of the session.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ttt_e2e.errors import UserError
from ttt_e2e.files import file_digest
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import write_new_session_file
from ttt_e2e.retrieval.database import DATABASE
from ttt_e2e.retrieval.index_digest import AlteredNotebookError
from ttt_e2e.retrieval.notebook import Notebook
from ttt_e2e.server.engine import notebooks
from ttt_e2e.server.engine.database import SessionRecord
from ttt_e2e.server.engine.loading import SessionLoader
from ttt_e2e.server.engine.records import (
    DamagedNotebookError,
    DamagedSessionError,
    NotebookRecord,
    SessionNotFoundError,
    StoppingError,
)
from ttt_e2e.server.engine.shared_store import SharedStore
from ttt_e2e.server.engine.slot import SessionSlot, Wanted
from ttt_e2e.server.engine.store import NewNotebook, Store, file_fingerprint

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

Saved = tuple[SessionRecord, tuple[int | str, ...]]
"""The record of a session that was saved, and the fingerprint of its file."""


class SessionFiles:
    """The files in a store, for sessions with the model, tokenizer, dtype and `learn` of `template`.

    `limits` are those of notebooks. Once `closed` is set, no more temporary folders are made.
    """

    def __init__(self, template: Session, store: Store | SharedStore, limits: notebooks.Limits) -> None:
        self.closed = False
        self._template, self._limits = template, limits
        self._store: Any = store  # the two are used in the same way, with records of their own

    def open(self) -> list[SessionSlot]:
        """The sessions in the store. Raises UserError if the model is not fit for use."""
        self._loader = SessionLoader(self._template)
        return self._find_sessions()

    @contextmanager
    def temporary_folder(self) -> Iterator[Path]:
        """A folder of the store that exists inside the block; see `Store.temporary_folder`."""
        if self.closed:
            raise StoppingError
        with self._store.temporary_folder() as folder:
            yield folder

    # -- sessions ------------------------------------------------------------------------------------------------------

    def add(self, owner: str, session: Session, document: str | None, id: str | None, notebook: Wanted) -> Saved:
        """Save a new session; see `SessionRegistry.create`."""
        with self._notebook_of_new(notebook) as new:
            return self._saved(self._store.add(owner, session, document, id, new))

    def replace(
        self, record: SessionRecord, session: Session, document: str | None, notebook: NewNotebook | None
    ) -> Saved:
        """Save the next version of a session; None keeps the document or notebook that it has."""
        return self._saved(self._store.replace(record, session, document, notebook))

    def load(self, slot: SessionSlot) -> Session:
        """The session of a slot: that in memory, unless somebody has touched the file. Then it is read and checked."""
        record, session = slot.record, slot.session  # a replica learns of another one's version at any moment
        name, info = f"The session {record.id}", record.info
        fingerprint = self._store.fingerprint(record)
        if session and fingerprint == slot.fingerprint:
            return session
        try:
            with self._store.local_file(record) as path:
                if self._loader.read_info(path, name) != info:
                    raise UserError(f"{name} was replaced by another.")
                session = self._loader.load(path, name)
        except UserError as error:
            self._store.check_in_place()  # or all files are missing
            served = self._loader.info
            if (info.model, info.learn, info.dtype) != (served.model, served.learn, served.dtype):
                raise
            self._set_damaged(slot, str(error))
            raise DamagedSessionError from error
        slot.fingerprint, slot.damaged = fingerprint, False
        return session

    def unpack(self, source: Path, folder: Path) -> tuple[Session, Path | None]:
        """The session in an untrusted file, and the notebook beside it if it is a tar, unpacked to `folder`."""
        file, notebook = source, None
        if notebooks.is_archive(source):
            file, notebook = notebooks.unpack_archive(source, folder, self._limits)
        return self._loader.load(file, "The file"), notebook

    def export(self, session: Session, target: Path) -> None:
        """Write a session to the new file `target`."""
        # Not `Session.save`, which would create a folder that was removed under the service.
        write_new_session_file(target, *session.pack())

    def export_with_notebook(self, slot: SessionSlot, target: Path) -> None:
        """Write a session with its notebook to the new file `target`, a tar."""
        while True:
            file, session = slot.record.file, self.load(slot)
            with self._checked_notebook(slot) as notebook, self.temporary_folder() as folder:
                if slot.record.file == file:  # else another replica has replaced both
                    self.export(session, folder / "one.session")
                    notebooks.write_archive(target, slot.record.id, folder / "one.session", notebook)
                    return

    def _find_sessions(self) -> list[SessionSlot]:
        slots = []
        for record in self._store.records():
            slot = SessionSlot(record)
            path = self._store.path(record)
            if not path.is_file() or path.stat().st_size != record.size:
                self._set_damaged(slot, "it is missing, or its size has changed")
            if record.notebook and not (self._store.notebook_path(record.notebook) / DATABASE).is_file():
                self._set_notebook_damaged(slot, "it is missing")
            slots.append(slot)
        return slots

    def _saved(self, record: SessionRecord) -> Saved:
        return record, self._store.fingerprint(record)

    def _set_damaged(self, slot: SessionSlot, reason: str) -> None:
        if not slot.damaged:
            slot.damaged = True
            _log.error("The file %s is damaged: %s", self._store.path(slot.record), reason)

    # -- notebooks -----------------------------------------------------------------------------------------------------

    def search(self, slot: SessionSlot, search: Callable[[Notebook], _T]) -> _T:
        """What `search` finds in the notebook of a session."""
        with (
            self._notebook_errors(slot),
            self._checked_notebook(slot) as folder,
            Notebook(folder, create=False) as notebook,
        ):
            return search(notebook)

    def record(self, slot: SessionSlot, target: Path, text: notebooks.NotebookText) -> NewNotebook:
        """The notebook of a session with a text added, in the new folder `target`."""
        with self._notebook_errors(slot), self._checked_notebook(slot) as folder:
            assert slot.record.notebook is not None
            return notebooks.make_notebook(target, self._limits, [text], (folder, slot.record.notebook))

    def import_notebook(self, source: Path, target: Path) -> NewNotebook:
        """A notebook with the text of an untrusted one, in the new folder `target`."""
        return notebooks.import_notebook(source, target, self._limits)

    @contextmanager
    def _notebook_of_new(self, notebook: Wanted) -> Iterator[NotebookRecord | NewNotebook | None]:
        """The notebook that a new session gets; see `SessionRegistry.create`."""
        if isinstance(notebook, SessionSlot):
            yield notebook.record.notebook  # which they share from then on
        elif notebook is True:
            with self.temporary_folder() as folder:
                yield notebooks.make_notebook(folder / "notebook", self._limits, ())
        else:
            yield notebook or None

    @contextmanager
    def _checked_notebook(self, slot: SessionSlot) -> Iterator[Path]:
        """The notebook of a session, for reading inside the block.

        Raises DamagedNotebookError unless it is the one that was saved.
        """
        notebook = slot.record.notebook
        assert notebook is not None
        with self._store.local_notebook(notebook) as folder:
            found = file_fingerprint(folder / DATABASE)
            if found != slot.notebook_fingerprint or not found:
                if not found or file_digest(folder / DATABASE) != notebook.digest:
                    if slot.deleted:
                        raise SessionNotFoundError
                    self._store.check_in_place()  # or all files are missing
                    self._set_notebook_damaged(slot, "it is missing, or was altered")
                    raise DamagedNotebookError
                slot.notebook_fingerprint, slot.notebook_damaged = found, False
            yield folder

    @contextmanager
    def _notebook_errors(self, slot: SessionSlot) -> Iterator[None]:
        """Make a DamagedNotebookError of what `Notebook` says of a damaged one, with its path."""
        try:
            yield
        except AlteredNotebookError as error:
            self._set_notebook_damaged(slot, str(error))
            raise DamagedNotebookError from error
        except UserError as error:
            if slot.deleted:
                raise SessionNotFoundError from error
            raise

    def _set_notebook_damaged(self, slot: SessionSlot, reason: str) -> None:
        if not slot.notebook_damaged:
            slot.notebook_damaged = True
            assert slot.record.notebook is not None
            _log.error("The notebook %s is damaged: %s", self._store.notebook_path(slot.record.notebook), reason)
