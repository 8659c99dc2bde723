"""A reading that is noted: killed at any moment and begun again, it ends with the same session and notebook."""

import itertools
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import small_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ttt_e2e import files
from ttt_e2e.cli.notebook import noted_pieces
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference import session_file as session_files
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import session_facts
from ttt_e2e.reading.document import read_document
from ttt_e2e.reading.recording import noted, plan_noting
from ttt_e2e.retrieval import notebook as notebook_module
from ttt_e2e.retrieval.notebook import Notebook, notebook_folder, passage_size

TEXT = "".join(f"The {i}th ship of {i * 7 % 13} sailed to Łódź — 船. The sea was calm.\n" for i in range(7))
OTHER = "".join(f"{i} geese flew over.\n" for i in range(4))
TOKENIZER = Tokenizer.train([TEXT], 290)
MODEL = (
    small_model(vocab_size=TOKENIZER.vocab_size, inner_loop__lr=0.1, mini_batch_size=8, sliding_window=16)
    .eval()
    .requires_grad_(False)
)
SIZE = passage_size(MODEL.config.sliding_window)


class Killed(BaseException):
    """As if the process ended here."""


def read(save: Path, text: str = TEXT, session: Path | None = None, noting: bool = True, **options: Any) -> None:
    """As `ttt-e2e read` does it, in small pieces, the session saved after every chunk."""
    arguments = Namespace(save=save, session=session, notebook=noting)
    reader = Session(MODEL, TOKENIZER) if session is None else Session.load(session, MODEL, TOKENIZER)
    split = iter([text[i : i + 60] for i in range(0, len(text), 60)])
    pieces, plan = noted_pieces(arguments, split, MODEL.config.sliding_window)
    settings = {"progress": False, "baseline": False, "save": save, "save_every": 0.0, **options}
    read_document(reader, pieces, begin=plan.begin if plan else None, **settings)


