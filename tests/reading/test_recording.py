"""Recording a text while it is read: killed at any moment and run again, session and notebook end the same."""

import itertools
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import small_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ttt_e2e import files
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference import session_file as session_files
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import session_facts
from ttt_e2e.reading.document import read_document
from ttt_e2e.reading.recording import plan_recording, record_text
from ttt_e2e.retrieval.database import NotebookDatabase
from ttt_e2e.retrieval.notebook import Notebook, notebook_folder, passage_size

TEXT = "".join(f"The {i}th ship of {i * 7 % 13} sailed to Łódź — 船. The sea was calm.\n" for i in range(7))
OTHER = "".join(f"{i} geese flew over.\n" for i in range(4))
TOKENIZER = Tokenizer.train([TEXT], 290)
# One block that learns and one that does not: more would take time and no path of this room.
SHAPE: dict = dict(num_hidden_layers=2, suffix_layers=1, mini_batch_size=8, sliding_window=16)
MODEL = small_model(vocab_size=TOKENIZER.vocab_size, inner_loop__lr=0.1, **SHAPE).eval().requires_grad_(False)
WINDOW = MODEL.config.sliding_window
SIZE = passage_size(WINDOW)


class Killed(BaseException):
    """As if the process ended here."""


def read(
    save: Path, text: str = TEXT, session: Path | None = None, record: bool = True, **options: Any
) -> tuple[str, ...]:
    """Read as `ttt-e2e read` does, in small chunks, saving after every one; returns what it tells the user."""
    reader = Session(MODEL, TOKENIZER) if session is None else Session.load(session, MODEL, TOKENIZER)
    chunks = iter([text[i : i + 60] for i in range(0, len(text), 60)])
    recording = plan_recording(save, session, WINDOW, "ships.txt") if record else None
    settings = {"progress": False, "baseline": False, "save": save, "save_every": 0.0, **options}
    read_document(reader, chunks, recording=recording, **settings)
    return recording.remarks if recording else ()


def read_killed(at: int, *arguments: Any, **options: Any) -> bool:
    """`read`, killed at the moment `at` among those before and after every step of it; returns whether it was.

    Nothing is tidied up, as after a `kill -9`; what is being written is there in part.
    """
    moments, is_killed = itertools.count(), False

    def moment() -> None:
        nonlocal is_killed
        if next(moments) == at:
            is_killed = True
            raise Killed

    def around(function: Callable[..., Any], *values: Any, **named: Any) -> Any:
        moment()
        result = function(*values, **named)
        moment()
        return result

    transaction = NotebookDatabase.transaction

    @contextmanager
    def in_transaction(
        self: NotebookDatabase, action: str, begin: str = "BEGIN IMMEDIATE"
    ) -> Iterator[sqlite3.Connection]:
        if begin == "BEGIN":
            with transaction(self, action, begin) as database:
                yield database
            return
        moment()
        with transaction(self, action, begin) as database:
            yield database
            moment()  # all is written, but not committed
        moment()

    read_chunks, remove = Session.read_chunks, files._remove

    def kill_before_reading(self: Session, tokens: np.ndarray) -> Iterator[np.ndarray]:
        moment()
        return read_chunks(self, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NotebookDatabase, "transaction", in_transaction)
        patch.setattr(Session, "read_chunks", kill_before_reading)
        patch.setattr(files, "_remove", lambda path: None if is_killed else remove(path))
        patch.setattr(files, "_sync_tree", partial(around, files._sync_tree))
        patch.setattr(session_files, "save_safetensors", partial(around, session_files.save_safetensors))
        changes = (Notebook, "cut"), (Notebook, "replace"), (NotebookDatabase, "_create"), (Path, "rename")
        for owner, name in changes:
            function = getattr(owner, name)
            patch.setattr(owner, name, lambda *values, f=function, **named: around(f, *values, **named))
        try:
            read(*arguments, **options)
        except Killed:
            return True
    return False


def notebook_text(save: Path) -> str:
    if not (notebook_folder(save) / "notebook.db").exists():
        return ""
    with Notebook(notebook_folder(save)) as notebook:
        return "".join(notebook.text())


def documents(folder: Path) -> list[tuple[int, str]]:
    with Notebook(folder, create=False) as notebook:
        return notebook.documents()


def make_notebook(folder: Path, text: str) -> Path:
    with Notebook(folder, size=SIZE) as notebook:
        notebook.add(text)
    return folder


def passages(folder: Path) -> list[Any]:
    """Of a notebook, as SQLite gives them."""
    with sqlite3.connect(folder / "notebook.db") as database:
        rows = database.execute("SELECT * FROM passages ORDER BY number").fetchall()
    database.close()
    return rows


