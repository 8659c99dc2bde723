"""The store: sessions on disk, what opening it finds, and what it refuses."""

import json
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import file_of
from helpers import small_model

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Session
from ttt_e2e.server.engine.database import DATABASE, SessionDatabase
from ttt_e2e.server.engine.records import DamagedSessionError
from ttt_e2e.server.engine.store import Store

TOKENIZER = Tokenizer.train([""], 257)
MODEL = small_model(vocab_size=257).requires_grad_(False)
TEMPLATE = Session(MODEL, TOKENIZER)
TEXT = "Die Straße war naß – 雨が降った 🌧️."


def session_of(text: str) -> Session:
    session = TEMPLATE.fork()
    session.read(text)
    return session


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_sessions_are_found_when_the_store_is_opened_again(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "data"
    store = Store(folder)
    assert store.records() == [] and folder.stat().st_mode & 0o777 == 0o700
    fresh, read = store.add("me", TEMPLATE), store.add("you", session_of(TEXT))
    assert len({fresh.id, read.id}) == 2 and all(len(r.id) == 37 and r.id[:5] == "sess-" for r in (fresh, read))
    new = store.replace(read, session_of(TEXT * 2))
    assert store.records() == [fresh, new] and not store.path(read).exists()
    store.close()
    again = Store(folder)
    assert again.records() == [fresh, new]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert Session.load(again.path(fresh), MODEL, TOKENIZER).info() == TEMPLATE.info() == fresh.info
    assert Session.load(again.path(new), MODEL, TOKENIZER).info() == session_of(TEXT * 2).info() == new.info
    again.delete(new)
    assert again.records() == [fresh] and not again.path(new).exists()


def test_opening_removes_leftovers_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, elsewhere = tmp_path / "data", tmp_path / "other"
    store, other = Store(folder), Store(elsewhere)
    kept, gone = store.add("me", session_of(TEXT)), store.add("me", TEMPLATE)
    tag, foreign = kept.file[38:46], other.add("me", TEMPLATE)
    leftovers = [f"{kept.id}.{tag}-{16 * '0'}.session", f"sess-{32 * '0'}.{tag}-{16 * '0'}.session", gone.file]
    store.delete(gone)
    store.close()
    (folder / f".tmp-{tag}-x").mkdir()
    (folder / f".tmp-{tag}-x/export.session").write_text("somebody's text")
    others = ["notes.txt", "my.session", ".mine.part", "sess-other.json", f"sess-{32 * '1'}.session", foreign.file]
    others += [f"{kept.id}.{tag}-backup.session", ".tmp-mine", "sessions.db.bak"]
    for name in (*leftovers, *others):
        (folder / name).write_text("x")
    again = Store(folder)
    assert again.records() == [kept] and caplog.text.count("belongs to nobody") == 4
    assert {path.name for path in folder.iterdir()} == {*others, DATABASE, f"{DATABASE}-journal", kept.file}


def test_exported_files_do_not_keep_a_store_from_being_created(tmp_path: Path) -> None:
    TEMPLATE.save(tmp_path / f"sess-{32 * '1'}.session")
    before = contents(tmp_path)
    assert Store(tmp_path).records() == [] and contents(tmp_path).items() >= before.items()


def test_newer_files_are_kept_when_an_older_database_is_put_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old = store.add("me", TEMPLATE)
    store.close()
    backup = (tmp_path / DATABASE).read_bytes()
    store = Store(tmp_path)
    new = store.replace(store.records()[0], session_of(TEXT))
    store.close()
    (tmp_path / DATABASE).write_bytes(backup)
    again = Store(tmp_path)
    assert again.records() == [old] and again.path(new).exists()


def test_only_one_process_can_open_a_store(tmp_path: Path) -> None:
    program = (
        "import sys; from ttt_e2e.server.engine.store import Store; store = Store(sys.argv[1]); "
        "print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout and other.stdout.readline() == b"open\n"
        for _ in range(2):
            with pytest.raises(UserError, match="in use by another process"):
                Store(tmp_path)
        other.kill()
    Store(tmp_path).close()


def test_store_that_is_open_in_this_process_stays_locked(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match="in use by another process"):
            Store(tmp_path)
    program = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN IMMEDIATE')"
    ended = subprocess.run([sys.executable, "-c", program, tmp_path / DATABASE], capture_output=True, text=True)
    assert "database is locked" in ended.stderr
    store.add("me", TEMPLATE)


def test_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("file", "file/data"):
        with pytest.raises(UserError, match="Cannot keep sessions"):
            Store(tmp_path / name)
    (tmp_path / "data" / DATABASE).mkdir(parents=True)
    with pytest.raises(UserError, match="Cannot keep sessions"):
        Store(tmp_path / "data")


# -- what is refused, with nothing touched -----------------------------------------------------------------------------


def old_store(folder: Path) -> None:
    id = f"sess-{32 * 'a'}"
    (folder / f"{id}.json").write_text(json.dumps({"id": id, "owner": "me", "created": 1.5}))
    TEMPLATE.save(folder / f"{id}.session")
    (folder / ".lock").touch()


def without_database(folder: Path) -> None:
    store = Store(folder)
    store.add("me", TEMPLATE)
    store.close()
    (folder / DATABASE).unlink()


def empty_database(folder: Path) -> None:
    without_database(folder)
    (folder / DATABASE).touch()


def foreign_database(folder: Path) -> None:
    with sqlite3.connect(folder / DATABASE) as database:
        database.execute("CREATE TABLE sessions (text)")
    database.close()


def newer_version(folder: Path) -> None:
    Store(folder).close()
    with sqlite3.connect(folder / DATABASE) as database:
        database.execute("PRAGMA user_version = 3")
    database.close()


@pytest.mark.parametrize(
    ("prepare", "match"),
    [
        (old_store, r"format version 1, .*export the sessions with the ttt-e2e that wrote them, or move .*import them"),
        (without_database, r"has sessions but no sessions\.db; put it back, or move"),
        (empty_database, r"has sessions but no sessions\.db; put it back, or move"),
        (foreign_database, r"sessions\.db is the database of another program, so it is kept; name another folder"),
        (newer_version, r"sessions\.db is a store of sessions of format version 3, .*reads version 2; update ttt-e2e"),
    ],
)
def test_other_stores_are_refused_and_kept(prepare: Callable[[Path], None], match: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    before = contents(tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match=match):
            Store(tmp_path)
        assert contents(tmp_path) == before


def test_altered_databases_are_refused_or_say_the_same(tmp_path: Path) -> None:
    """One flipped bit, or a truncation: a sentence that names the database, or the records that were written."""
    store = Store(tmp_path)
    records = [store.add(owner, TEMPLATE) for owner in ("me", "you", "Straße")]
    store.close()
    path, files = tmp_path / DATABASE, {record.file for record in records}
    whole, choices, refused = path.read_bytes(), random.Random(1), 0
    used = [i for i, byte in enumerate(whole) if byte]
    for i in range(150):
        altered = bytearray(whole)
        if i % 10:
            altered[choices.choice(used)] ^= 1 << choices.randrange(8)
        else:
            del altered[choices.randrange(1, len(whole)) :]
        path.write_bytes(altered)
        try:
            opened = Store(tmp_path)
        except UserError as error:
            refused += 1
            assert DATABASE in str(error), i
            assert path.read_bytes() == altered, i
        else:
            assert opened.records() == records, i
            opened.close()
        assert files <= {path.name for path in tmp_path.iterdir()}, i
        for journal in tmp_path.glob(f"{DATABASE}-*"):
            journal.unlink()
    assert refused > 100


# -- a full disk -------------------------------------------------------------------------------------------------------


def limit(store: Store, pages: int) -> None:
    store._database.execute(f"PRAGMA max_page_count = {pages}")


def test_full_disk_changes_nothing_and_sessions_can_be_deleted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    limit(store, 8)
    records = []
    with pytest.raises(UserError, match="disk is full") as caught:
        while True:
            records.append(store.add("me" * 100, TEMPLATE))
    assert isinstance(caught.value.__cause__, sqlite3.Error) and len(records) > 5
    assert store.records() == records and not list(tmp_path.glob(".tmp*"))
    assert {path.name for path in tmp_path.glob("*.session")} == {record.file for record in records}
    store.delete(records.pop())
    assert store.records() == records
    store.replace(records[-1], session_of(TEXT))
    assert file_of(tmp_path, records[-1].id) == store.path(store.records()[-1])


def test_session_can_be_deleted_when_there_is_no_room_for_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    record, other = store.add("me", TEMPLATE), store.add("me", TEMPLATE)
    original = store._database.execute

    def execute(statement: str, *values: object) -> list[Any]:
        if statement.startswith("DELETE") and len(list(tmp_path.glob("*.session"))) == 2:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return original(statement, *values)

    monkeypatch.setattr(store._database, "execute", execute)
    store.delete(record)
    assert store.records() == [other] and not store.path(record).exists()


def test_session_stays_deleted_on_a_disk_that_stays_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is left for its owner, no other session is lost, and a later start removes the record."""
    execute = SessionDatabase.execute

    def full(database: SessionDatabase, statement: str, *values: object) -> list[Any]:
        if statement.startswith(("DELETE", "INSERT")):
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return execute(database, statement, *values)

    store = Store(tmp_path)
    records = [store.add("me", session_of(TEXT)) for _ in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(SessionDatabase, "execute", full)
        for record in (records[1], records[2]):
            store.delete(record)
        with pytest.raises(UserError, match="full"):
            store.add("me", TEMPLATE)
        assert sum(path.stat().st_size for path in tmp_path.glob("*.deleted")) == 0
        store.close()
        store = Store(tmp_path)
        assert store.records() == records[:1]
        Session.load(store.path(records[0]), MODEL, TOKENIZER)
        store.close()
    store = Store(tmp_path)
    assert store.records() == records[:1] == [*store.records()]
    assert store._database.execute("SELECT count(*) FROM sessions") == [(1,)]
    assert {path.name for path in tmp_path.iterdir()} - {records[0].file} == {DATABASE, f"{DATABASE}-journal"}


def test_full_disk_while_a_session_is_written_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    store = Store(tmp_path)
    record = store.add("me", TEMPLATE)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("ttt_e2e.server.engine.store.write_new_session_file", full)
        with pytest.raises(UserError, match="No space left"):
            store.add("me", session_of(TEXT))
        with pytest.raises(UserError, match="No space left"):
            store.replace(record, session_of(TEXT))
        assert contents(tmp_path) == before and store.records() == [record]
        store.delete(record)
    store.add("me", session_of(TEXT))


# -- documents ---------------------------------------------------------------------------------------------------------


def test_documents_stay_with_their_sessions_and_go_with_them(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store._database.execute("DROP TRIGGER documents_of_deleted_sessions")
    store._database.execute("DROP TABLE documents")  # as in a database of an earlier version
    plain = store.add("me", TEMPLATE)
    store.close()
    store = Store(tmp_path)
    record = store.add("me", TEMPLATE, "eins – 一")
    assert (store.document(plain), store.document(record)) == (None, "eins – 一")
    record = store.replace(record, session_of(TEXT))
    assert store.document(record) == "eins – 一"
    record = store.replace(record, TEMPLATE, "two")
    store.set_document(plain, "of another")
    store.close()
    store = Store(tmp_path)
    assert store.records() == [plain, record]
    assert (store.document(plain), store.document(record)) == ("of another", "two")
    store.delete(record)
    assert store._database.execute("SELECT session FROM documents") == [(plain.id,)]
    store._database.execute("UPDATE documents SET content = 'altered'")
    with pytest.raises(DamagedSessionError):
        store.document(plain)


def test_a_session_and_its_document_change_together_or_not_at_all(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = store.add("me", TEMPLATE, "one")
    names = [path.name for path in tmp_path.glob("*.session")]
    store._database.execute("CREATE TRIGGER fails BEFORE INSERT ON documents BEGIN SELECT RAISE(ABORT, 'made up'); END")
    for change in (
        lambda: store.replace(record, session_of(TEXT), "two"),
        lambda: store.add("me", TEMPLATE, "two"),
        lambda: store.set_document(record, "two"),
    ):
        with pytest.raises(UserError, match="made up"):
            change()
        assert store.records() == [record] and store.document(record) == "one"
        assert [path.name for path in tmp_path.glob("*.session")] == names
