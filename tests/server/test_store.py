"""The store: sessions on disk, and what killed processes leave behind."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import small_model

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Session
from ttt_e2e.server.engine.store import Store

TOKENIZER = Tokenizer.train([""], 257)
MODEL = small_model(vocab_size=257).requires_grad_(False)
TEMPLATE = Session(MODEL, TOKENIZER)
TEXT = "Die Straße war naß – 雨が降った 🌧️."


def session_of(text: str) -> Session:
    session = TEMPLATE.fork()
    session.read(text)
    return session


def test_sessions_are_found_when_the_store_is_opened_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "data")
    assert store.records() == [] and (tmp_path / "deep" / "data").stat().st_mode & 0o777 == 0o700
    fresh, read = store.add("me", TEMPLATE), store.add("you", session_of(TEXT))
    assert len({fresh.id, read.id}) == 2 and all(len(r.id) == 37 and r.id[:5] == "sess-" for r in (fresh, read))
    store.save(read.id, session_of(TEXT * 2))
    store.close()
    again = Store(tmp_path / "deep" / "data")
    assert again.records() == [fresh, read]
    assert Session.load(again.path(fresh.id), MODEL, TOKENIZER).info() == TEMPLATE.info()
    loaded = Session.load(again.path(read.id), MODEL, TOKENIZER)
    assert loaded.info() == session_of(TEXT * 2).info()
    again.delete(read.id)
    assert again.records() == [fresh] and not again.path(read.id).exists()
    with pytest.raises(UserError, match="Cannot delete"):
        again.delete(read.id)


def test_open_removes_leftovers_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    kept = store.add("me", session_of(TEXT))
    store.close()
    stranger = "sess-" + 32 * "0"
    leftovers = [f".{kept.id}.session.77.part", f".{stranger}.json.77.part"]
    (tmp_path / ".tmp-x").mkdir()
    (tmp_path / ".tmp-x/export.session").write_text("somebody's text")
    leftovers += [f"{stranger}.session", f"{stranger}.changing", f"{kept.id}.changing"]
    others = ["notes.txt", "my.session", ".mine.part", "sess-other.json", f"sess-{32 * '1'}.session"]
    for name in (*leftovers, *others):
        (tmp_path / name).write_text("x")
    again = Store(tmp_path)
    assert again.records() == [kept] and "belongs to nobody" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*others, ".lock", f"{kept.id}.json", f"{kept.id}.session"]
    )


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"id": 1}', '{"id": "sess-x", "owner": "me", "created": 1}']
    + [f'{{"id": "ID", "owner": "me", "created": {when}}}' for when in ("NaN", "Infinity", "-1", "1" + "0" * 400)],
)
def test_damaged_record_is_skipped_and_kept(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    good, bad = store.add("me", TEMPLATE), store.add("me", session_of(TEXT))
    (tmp_path / f"{bad.id}.json").write_text(content.replace("ID", bad.id))
    store.close()
    again = Store(tmp_path)
    assert again.records() == [good] and again.path(bad.id).exists()
    assert f"{bad.id}.json is damaged" in caplog.text


def test_only_one_process_can_open_a_store(tmp_path: Path) -> None:
    program = (
        "import sys; from ttt_e2e.server.engine.store import Store; store = Store(sys.argv[1]); "
        "print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout and other.stdout.readline() == b"open\n"
        with pytest.raises(UserError, match="in use by another process"):
            Store(tmp_path)
        other.kill()
    Store(tmp_path).close()


def test_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("file", "file/data"):
        with pytest.raises(UserError, match="Cannot keep sessions"):
            Store(tmp_path / name)


def test_failed_write_of_a_record_leaves_no_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise UserError("No space left.")

    store = Store(tmp_path)
    monkeypatch.setattr("ttt_e2e.server.engine.store.write_text", full)
    with pytest.raises(UserError, match="No space"):
        store.add("me", session_of(TEXT))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