# -- cutting -----------------------------------------------------------------------------------------------------------


@given(cuts=st.lists(st.integers(0, len(TEXT) + 5), min_size=1, max_size=3), size=st.integers(20, 60))
@settings(max_examples=15, deadline=None)
def test_cut_leaves_a_notebook_as_if_the_rest_had_never_been_added(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], size: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    text = TEXT
    with Notebook(folder / "n", size=size) as notebook, Notebook(folder / "expected", size=size) as expected:
        notebook.add(text)
        for cut in cuts:
            notebook.cut(cut)
            text = text[:cut]
            assert notebook.characters == len(text)
            notebook.add(OTHER)
            text += OTHER
            notebook.search("geese")
        expected.add(text)
        assert notebook.search("ship geese", 100) == expected.search("ship geese", 100)
    assert passages(folder / "n") == passages(folder / "expected")


def test_a_cut_that_fails_changes_nothing(tmp_path: Path) -> None:
    with Notebook(tmp_path / "n", size=SIZE) as notebook:
        notebook.add(TEXT * 20)
        found = notebook.search("ship", 1000)
        notebook._database.connection.execute("PRAGMA max_page_count = 1")  # as small as it can be
        notebook._database.connection.execute(
            "CREATE TEMP TRIGGER full AFTER DELETE ON passages BEGIN SELECT RAISE(FAIL, 'no more'); END"
        )
        with pytest.raises(UserError):
            notebook.cut(300)
        assert "".join(notebook.text()) == TEXT * 20 and notebook.search("ship", 1000) == found


# -- killed and begun again --------------------------------------------------------------------------------------------


KINDS = ("new", "new over old", "in its own file", "to another file", "to another file, over old")
Restarted = Callable[[list[int]], bool]


@pytest.fixture
def restarted(request: pytest.FixtureRequest, tmp_path: Path) -> Restarted:
    """A function that reads, is killed at some moments, each after a new start, and continues to the end.

    It checks what is on the disk after each kill, and that in the end all is as without them; it returns whether the
    last kill found anything left to kill.
    """
    kind, start, place = request.param, tmp_path / "start", tmp_path / "place"
    save, before, whole = place / "s", place / "before", tmp_path / "whole"
    session = {"in its own file": save, "to another file": before}.get(kind.partition(",")[0])
    start.mkdir()
    if "over old" in kind:
        read(start / "s", "Something old.")
    if session is not None:
        read(start / session.name, OTHER)
    shutil.copytree(start, place)
    read(save, session=session)
    shutil.copytree(place, whole)
    text = ("" if session is None else OTHER) + TEXT

    def restarted(moments: list[int]) -> bool:
        shutil.rmtree(place)
        shutil.copytree(start, place)
        for moment in moments:
            killed = read_killed(moment, save, session=session)
            if not killed:
                break
            if save.exists() and session_facts(save).get("unfinished", {}).get("tokens"):
                recorded = notebook_text(save).encode()
                assert text.encode().startswith(recorded) and len(recorded) >= session_facts(save)["text_bytes"]
        else:
            read(save, session=session)
        assert save.read_bytes() == (whole / "s").read_bytes()
        assert notebook_text(save) == text
        assert passages(notebook_folder(save)) == passages(notebook_folder(whole / "s"))
        assert documents(notebook_folder(save)) == documents(notebook_folder(whole / "s")) != []
        assert not [path.name for path in place.iterdir() if path.name.startswith(".")]
        return killed

    return restarted


@pytest.mark.parametrize("restarted", KINDS, indirect=True)
@given(moments=st.lists(st.integers(0, 70), min_size=1, max_size=3))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_killed_and_run_again_it_comes_to_the_same_end(restarted: Restarted, moments: list[int]) -> None:
    restarted(moments)


@pytest.mark.slow
@pytest.mark.parametrize("restarted", KINDS, indirect=True)
def test_killed_all_over_a_reading(restarted: Restarted) -> None:
    first_not_killed = next(moment for moment in range(0, 200, 3) if not restarted([moment]))
    assert first_not_killed > 40
    for moment in range(0, 40, 8):  # again before anything new could be done, and right after
        restarted([moment, 3, moment + 5])


def test_another_text_may_be_read_instead_while_nothing_was_read(tmp_path: Path) -> None:
    save = tmp_path / "s"
    read(save, OTHER)
    kept = session_facts(save)["text_digest"]
    for at in range(100):
        assert read_killed(at, save, "Wrong. " + TEXT, session=save)
        assert session_facts(save)["text_digest"] == kept
        if len(notebook_text(save)) > len(OTHER) + 100:
            break
    assert notebook_text(save).startswith(OTHER + "Wrong. ")
    read(save, TEXT, session=save, baseline=True)  # with other options, too
    assert notebook_text(save) == OTHER + TEXT


