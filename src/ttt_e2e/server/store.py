"""Sessions on disk: a folder with two files a session, which a `kill -9` at any moment leaves whole.

`ID.json` says whose the session is; it is written once. `ID.session` is the session itself, as `Session.save` writes
it. Where both are made, the record comes last, and where both go, it goes first: so what has a record is whole. While
that is done there is a third file, `ID.changing`; a session beside it without a record is a leftover. Session files
that come in or go out lie in `.tmp-*` meanwhile. Other files are nobody's business, a session file that somebody has
put here included.

All of this works on files and blocks; it knows no event loop.
"""

import fcntl
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
from ttt_e2e.files import sync, write_text
from ttt_e2e.inference.session import Session

_TEMPORARY = ".tmp-"
_ID = re.compile(r"sess-[0-9a-f]{32}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """What is written down once of a session. id: "sess-" and 32 hex digits. created: Unix time."""

    id: str
    owner: str
    created: float


class Store:
    """The sessions in `folder`, which is made if it is not there, for its owner's eyes only.

    One process has a store at a time, until `close` or its end. Opening it removes what killed processes left behind.
    Raises UserError if another process has it, or if it cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("ab")
        except OSError as error:
            raise UserError(f"Cannot keep sessions in {self.folder}: {error.strerror}; name another folder.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise UserError(f"The sessions in {self.folder} are in use by another process; end it first.") from error
        for left in self.folder.glob(".sess-*.part"):  # by a process that was killed while it wrote beside the place
            left.unlink()
        for left in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True)
        for marker in self.folder.glob("sess-*.changing"):
            if not marker.with_suffix(".json").exists():
                self.path(marker.stem).unlink(missing_ok=True)
            marker.unlink()
        for path in self.folder.glob("*.session"):
            if _ID.fullmatch(path.stem) and not path.with_suffix(".json").exists():
                _log.warning("%s has no record and belongs to nobody; it is left where it is, import it.", path)

    def records(self) -> list[Record]:
        """What is there, the oldest first. A record that cannot be read is left out with a warning, and kept."""
        records = []
        for path in self.folder.glob("*.json"):
            if not _ID.fullmatch(path.stem):
                continue
            try:
                record = Record(**json.loads(path.read_text(encoding="utf-8")))
                if record.id != path.stem or not isinstance(record.owner, str):
                    raise ValueError("it is the record of another session")
                created = float(record.created)
                if not 0 <= created < 1 << 40:
                    raise ValueError(f"it was not made at {created}")
                records.append(Record(record.id, record.owner, created))
            except (OSError, ValueError, TypeError, OverflowError) as error:
                _log.warning("The record %s is damaged (%s); its session is left where it is.", path, error)
        return sorted(records, key=lambda record: (record.created, record.id))

    def path(self, id: str) -> Path:
        """Where the session of a record is."""
        return self.folder / f"{id}.session"

    def add(self, owner: str, session: Session) -> Record:
        """Keep a new session. Raises UserError if the disk is full or not writable."""
        record = Record(f"sess-{secrets.token_hex(16)}", owner, time.time())
        with self._changing(record.id):
            session.save(self.path(record.id))
            try:
                write_text(self.folder / f"{record.id}.json", json.dumps(asdict(record)) + "\n")
            except BaseException:
                self.path(record.id).unlink(missing_ok=True)
                raise
        return record

    def save(self, id: str, session: Session) -> None:
        """Keep what became of a session, or all as it was. Raises UserError if the disk is full or not writable."""
        session.save(self.path(id))

    def delete(self, id: str) -> None:
        """Forget a session. Raises UserError if the folder is not writable; the session is then as it was."""
        with self._changing(id):
            try:
                (self.folder / f"{id}.json").unlink()
            except OSError as error:
                raise UserError(f"Cannot delete the session {id}: {error.strerror}.") from error
            try:
                self.path(id).unlink(missing_ok=True)
                sync(self.folder)  # so that no power cut brings it back
            except OSError as error:
                _log.warning("The file of the deleted session %s could not be removed: %s", id, error)

    @contextmanager
    def temporary_folder(self) -> Iterator[Path]:
        """A folder that is there inside the block; of a process that is killed, the next one removes it."""
        try:
            folder = tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=self.folder)
        except OSError as error:
            raise UserError(f"Cannot write to {self.folder}: {error.strerror}.") from error
        with folder as path:
            yield Path(path)

    @contextmanager
    def _changing(self, id: str) -> Iterator[None]:
        """While a session comes or goes."""
        marker = self.folder / f"{id}.changing"
        with suppress(OSError):  # where not even that can be written, a deletion must still be possible
            marker.touch(mode=0o600)
        try:
            yield
        finally:
            if self.path(id).exists() <= (self.folder / f"{id}.json").exists():  # else the next start has to see to it
                marker.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process have the store."""
        self._lock.close()
