"""The store after a crash: every file operation and every SQL statement is once the last thing that happens."""

import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_store import MODEL, TEMPLATE, TEXT, TOKENIZER, session_of

from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import SessionInfo
from ttt_e2e.server.engine import store as module
from ttt_e2e.server.engine.database import DATABASE
from ttt_e2e.server.engine.store import Store

AFTER = session_of(TEXT)


class Killed(BaseException):
    """What happens to a process that cannot clean up either: from the first one on, every operation raises it."""


class Faults:
    """Raises `error` at the operation number `at`, before or after it is done; `Killed` at all later ones, too."""

    def __init__(self, at: int, before: bool, error: BaseException) -> None:
        self.at, self.before, self.error, self.count = at, before, error, 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            number, self.count = self.count, self.count + 1
            dead = number > self.at and isinstance(self.error, Killed)
            if dead or (number == self.at and self.before):
                raise self.error
            result = function(*args, **kwargs)
            if number == self.at:
                raise self.error
            return result

        return wrapped


class Connection:
    """One whose statements are operations that can fail."""

    def __init__(self, connection: sqlite3.Connection, faults: Faults) -> None:
        def execute(statement: str, values: tuple[object, ...]) -> SimpleNamespace:
            rows = connection.execute(statement, values).fetchall()
            return SimpleNamespace(fetchall=lambda: rows)

        self.execute, self.close = faults.wrap(execute), connection.close


def faulty(store: Store, faults: Faults, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(store._database, "_connection", Connection(store._database._connection, faults))
    for name in ("sync", "write_new_session_file"):
        patch.setattr(module, name, faults.wrap(getattr(module, name)))
    for name in ("touch", "rename", "unlink"):
        patch.setattr(Path, name, faults.wrap(getattr(Path, name)))
    patch.setattr(module.os, "truncate", faults.wrap(module.os.truncate))
    patch.setattr(tempfile, "mkdtemp", faults.wrap(tempfile.mkdtemp))
    patch.setattr(tempfile.TemporaryDirectory, "cleanup", faults.wrap(tempfile.TemporaryDirectory.cleanup))


def state(store: Store) -> list[SessionInfo]:
    """What the sessions of a store have read, by their records and by their files."""
    records = store.records()
    loaded = [Session.load(store.path(record), MODEL, TOKENIZER).info() for record in records]
    assert loaded == [record.info for record in records]
    return loaded


def delete_on_a_full_disk(store: Store) -> None:
    """No record can be removed, whatever room the session's file makes."""
    connection = store._database._connection

    def execute(statement: str, values: tuple[object, ...]) -> Any:
        if statement.startswith("DELETE"):
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return connection.execute(statement, values)

    faulty = SimpleNamespace(execute=execute, close=connection.close)
    store._database._connection = faulty  # type: ignore[assignment]
    store.delete(store.records()[0])


EMPTY, READ = TEMPLATE.info(), AFTER.info()
OPERATIONS: dict[str, tuple[Callable[[Store], object], list[SessionInfo]]] = {
    "add": (lambda store: store.add("you", AFTER), [EMPTY, EMPTY, READ]),
    "replace": (lambda store: store.replace(store.records()[0], AFTER), [READ, EMPTY]),
    "delete": (lambda store: store.delete(store.records()[0]), [EMPTY]),
    "delete on a full disk": (delete_on_a_full_disk, [EMPTY]),
}
FAULTS = [(Killed(), True), (Killed(), False), (OSError(5, "Input/output error"), True), (sqlite3.Error("I/O"), True)]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_change_is_made_whole_or_not_at_all(operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, after = OPERATIONS[operation]
    store = Store(tmp_path / "start")
    for _ in range(2):
        store.add("me", TEMPLATE)
    store.close()
    for number, (error, before) in enumerate(FAULTS):
        seen, at = set(), 0
        for at in range(100):
            folder = tmp_path / f"{number}-{at}"
            shutil.copytree(tmp_path / "start", folder)
            store, faults, acknowledged = Store(folder), Faults(at, before, error), False
            with monkeypatch.context() as patch:
                faulty(store, faults, patch)
                with suppress(Killed, UserError, OSError, sqlite3.Error):
                    change(store)
                    acknowledged = True
            if not isinstance(error, Killed):  # the process lives on
                assert state(store) == (after if acknowledged else [EMPTY, EMPTY])
            store.close()
            again = Store(folder)
            found = state(again)
            assert found == after if acknowledged else found in ([EMPTY, EMPTY], after), (error, before, at)
            left = {path.name for path in folder.iterdir()} - {DATABASE, f"{DATABASE}-journal"}
            assert left == {record.file for record in again.records()}, (error, before, at)
            again.close()
            seen.add(str(found))
            if faults.count <= at:
                break
        assert at > 2 and len(seen) == 2