def test_a_resumed_reading_needs_the_same_text_and_options(tmp_path: Path) -> None:
    save = tmp_path / "s"
    tear(save)
    assert session_facts(save)["unfinished"]["notebook_start"] == 0
    kept, text = save.read_bytes(), notebook_text(save)
    with pytest.raises(UserError, match="holds another text"):
        read(save, "A" + TEXT)
    with pytest.raises(UserError, match="--notebook"):
        read(save, record=False)
    assert save.read_bytes() == kept and notebook_text(save) == text
    plain = tmp_path / "plain"
    tear(plain, record=False)
    with pytest.raises(UserError, match="--notebook"):
        read(plain)
    assert not notebook_folder(plain).exists()
    read(save, TEXT + OTHER)  # it begins with what was read
    assert notebook_text(save) == TEXT + OTHER


def tear(save: Path, **options: Any) -> None:
    """Leave a reading that was killed in the middle of its text."""
    for at in range(0, 100, 6):
        assert read_killed(at, save, **options)
        if save.exists() and session_facts(save).get("unfinished", {}).get("tokens"):
            return
    raise AssertionError("It was never killed in the middle.")


# -- which notebook ----------------------------------------------------------------------------------------------------


def test_a_text_that_is_read_again_is_a_new_text(tmp_path: Path) -> None:
    save = tmp_path / "s"
    read(save)
    read(save, session=save)
    assert notebook_text(save) == TEXT + TEXT
    assert documents(notebook_folder(save)) == [(0, "ships.txt"), (len(TEXT), "ships.txt")]
    read(save)  # a new session
    assert notebook_text(save) == TEXT
    assert passages(notebook_folder(save)) == passages(make_notebook(tmp_path / "expected", TEXT))


def test_a_session_saved_to_another_file_gets_a_notebook_of_its_own(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert read(a) == ()
    assert read(b, OTHER, session=a) == ()
    assert notebook_text(a) == TEXT and notebook_text(b) == TEXT + OTHER
    assert read(a, "More.", session=a) == ()
    (remark,) = read(b, OTHER, session=a)
    assert "b.notebook is replaced" in remark
    assert notebook_text(b) == TEXT + "More." + OTHER


def test_text_that_was_not_recorded_is_remarked(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    read(a, record=False)
    (remark,) = read(b, OTHER, session=a)
    assert "has read before is not in its notebook" in remark
    assert notebook_text(b) == OTHER
    for save in (b, tmp_path / "c"):
        read(save, session=b, record=False)
    assert notebook_text(b) == OTHER


def test_a_notebook_without_its_session_is_not_replaced(tmp_path: Path) -> None:
    save = tmp_path / "s"
    read(save)
    save.unlink()
    with pytest.raises(UserError, match="no session"):
        read(save, OTHER)
    assert notebook_text(save) == TEXT and not save.exists()


def test_nothing_is_written_if_the_notebook_cannot_be_opened(tmp_path: Path) -> None:
    save = tmp_path / "s"
    with Notebook(notebook_folder(save)) as used, pytest.raises(UserError, match="in use"):
        used.add("x")
        read(save)
    assert not save.exists()
    (notebook_folder(tmp_path / "t")).mkdir()
    (notebook_folder(tmp_path / "t") / "diary").write_text("mine")
    with pytest.raises(UserError, match="is not a notebook"):
        read(tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_only_stale_parts_of_this_session_are_removed(tmp_path: Path) -> None:
    save, others = tmp_path / "s", [".s.b.12.part", ".s.part", ".t.12.part", ".s.12.parts"]
    for name in (".s.12.part", ".s.123.old", *others):
        (tmp_path / name).write_text("half")
    read(save)
    left = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("."))
    assert left == sorted(others)


def test_record_text_writes_nothing_before_the_first_chunk_is_asked_for(tmp_path: Path) -> None:
    recording = plan_recording(tmp_path / "s", None, WINDOW)
    chunks = record_text([TEXT], recording)
    assert list(tmp_path.iterdir()) == []
    assert next(chunks) == TEXT and notebook_text(tmp_path / "s") == TEXT
    chunks.close()
    with Notebook(recording.folder, create=False) as notebook:
        assert notebook.characters == len(TEXT)


def test_a_stream_that_is_not_text_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    def chunks() -> Iterator[str]:
        raise UserError("not text")
        yield ""

    recording = plan_recording(tmp_path / "s", None, WINDOW)
    with pytest.raises(UserError, match="not text"):
        read_document(Session(MODEL, TOKENIZER), chunks(), save=tmp_path / "s", recording=recording, progress=False)
    assert list(tmp_path.iterdir()) == []
