"""Sessions on shared storage: what replicas find there, who holds a session, and replicas that fail at any moment."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from shared_helpers import s3_server
from test_store import MODEL, TEMPLATE, TEXT, TOKENIZER, session_of

from ttt_e2e.errors import UserError
from ttt_e2e.files import file_digest
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import SessionInfo
from ttt_e2e.server.engine import shared_store
from ttt_e2e.server.engine.records import DamagedSessionError, NotebookRecord, SessionNotFoundError, TakenOverError
from ttt_e2e.server.engine.shared_store import LEASE_SECONDS, SharedRecord, SharedStore
from ttt_e2e.server.engine.storage import ConflictError, StorageError
from ttt_e2e.server.engine.store import NewNotebook

PATIENCE = 300.0
AFTER = session_of(TEXT)
EMPTY, READ = TEMPLATE.info(), AFTER.info()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as url:
        yield url


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "sessions")
    return f"{request.getfixturevalue('bucket')}/{request.node.name}"  # where no other test has been


def load(store: SharedStore, record: SharedRecord) -> SessionInfo:
    with store.local_file(record) as path:
        return Session.load(path, MODEL, TOKENIZER).info()


def files(store: SharedStore, record: SharedRecord) -> set[str]:
    return set(store.storage.names(f"sessions/{record.owner}/{record.id}"))


def found(store: SharedStore, record: SharedRecord) -> SharedRecord:
    current = store.find(record.owner, record.id)
    assert current is not None
    return current


def new_notebook(folder: Path, content: str) -> NewNotebook:
    """The store does not look into notebooks, so any file will do."""
    folder.mkdir(exist_ok=True)
    path = folder / "notebook.db"
    path.write_text(content)
    return NewNotebook(folder, NotebookRecord("", file_digest(path), path.stat().st_size, 1, 1, ["a.txt"]))


def notebook_text(store: SharedStore, record: SharedRecord) -> str | None:
    if record.notebook is None:
        return None
    with store.local_notebook(record.notebook) as folder:
        return (folder / "notebook.db").read_text()


def two_stores(url: str) -> tuple[SharedStore, SharedStore]:
    one, two = SharedStore(url), SharedStore(str(Path("unused")))
    two.storage = one.storage  # a client for S3 takes a second to make
    return one, two


def test_what_one_replica_saves_another_finds(url: str) -> None:
    one, two = two_stores(url)
    assert one.records_of("me") == [] and one.count("me") == 0 and one.find("me", f"sess-{32 * '0'}") is None
    plain, record = one.add("me", TEMPLATE), one.add("me", AFTER, "eins – 一")
    assert two.records_of("me") == [plain, record] and two.records_of("you") == [] and two.count("me") == 2
    assert found(two, record) == record and two.find("you", record.id) is None
    assert (load(two, plain), load(two, record)) == (EMPTY, READ)
    assert (two.document(plain), two.document(record)) == (None, "eins – 一")
    new = two.replace(record, TEMPLATE)
    assert one.document(record) == one.document(found(one, record)) == "eins – 一" and load(one, new) == EMPTY
    with pytest.raises(FileNotFoundError):
        load(one, record)
    new = two.replace(new, AFTER, "two")
    assert one.document(record) == "two" and found(one, record).info == READ
    plain = one.set_document(found(one, plain), "of another")
    assert two.document(plain) == "of another" and load(two, plain) == EMPTY
    assert len(files(one, new)) == len(files(one, plain)) == 3
    two.delete(record)
    assert one.find("me", record.id) is None and one.records_of("me") == [plain] and not files(one, record)
    for change in (lambda: one.replace(new, TEMPLATE), lambda: one.set_document(new, "x")):
        with pytest.raises(SessionNotFoundError):
            change()
    assert not files(one, record)


def test_notebook_is_saved_replaced_and_removed_with_its_session(url: str, tmp_path: Path) -> None:
    one, two = two_stores(url)
    record = one.add("me", TEMPLATE, notebook=new_notebook(tmp_path / "n", "first"))
    assert record in two.records_of("me") and found(two, record) == record and notebook_text(two, record) == "first"
    kept = two.replace(record, AFTER)  # without another notebook
    assert kept.notebook == record.notebook and len(files(one, kept)) == 3
    new = two.replace(kept, AFTER, notebook=new_notebook(tmp_path / "n", "second"))
    assert notebook_text(one, found(one, new)) == "second" and len(files(one, new)) == 3
    with pytest.raises(FileNotFoundError):
        notebook_text(one, record)
    with pytest.raises(TakenOverError):
        one.replace(kept, AFTER, notebook=new_notebook(tmp_path / "n", "late"))
    assert notebook_text(one, found(one, new)) == "second" and len(files(one, new)) == 3
    one.delete(new)
    assert not files(two, new)
    with pytest.raises(FileNotFoundError):
        notebook_text(one, new)


def test_copies_of_notebooks_are_few_and_stay_while_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_store.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shared_store, "_MOST_COPIES", 2)
    store = SharedStore(str(tmp_path / "shared"))
    records = [store.add("me", TEMPLATE, notebook=new_notebook(tmp_path / "n", str(i))) for i in range(4)]
    first = records[0].notebook
    assert first is not None
    with store.local_notebook(first) as folder:
        assert [notebook_text(store, record) for record in records] == ["0", "1", "2", "3"]
        assert (folder / "notebook.db").read_text() == "0" and len(list(tmp_path.glob("ttt-e2e-*"))) == 3
    assert len(list(tmp_path.glob("ttt-e2e-*"))) == 2
    altered = tmp_path / "shared" / first.file
    altered.write_text("?")
    with pytest.raises(FileNotFoundError):
        notebook_text(store, records[0])
    store.delete(records[3])
    assert len(list(tmp_path.glob("ttt-e2e-*"))) == 1
    store.close()
    assert not list(tmp_path.glob("ttt-e2e-*"))


def test_replica_that_was_paused_cannot_overwrite_its_successor(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paused, successor = two_stores(url)
    for store in (paused, successor):
        store.beat()
    record = paused.claim(paused.add("me", TEMPLATE, "one"))
    assert found(successor, record).holder == paused.holder and not successor.is_gone(paused.holder)
    clock = time.monotonic()
    monkeypatch.setattr(shared_store.time, "monotonic", lambda: clock)
    clock += LEASE_SECONDS - 0.1
    assert not successor.is_gone(paused.holder)
    paused.beat()
    clock += 0.2
    assert not successor.is_gone(paused.holder)  # it was heard of
    clock += LEASE_SECONDS + 0.1
    assert successor.is_gone(paused.holder)
    held = successor.claim(found(successor, record))
    for change in (lambda: paused.replace(record, AFTER, "x"), lambda: paused.set_document(record, "x")):
        with pytest.raises(TakenOverError, match="Another replica has taken this session over"):
            change()
    with pytest.raises(ConflictError):
        paused.release(record)
    saved = successor.replace(held, session_of(TEXT * 2), "two")
    with pytest.raises(TakenOverError):
        paused.replace(record, AFTER)
    current = found(paused, record)
    assert current == saved and current.holder is None and load(paused, current) == session_of(TEXT * 2).info()
    assert paused.document(current) == "two" and len(files(paused, record)) == 3


def test_replica_that_ends_in_order_holds_nothing(tmp_path: Path) -> None:
    store, other = SharedStore(str(tmp_path)), SharedStore(str(tmp_path))
    store.start_beating()
    store.claim(store.add("me", TEMPLATE))
    assert not other.is_gone(store.holder)
    store.close()
    assert other.is_gone(store.holder)


def test_replica_that_ends_during_a_beat_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_store, "BEAT_SECONDS", 0.01)
    store, other, before = SharedStore(str(tmp_path)), SharedStore(str(tmp_path)), set(threading.enumerate())
    write, reached, release = store.storage.write, threading.Event(), threading.Event()

    def held(name: str, content: bytes) -> None:
        reached.set()
        assert release.wait(PATIENCE)
        write(name, content)

    store.start_beating()
    (beating,) = set(threading.enumerate()) - before
    monkeypatch.setattr(store.storage, "write", held)
    assert reached.wait(PATIENCE)
    closing = threading.Thread(target=store.close)
    closing.start()
    closing.join(0.1)  # longer if it does not wait for the beat, as it should
    release.set()
    for thread in (closing, beating):
        thread.join(PATIENCE)
    assert other.is_gone(store.holder)


def test_session_that_is_held_again_while_it_is_released_is_released_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_store, "BEAT_SECONDS", 0.01)
    store, other = SharedStore(str(tmp_path)), SharedStore(str(tmp_path))
    record, swap = store.add("me", TEMPLATE), store.storage.swap

    def hold_and_fail() -> None:
        claimed = store.claim(found(store, record))
        with monkeypatch.context() as patch, pytest.raises(StorageError):
            patch.setattr(store.storage, "swap", away)
            store.release(claimed)

    def away(*_: object) -> str:
        raise StorageError("It is away.")

    def released_and_held_again(*arguments: Any) -> str:
        monkeypatch.setattr(store.storage, "swap", swap)
        version = swap(*arguments)
        hold_and_fail()
        return version

    hold_and_fail()
    monkeypatch.setattr(store.storage, "swap", released_and_held_again)
    store.start_beating()
    end = time.monotonic() + PATIENCE
    while found(other, record).generation < 5:  # made, held, released, held, released
        assert time.monotonic() < end
        time.sleep(0.01)
    assert found(other, record).holder is None
    store.close()


def test_what_a_dead_replica_left_goes_when_its_session_is_taken_over(tmp_path: Path) -> None:
    dead, store = SharedStore(str(tmp_path)), SharedStore(str(tmp_path))
    record = dead.claim(dead.add("me", TEMPLATE, "kept", notebook=new_notebook(tmp_path / "n", "kept")))
    dead._upload(record, AFTER, "half of a change", new_notebook(tmp_path / "n", "half"))
    assert len(files(store, record)) == 7
    store.release(store.claim(found(store, record)))
    current = found(store, record)
    assert len(files(store, record)) == 4
    assert store.document(current) == notebook_text(store, current) == "kept"


class Killed(BaseException):
    """What happens to a process that cannot clean up either."""


Change = Callable[[SharedStore, SharedRecord, NewNotebook], object]
OPERATIONS: dict[str, tuple[Change, SessionInfo | None, str | None, str | None]] = {
    "replace": (lambda store, record, new: store.replace(record, AFTER, "two", new), READ, "two", "new"),
    "document": (lambda store, record, new: store.set_document(record, "two"), EMPTY, "two", "old"),
    "delete": (lambda store, record, new: store.delete(record), None, None, None),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("error", "late"), [(Killed(), False), (Killed(), True), (StorageError("It is away."), True)], ids=str
)
def test_change_is_made_whole_or_not_at_all(operation: str, error: BaseException, late: bool, tmp_path: Path) -> None:
    """`error` comes before or after every call of the storage; after `Killed` no further one is made."""
    change, *after = OPERATIONS[operation]
    seen = set()
    for at in range(20):
        store = SharedStore(str(tmp_path))
        record = store.claim(store.add("me", TEMPLATE, "one", notebook=new_notebook(tmp_path / "n", "old")))
        new = new_notebook(tmp_path / "n", "new")
        count, acknowledged = 0, False

        def faulty(method: Callable[..., Any], at: int = at) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                nonlocal count
                number, count = count, count + 1
                if (number > at and isinstance(error, Killed)) or (number == at and not late):
                    raise error
                result = method(*arguments)
                if number == at:
                    raise error
                return result

            return call

        for name in ("read", "swap", "new_file", "write", "remove", "names"):
            setattr(store.storage, name, faulty(getattr(store.storage, name)))
        with suppress(Killed, UserError):
            change(store, record, new)
            acknowledged = True
        other = SharedStore(str(tmp_path))
        current = other.find("me", record.id)
        state = [None, None, None]
        if current is not None:
            state = [load(other, current), other.document(current), notebook_text(other, current)]
        assert state == after if acknowledged else state in ([EMPTY, "one", "old"], after), at
        seen.add(str(state))
        if count <= at:
            break
    assert acknowledged and len(seen) == 2


def test_altered_files_are_damage_and_others_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = SharedStore(str(tmp_path))
    one, two = store.add("me", TEMPLATE, "one"), store.add("you", AFTER)
    document = tmp_path / str(one.document)
    document.write_text("altered")
    with pytest.raises(DamagedSessionError):
        store.document(one)
    path = tmp_path / f"sessions/me/{one.id}/record.json"
    whole = path.read_text()
    for altered in (whole.replace('"me"', '"you"'), whole[:40], "", "[]", "{}"):
        path.write_text(altered)
        with pytest.raises(DamagedSessionError):
            store.find("me", one.id)
    assert found(store, two) == two and "damaged" in caplog.text


def test_ids_and_owners_lead_nowhere_else(tmp_path: Path) -> None:
    store = SharedStore(str(tmp_path))
    record = store.add("../a/..", TEMPLATE)
    assert found(store, record) == record and store.count("../a/..") == 1
    for id in ("", "..", f"../me/{record.id}", f"{record.id}/", f"{record.id}\n", "sess-x"):
        assert store.find("../a/..", id) is None
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "sessions", "store.json"}


def test_storage_of_another_version_or_that_was_emptied_is_refused(tmp_path: Path) -> None:
    store = SharedStore(str(tmp_path))
    record = store.add("me", TEMPLATE)
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    for use in (lambda: store.find("me", record.id), lambda: store.records_of("me")):
        with pytest.raises(StorageError, match=r"has lost its store\.json"):
            use()
    (tmp_path / "store.json").write_text(json.dumps({"format": shared_store.FORMAT, "version": 2}))
    with pytest.raises(UserError, match=re.escape("format version 2")):
        SharedStore(str(tmp_path)).add("me", TEMPLATE)
