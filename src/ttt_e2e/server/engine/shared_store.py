"""Sessions on storage that several replicas of the service share, each of which may fail at any moment.

A session has a folder there. `record.json` says who owns the session, how often it was changed, and which files beside
it are the current version's. Other files are never altered: a change writes new ones, and then replaces the record
under the condition that nobody else has (`Storage.swap`). From then on it is durable, and the former files go.

A replica that is going to change a session first puts its own name into the record, as its holder. Others wait until
it is gone again, or until the replica is: every replica writes a file in `replicas/` again and again, and whoever finds
one unchanged for `LEASE_SECONDS` takes over what it holds. A replica that was only paused loses nothing but the change
that it was making, because its record has been replaced: it cannot overwrite what its successor writes.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ttt_e2e.errors import UserError
from ttt_e2e.files import check_digest, check_format, file_digest, with_digest
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import SessionInfo, write_new_session_file
from ttt_e2e.retrieval.database import DATABASE
from ttt_e2e.server.engine.database import SessionRecord
from ttt_e2e.server.engine.records import DamagedSessionError, NotebookRecord, SessionNotFoundError, TakenOverError
from ttt_e2e.server.engine.storage import ConflictError, Storage, StorageError
from ttt_e2e.server.engine.store import ID, NewNotebook, new_id

BEAT_SECONDS, LEASE_SECONDS = 2.0, 10.0
FORMAT, VERSION = "shared store of sessions", 1
_MARKER, _RECORD, _REPLICAS = "store.json", "record.json", "replicas"
_MOST_COPIES = 8
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SharedRecord(SessionRecord):
    """A session of a shared store. file: its name there. info: as in the header of its file.

    document: name of the file with its document. generation: how often the record was replaced. holder: the replica
    that is changing the session. version: of the record's file.
    """

    document: str | None
    generation: int
    holder: str | None
    version: str | None = field(default=None, compare=False)


class SharedStore:
    """The sessions below `url`, a folder or s3://BUCKET/PREFIX; for the rest, what `Store` is to one process.

    Nothing is read or written before the first use, and every use may raise StorageError. holder: the name of this
    replica.
    """

    lost: str | None = None

    def __init__(self, url: str) -> None:
        self.storage = Storage(url)
        self.holder = f"{re.sub('[^0-9A-Za-z-]', '-', socket.gethostname())}-{os.getpid()}-{secrets.token_hex(8)}"
        self._checked = False
        self._closed, self._beating = threading.Event(), threading.Lock()
        self._seen: dict[str, tuple[str, float]] = {}  # of other replicas: their last beat, and when it was first seen
        self._mutex = threading.Lock()
        self._unreleased: dict[str, SharedRecord] = {}  # by id: held by nobody, though their records say otherwise
        self._copies: dict[str, _NotebookCopy] = {}  # by name, from the least to the most recently used

    # -- what `Store` has, too -----------------------------------------------------------------------------------------

    def add(
        self,
        owner: str,
        session: Session,
        document: str | None = None,
        id: str | None = None,
        notebook: NewNotebook | None = None,
    ) -> SharedRecord:
        """Save a new session. id: its id, if it has one already."""
        self._check()
        empty = SharedRecord(id or new_id(), owner, time.time(), "", 0, session.info(), None, None, 0, None)
        return self._commit(empty, self._upload(empty, session, document, notebook))

    def replace(
        self, record: SharedRecord, session: Session, document: str | None = None, notebook: NewNotebook | None = None
    ) -> SharedRecord:
        """Save the next version of a session, whole or not at all, and let it go; returns its record.

        document, notebook: None keeps what it has. Raises TakenOverError if the session has changed since `record`.
        """
        return self._commit(record, self._upload(record, session, document, notebook))

    def document(self, record: SharedRecord) -> str | None:
        """The document of a session, if it has one. Raises DamagedSessionError if it was altered."""
        if record.document is None:
            return None
        found = self.storage.read(record.document)
        if found is None or hashlib.sha256(found.content).hexdigest() not in record.document:
            current = self.find(record.owner, record.id)  # it may have been replaced in the meantime
            if current is None:
                raise SessionNotFoundError
            if current.document != record.document:
                return self.document(current)
            _log.error("The document %s in %s is missing or was altered.", record.document, self.storage.url)
            raise DamagedSessionError
        return found.content.decode()

    def set_document(self, record: SharedRecord, document: str) -> SharedRecord:
        """Save the document of a session, which stays as it is, and let it go. Errors as for `replace`."""
        return self._commit(record, replace(record, document=self._upload_document(record, document)))

    def delete(self, record: SharedRecord) -> None:
        """Delete a session, whoever holds it."""
        while (current := self.find(record.owner, record.id)) is not None:
            with suppress(ConflictError):
                self._swap(current, "deleted")
                self._remove(current.owner, current.id)
                return

    def path(self, record: SharedRecord) -> str:
        """The file with the current version of a session, for messages."""
        return f"{self.storage.url}/{record.file}"

    def local_file(self, record: SharedRecord) -> AbstractContextManager[Path]:
        """A copy of that file on this machine, inside the block. Raises FileNotFoundError if it was replaced."""
        return self.storage.local_copy(record.file)

    def fingerprint(self, record: SharedRecord) -> tuple[str]:
        """What is different for another version of a session; no file of one is ever altered."""
        return (record.file,)

    def notebook_path(self, notebook: NotebookRecord) -> str:
        """The file with a notebook, for messages."""
        return f"{self.storage.url}/{notebook.file}"

    @contextmanager
    def local_notebook(self, notebook: NotebookRecord) -> Iterator[Path]:
        """A folder of this machine with a copy of a notebook, inside the block.

        The copies used last stay for the next use. Raises FileNotFoundError if the notebook was replaced or altered.
        """
        with self._mutex:
            copy = self._copies.pop(notebook.file, None)
        copy = copy or self._copy(notebook)
        with self._mutex:
            self._copies[notebook.file] = copy
            while len(self._copies) > _MOST_COPIES:
                del self._copies[next(iter(self._copies))]
        yield copy.folder

    def check_in_place(self) -> None:
        """Nothing: the storage may come back."""

    @contextmanager
    def temporary_folder(self) -> Iterator[Path]:
        """A folder of this machine that exists inside the block."""
        with tempfile.TemporaryDirectory(prefix="ttt-e2e-") as folder:
            yield Path(folder)

    def close(self) -> None:
        """Tell other replicas that this one holds nothing any more."""
        self._closed.set()
        self._copies.clear()
        with suppress(UserError), self._beating:  # a beat that is under way would come after this
            self.storage.remove([f"{_REPLICAS}/{self.holder}"])

    # -- finding sessions ----------------------------------------------------------------------------------------------

    def find(self, owner: str, id: str) -> SharedRecord | None:
        """The current record of a session, or None if the owner has no such session."""
        self._check()
        if not re.fullmatch(ID, id):
            return None
        name = f"{_folder(owner, id)}/{_RECORD}"
        found = self.storage.read(name)
        if found is None:
            self._check_marker()
            return None
        return self._parse(name, found.content, found.version)

    def records_of(self, owner: str) -> list[SharedRecord]:
        """The records of an owner's sessions, the oldest first, without damaged ones."""
        contents = self.storage.read_all(self._record_names(owner))
        records = []
        for name, content in contents.items():
            with suppress(DamagedSessionError):  # which is in the log
                records.append(self._parse(name, content, None))
        return sorted((one for one in records if one is not None), key=lambda one: (one.created, one.id))

    def count(self, owner: str) -> int:
        """How many sessions an owner has."""
        return len(self._record_names(owner))

    # -- who holds a session -------------------------------------------------------------------------------------------

    def claim(self, record: SharedRecord) -> SharedRecord:
        """Hold a session, and take it over if another replica does; returns its record. Raises ConflictError."""
        claimed = self._swap(replace(record, holder=self.holder))
        if record.holder not in (None, self.holder):
            _log.warning("%s has taken over the session %s from %s.", self.holder, record.id, record.holder)
            kept = {f"{_folder(record.owner, record.id)}/{_RECORD}", *_files(record)}
            self.storage.remove([n for n in self.storage.names(_folder(record.owner, record.id)) if n not in kept])
        return claimed

    def release(self, record: SharedRecord) -> SharedRecord:
        """Let a session go that was not changed. Raises ConflictError if it has been taken over.

        While the storage is away, the thread that `start_beating` starts tries again.
        """
        try:
            return self._swap(replace(record, holder=None))
        except StorageError:
            self._unreleased[record.id] = record
            raise

    def is_gone(self, holder: str) -> bool:
        """Whether a replica has ended, or has not been heard of for `LEASE_SECONDS`, by this machine's clock."""
        found = self.storage.read(f"{_REPLICAS}/{holder}")
        if found is None:
            return True
        with self._mutex:
            version, since = self._seen.get(holder, ("", 0.0))
            if version != found.version:
                self._seen[holder] = found.version, time.monotonic()
                return False
        return time.monotonic() - since > LEASE_SECONDS

    def beat(self) -> None:
        """Tell other replicas that this one lives."""
        self.storage.write(f"{_REPLICAS}/{self.holder}", secrets.token_bytes(16))

    def start_beating(self) -> None:
        """Do so until the store is closed, in a thread."""

        def run() -> None:
            while not self._closed.wait(BEAT_SECONDS):
                with suppress(UserError):  # requests will meet the same error and tell it
                    with self._beating:
                        if not self._closed.is_set():
                            self.beat()
                    for id, record in list(self._unreleased.items()):
                        with suppress(ConflictError):  # it is held anew, by whomever
                            self._swap(replace(record, holder=None))
                        if self._unreleased[id] is record:  # else it was held anew by this replica, and not released
                            del self._unreleased[id]

        with suppress(UserError):
            self._check()
            self.beat()
        threading.Thread(target=run, name="ttt-e2e-beat", daemon=True).start()

    # ------------------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """On the first use, find out whether the storage can be used, and mark it as a store of sessions."""
        if self._checked:
            return
        marker = self.storage.read(_MARKER)
        if marker is None:
            self.storage.check_swaps()
            with suppress(ConflictError):  # another replica was faster
                self.storage.swap(_MARKER, json.dumps({"format": FORMAT, "version": VERSION}).encode(), None)
        else:
            where = Path(f"{self.storage.url}/{_MARKER}")
            check_format(_json(marker.content), where, FORMAT, VERSION, "name another place for sessions")
        self._checked = True

    def _check_marker(self) -> None:
        if self.storage.read(_MARKER) is None:
            message = f"{self.storage.url} has lost its {_MARKER}, and perhaps its sessions; put back what was there."
            raise StorageError(message)

    def _record_names(self, owner: str) -> list[str]:
        self._check()
        names = [name for name in self.storage.names(_folder(owner)) if name.endswith(f"/{_RECORD}")]
        if not names:
            self._check_marker()
        return names

    def _parse(self, name: str, content: bytes, version: str | None) -> SharedRecord | None:
        """The record in a file, or None if the session is deleted. Raises DamagedSessionError."""
        values = _json(content)
        try:
            check_digest(values, Path(name))
            if values["state"] == "deleted":
                return None
            info = SessionInfo.from_facts(values["info"])
            notebook = values["notebook"] and NotebookRecord(**values["notebook"])
            plain = {key: values[key] for key in _PLAIN}
            return SharedRecord(**plain, info=info, notebook=notebook, version=version)
        except (UserError, KeyError) as error:
            _log.error("The record %s/%s is damaged.", self.storage.url, name)
            raise DamagedSessionError from error

    def _swap(self, record: SharedRecord, state: str = "sound") -> SharedRecord:
        """Put `record` in place of the one whose version it has; returns it as it is then. Raises ConflictError."""
        record = replace(record, generation=record.generation + 1)
        values = {key: getattr(record, key) for key in _PLAIN} | {"info": record.info.to_facts(), "state": state}
        values["notebook"] = record.notebook and asdict(record.notebook)
        content = json.dumps(with_digest({**values, "writer": f"{self.holder}/{secrets.token_hex(8)}"})).encode()
        name = f"{_folder(record.owner, record.id)}/{_RECORD}"
        return replace(record, version=self.storage.swap(name, content, record.version))

    def _commit(self, old: SharedRecord, new: SharedRecord) -> SharedRecord:
        """Put a record with new files in place of the old one, and remove the files that it had."""
        written = [file for file in _files(new) if file not in _files(old)]
        try:
            committed = self._swap(replace(new, holder=None))
        except ConflictError as error:
            with suppress(UserError):
                self.storage.remove(written)
            raise (TakenOverError if self.find(old.owner, old.id) else SessionNotFoundError)() from error
        # Not after other errors: whether the record is there is unknown.
        try:
            self._remove_files([file for file in _files(old) if file not in _files(new)])
        except UserError as error:
            _log.warning("Files of a former version of %s could not be removed: %s", old.id, error)
        return committed

    def _upload(
        self, record: SharedRecord, session: Session, document: str | None, notebook: NewNotebook | None = None
    ) -> SharedRecord:
        facts, tensors = session.pack()
        name = f"{_folder(record.owner, record.id)}/{secrets.token_hex(8)}.session"
        with self.storage.new_file(name) as path:
            write_new_session_file(path, facts, tensors)
            size = path.stat().st_size
        text = record.document if document is None else self._upload_document(record, document)
        kept = record.notebook if notebook is None else self._upload_notebook(record, notebook)
        return replace(record, file=name, size=size, info=SessionInfo.from_facts(facts), document=text, notebook=kept)

    def _upload_document(self, record: SharedRecord, document: str) -> str:
        content = document.encode()
        digest = hashlib.sha256(content).hexdigest()
        name = f"{_folder(record.owner, record.id)}/{secrets.token_hex(8)}-{digest}.json"
        self.storage.write(name, content)
        return name

    def _upload_notebook(self, record: SharedRecord, notebook: NewNotebook) -> NotebookRecord:
        name = f"{_folder(record.owner, record.id)}/{secrets.token_hex(8)}.notebook"
        with self.storage.new_file(name) as path:
            shutil.copyfile(notebook.folder / DATABASE, path)
        return replace(notebook.record, file=name)

    def _copy(self, notebook: NotebookRecord) -> "_NotebookCopy":
        copy = _NotebookCopy()
        with self.storage.local_copy(notebook.file) as path:
            shutil.copyfile(path, copy.folder / DATABASE)
        if file_digest(copy.folder / DATABASE) != notebook.digest:
            raise FileNotFoundError(notebook.file)
        return copy

    def _remove_files(self, names: list[str]) -> None:
        with self._mutex:
            for name in names:
                self._copies.pop(name, None)
        self.storage.remove(names)

    def _remove(self, owner: str, id: str) -> None:
        """Remove all files of a deleted session, its record as the last one."""
        record = f"{_folder(owner, id)}/{_RECORD}"
        try:
            self._remove_files([name for name in self.storage.names(_folder(owner, id)) if name != record])
            self.storage.remove([record])
        except UserError as error:
            _log.warning("Files of the deleted session %s could not be removed: %s", id, error)


_PLAIN = ("id", "owner", "created", "file", "size", "document", "generation", "holder")


class _NotebookCopy:
    """A notebook in a temporary folder, which is removed when nobody uses this object any more."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ttt-e2e-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


def _files(record: SharedRecord) -> list[str]:
    """The files of a session beside its record."""
    return [file for file in (record.file, record.document, record.notebook and record.notebook.file) if file]


def _folder(owner: str, *id: str) -> str:
    return "/".join(("sessions", quote(owner, safe="").replace(".", "%2E"), *id))


def _json(content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except ValueError:
        values = None
    return values if isinstance(values, dict) else {}
