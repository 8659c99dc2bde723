"""Sessions on disk: a folder with two files per session, which stays consistent after a `kill -9` at any moment.

`ID.json` says who owns the session. `ID.session` is the session, as `Session.save` writes it. The record is written
after a new session's file and removed before a deleted one's, so the file behind a record is always complete. Meanwhile
a third file, `ID.changing`, exists; a session file that has one but no record is a leftover. Session files on their way
in or out lie in folders `.tmp-*`. Any other file is left alone, including a session file that somebody has put there.
"""

import json
import logging
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ttt_e2e.errors import UserError
from ttt_e2e.files import lock_folder, remove_stale_parts, sync, write_text
from ttt_e2e.inference.session import Session

_TEMPORARY = ".tmp-"
_ID = re.compile(r"sess-[0-9a-f]{32}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SessionRecord:
    """The content of `ID.json`. id: "sess-" and 32 hex digits. created: Unix time."""

    id: str
    owner: str
    created: float


class Store:
    """The sessions in `folder`, which is created if it is missing, readable by its owner only.

    One process can open a store at a time. Opening it removes what killed processes left behind. Raises UserError.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = lock_folder(
                self.folder, f"The sessions in {self.folder} are in use by another process; stop it first."
            )
        except OSError as error:
            raise UserError(f"Cannot keep sessions in {self.folder}: {error.strerror}; name another folder.") from error
        remove_stale_parts(self.folder)
        for path in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)
        for marker in self.folder.glob("sess-*.changing"):
            if not self._record_path(marker.stem).exists():
                self.path(marker.stem).unlink(missing_ok=True)
            marker.unlink()
        for path in self.folder.glob("*.session"):
            if _ID.fullmatch(path.stem) and not self._record_path(path.stem).exists():
                _log.warning("%s has no record, so it belongs to nobody; it is left alone. Import it to use it.", path)

    def records(self) -> list[SessionRecord]:
        """All records, the oldest first. Skips damaged ones with a warning and leaves their files alone."""
        records = []
        for path in self.folder.glob("*.json"):
            if not _ID.fullmatch(path.stem):
                continue
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                record = SessionRecord(content["id"], content["owner"], float(content["created"]))
                if record.id != path.stem or not isinstance(record.owner, str):
                    raise ValueError("it belongs to another session")
                if not 0 <= record.created < 1 << 40:
                    raise ValueError(f"{record.created} is not a time of creation")
                records.append(record)
            except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
                _log.warning("The record %s is damaged (%s); its session is left alone.", path, error)
        return sorted(records, key=lambda record: (record.created, record.id))

    def path(self, id: str) -> Path:
        """The session file of a record."""
        return self.folder / f"{id}.session"

    def add(self, owner: str, session: Session) -> SessionRecord:
        """Save a new session. Raises UserError if the disk is full or not writable."""
        record = SessionRecord(f"sess-{secrets.token_hex(16)}", owner, time.time())
        with self._changing(record.id):
            session.save(self.path(record.id))
            try:
                write_text(self._record_path(record.id), json.dumps(asdict(record)) + "\n")
            except BaseException:
                self.path(record.id).unlink(missing_ok=True)
                raise
        return record

    def save(self, id: str, session: Session) -> None:
        """Replace a session's file, whole or not at all. Raises UserError if the disk is full or not writable."""
        session.save(self.path(id))

    def delete(self, id: str) -> None:
        """Delete a session. Raises UserError, and changes nothing, if the folder is not writable."""
        with self._changing(id):
            try:
                self._record_path(id).unlink()
            except OSError as error:
                raise UserError(f"Cannot delete the session {id}: {error.strerror}.") from error
            try:
                self.path(id).unlink(missing_ok=True)
                sync(self.folder)  # a power cut must not bring it back
            except OSError as error:
                _log.warning("The file of the deleted session %s could not be removed: %s", id, error)

    def close(self) -> None:
        """Release the store for other processes."""
        self._lock.close()

    @contextmanager
    def temporary_folder(self) -> Iterator[Path]:
        """A folder that exists inside the block. If this process is killed, the next one removes it."""
        try:
            folder = tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=self.folder)
        except OSError as error:
            raise UserError(f"Cannot write to {self.folder}: {error.strerror}.") from error
        with folder as path:
            yield Path(path)

    def _record_path(self, id: str) -> Path:
        return self.folder / f"{id}.json"

    @contextmanager
    def _changing(self, id: str) -> Iterator[None]:
        """Mark a session as being created or deleted inside the block."""
        marker = self.folder / f"{id}.changing"
        with suppress(OSError):  # deleting must work on a full disk, too
            marker.touch(mode=0o600)
        try:
            yield
        finally:
            if self.path(id).exists() <= self._record_path(id).exists():  # else the next start removes the leftover
                marker.unlink(missing_ok=True)