def read_killed(at: int, *arguments: Any, **options: Any) -> bool:
    """`read`, killed at the moment `at` among those before and after every step of it; returns whether it was.

    Nothing is tidied up, as after a `kill -9`; what is being written is there in part.
    """
    moments = itertools.count()

    def moment() -> None:
        if next(moments) == at:
            raise Killed

    def around(function: Callable[..., Any], *values: Any, **named: Any) -> Any:
        moment()
        result = function(*values, **named)
        moment()
        return result

    write = notebook_module._write

    def write_by_halves(file: Any, data: bytes) -> None:
        moment()
        write(file, data[: len(data) // 2])
        moment()
        write(file, data[len(data) // 2 :])

    def copy_by_halves(source: Path, target: Path, **named: Any) -> None:
        target.mkdir()
        shutil.copy(source / "notebook.json", target)
        moment()
        shutil.rmtree(target)
        copytree(source, target, **named)

    copytree, steps = shutil.copytree, Session.steps

    def some_steps(self: Session, tokens: np.ndarray) -> Iterator[np.ndarray]:
        moment()
        return steps(self, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notebook_module, "_write", write_by_halves)
        patch.setattr("shutil.copytree", copy_by_halves)
        patch.setattr(Session, "steps", some_steps)
        patch.setattr(files, "_remove", lambda path: None)
        patch.setattr(files, "_sync", partial(around, files._sync))
        patch.setattr(session_files, "save_safetensors", partial(around, session_files.save_safetensors))
        for owner, name in ((Notebook, "cut"), (Notebook, "_resume"), (Notebook, "_lock"), (Path, "rename")):
            function = getattr(owner, name)
            patch.setattr(owner, name, lambda *values, f=function, **named: around(f, *values, **named))
        try:
            read(*arguments, **options)
        except Killed:
            return True
    return False


def notebook_text(save: Path) -> str:
    folder = notebook_folder(save)
    return (folder / "text.txt").read_text(encoding="utf-8", errors="ignore") if folder.exists() else ""


def noted_text(folder: Path, *texts: str) -> Path:
    with Notebook(folder, size=SIZE) as notebook:
        for text in texts:
            notebook.add(text)
    return folder


def same_files(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in ("text.txt", "passages.jsonl"))


# -- cutting -----------------------------------------------------------------------------------------------------------


@given(cuts=st.lists(st.integers(0, len(TEXT) + 5), min_size=1, max_size=3), size=st.integers(20, 60))
@settings(max_examples=15, deadline=None)
def test_what_was_cut_was_never_there(tmp_path_factory: pytest.TempPathFactory, cuts: list[int], size: int) -> None:
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
    assert same_files(folder / "n", folder / "expected")


def test_a_cut_that_fails_closes_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Notebook) -> None:
        raise OSError(28, "No space left on device")

    notebook = Notebook(tmp_path / "n", size=SIZE)
    notebook.add(TEXT)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(Notebook, "_resume", full)
        notebook.cut(300)
    with pytest.raises(UserError, match="is closed"):
        notebook.cut(3)
    with Notebook(tmp_path / "n") as notebook:
        assert notebook.characters == 300


# -- killed and begun again --------------------------------------------------------------------------------------------


KINDS = ("new", "new over old", "in its own file", "to another file", "to another file, over old")
Restarted = Callable[[list[int]], bool]


@pytest.fixture
def restarted(request: pytest.FixtureRequest, tmp_path: Path) -> Restarted:
    """A function that reads, is killed at some moments, each after a new start, and goes on to the end.

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
                noted = notebook_text(save).encode()
                assert text.encode().startswith(noted) and len(noted) >= session_facts(save)["text_bytes"]
        else:
            read(save, session=session)
        assert save.read_bytes() == (whole / "s").read_bytes()
        assert notebook_text(save) == text
        assert same_files(notebook_folder(save), notebook_folder(whole / "s"))
        assert not [path.name for path in place.iterdir() if path.name.startswith(".")]
        return killed

    return restarted


@pytest.mark.parametrize("restarted", KINDS, indirect=True)
@given(moments=st.lists(st.integers(0, 70), min_size=1, max_size=3))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_killed_and_begun_again_it_comes_to_the_same_end(restarted: Restarted, moments: list[int]) -> None:
    restarted(moments)


@pytest.mark.slow
@pytest.mark.parametrize("restarted", KINDS, indirect=True)
def test_killed_all_over_a_reading(restarted: Restarted) -> None:
    first_not_killed = next(moment for moment in range(0, 200, 3) if not restarted([moment]))
    assert first_not_killed > 40
    for moment in range(0, 40, 8):  # again before anything new could be done, and right after
        restarted([moment, 3, moment + 5])


def test_who_killed_it_may_read_another_text_instead_while_nothing_was_read(tmp_path: Path) -> None:
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


def test_what_was_read_before_is_compared_and_options_have_to_be_the_same(tmp_path: Path) -> None:
    save = tmp_path / "s"
    tear(save)
    assert session_facts(save)["unfinished"]["begin"] == 0
    kept, text = save.read_bytes(), notebook_text(save)
    with pytest.raises(UserError, match="holds another text"):
        read(save, "A" + TEXT)
    with pytest.raises(UserError, match="--notebook"):
        read(save, noting=False)
    assert save.read_bytes() == kept and notebook_text(save) == text
    plain = tmp_path / "plain"
    tear(plain, noting=False)
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
    read(save)  # a session that begins anew
    assert notebook_text(save) == TEXT
    assert same_files(notebook_folder(save), noted_text(tmp_path / "expected", TEXT))


def test_another_file_another_notebook(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    read(a)
    assert capsys.readouterr().err == ""
    read(b, OTHER, session=a)
    assert capsys.readouterr().err == ""
    assert notebook_text(a) == TEXT and notebook_text(b) == TEXT + OTHER
    read(a, "More.", session=a)
    read(b, OTHER, session=a)
    assert "begins anew" in capsys.readouterr().err
    assert notebook_text(b) == TEXT + "More." + OTHER


def test_what_was_not_noted_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    read(a, noting=False)
    assert capsys.readouterr().err == ""
    read(b, OTHER, session=a)
    assert "has read before is not in its notebook" in capsys.readouterr().err
    assert notebook_text(b) == OTHER
    for save in (b, tmp_path / "c"):
        read(save, session=b, noting=False)
        assert f"{notebook_folder(b)} will not have this text" in capsys.readouterr().err
    assert notebook_text(b) == OTHER


def test_a_notebook_without_its_session_is_left_alone(tmp_path: Path) -> None:
    save = tmp_path / "s"
    read(save)
    save.unlink()
    with pytest.raises(UserError, match="no session"):
        read(save, OTHER)
    assert notebook_text(save) == TEXT and not save.exists()


def test_nothing_is_written_where_a_notebook_cannot_be_had(tmp_path: Path) -> None:
    save = tmp_path / "s"
    with Notebook(notebook_folder(save)) as used, pytest.raises(UserError, match="in use"):
        used.add("x")
        read(save)
    assert not save.exists()
    (notebook_folder(tmp_path / "t")).mkdir()
    (notebook_folder(tmp_path / "t") / "diary").write_text("mine")
    with pytest.raises(UserError, match="is no notebook"):
        read(tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_only_what_killed_processes_left_of_this_file_is_removed(tmp_path: Path) -> None:
    save, theirs = tmp_path / "s", [".s.b.12.part", ".s.part", ".t.12.part", ".s.12.parts"]
    for name in (".s.12.part", ".s.123.old", *theirs):
        (tmp_path / name).write_text("half")
    for name in (".s.notebook.12.part", ".s.notebook.12.old", ".s.notebook.b.12.part"):
        (tmp_path / name).mkdir()
    read(save)
    left = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("."))
    assert left == sorted([*theirs, ".s.notebook.b.12.part"])


def test_the_notebook_is_not_asked_for_before_the_session_says_where_the_text_begins(tmp_path: Path) -> None:
    plan = plan_noting(tmp_path / "s", None, SIZE)
    pieces = noted([TEXT], plan, SIZE)
    assert list(tmp_path.iterdir()) == []
    assert next(pieces) == TEXT and notebook_text(tmp_path / "s") == TEXT
    pieces.close()
    with Notebook(plan.folder, create=False) as notebook:
        assert notebook.characters == len(TEXT)
