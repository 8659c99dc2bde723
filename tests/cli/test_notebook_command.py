"""The notebook on the command line: recorded while reading, searched, and shown to the model."""

import io
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import kill_while_reading, run, temporary_files
from helpers import small_model

from ttt_e2e.cli import main as cli
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.inference import load as load_module
from ttt_e2e.inference import session as session_module
from ttt_e2e.inference.session_file import session_facts
from ttt_e2e.model.checkpoint import save_model
from ttt_e2e.retrieval import search_index
from ttt_e2e.retrieval.notebook import Notebook

TEXT = "".join(f"On day {i} the {'heron' if i % 2 else 'otter'} came to the lake at dusk.\n" for i in range(40))
NEXT = "In spring a badger came out of the wood, and the geese were gone.\n" * 3


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train([TEXT, NEXT], 300)
    tokenizer.save(folder / "t.json")
    for name, window, mini_batch in (("model", 160, 20), ("coarse", 64, 64)):
        model = small_model(vocab_size=tokenizer.vocab_size, sliding_window=window, mini_batch_size=mini_batch)
        save_model(model, folder / name, folder / "t.json")
    return folder / "model"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> Path:
    """A working folder with two texts, in which the little model is the shipped one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load_module, "shipped_model", lambda: model_dir)
    (tmp_path / "lake.txt").write_text(TEXT)
    (tmp_path / "next.txt").write_text(NEXT)
    return tmp_path


def read(*argv: object) -> int:
    return run("read", *argv, "--no-plot", "--quiet", "--no-baseline")


def recorded(session: str) -> str:
    with Notebook(Path(f"{session}.notebook"), create=False) as notebook:
        return "".join(notebook.text())


# -- what works --------------------------------------------------------------------------------------------------------


def test_read_records_and_search_finds(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read("lake.txt", "--save", "s", "--notebook") == 0
    captured = capsys.readouterr()
    assert "notebook: s.notebook" in captured.out and captured.err == ""
    assert recorded("s") == TEXT
    for place in ("s", "s.notebook"):
        assert run("notebook", "search", place, "Otter", "on", "--count", 2, "day", "12") == 0
        found = capsys.readouterr().out
        assert "On day 12 the otter" in found.split("\n\n")[0] and found.count("characters ") == 2
    assert run("notebook", "search", "s", "day", "12", "--json") == 0
    passages = json.loads(capsys.readouterr().out)
    assert len(passages) == 3
    assert all(TEXT[one["start"] : one["stop"]] == one["text"] for one in passages)
    assert run("notebook", "search", "s", "walrus") == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "No passage" in captured.err
    assert run("notebook", "search", "s", "walrus", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []


def test_generate_shows_passages_to_the_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read("lake.txt", "--save", "s", "--notebook") == 0
    kept = (here / "s").read_bytes()
    options = ("--session", "s", "On day 12 the", "--max-tokens", 12)
    capsys.readouterr()
    assert run("generate", *options, "--notebook", "--passages", 2) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("On day 12 the") and "On day 12 the otter" in captured.err
    sources = re.findall(r"characters ([\d,]+) to ([\d,]+)", captured.err)
    assert run("generate", *options, "--notebook", "--passages", 2, "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert [(f"{s['start']:,}", f"{s['stop']:,}") for s in report["sources"]] == sources and captured.err == ""
    assert 1 <= len(sources) <= 2
    assert run("generate", *options, "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert "sources" not in plain and plain["text"] != report["text"]  # the passages were seen
    assert run("generate", "--session", "s", "walrus", "--notebook", "--max-tokens", 3) == 0
    assert "none fits" in capsys.readouterr().err
    assert (here / "s").read_bytes() == kept


def test_passages_name_the_file_that_they_come_from(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read("lake.txt", "--save", "s", "--notebook") == 0
    assert read("next.txt", "--session", "s", "--save", "s", "--notebook") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"The walrus has no name. " * 12)))
        assert read("-", "--session", "s", "--save", "s", "--notebook") == 0
    capsys.readouterr()
    headings = {"otter": "lake.txt, characters ", "badger": "next.txt, characters 0 to ", "walrus": "characters "}
    for word, heading in headings.items():
        assert run("notebook", "search", "s", word, "--count", 1) == 0
        assert capsys.readouterr().out.startswith(heading)
    assert run("notebook", "search", "s", "badger", "--count", 1, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["document"], found["document_start"], found["start"]) == ("next.txt", len(TEXT), len(TEXT))
    assert run("generate", "--session", "s", "On day 12 the", "--notebook", "--max-tokens", 3) == 0
    assert "\nlake.txt, characters " in capsys.readouterr().err


def test_generate_learns_from_passages_only_if_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read("lake.txt", "--save", "s", "--notebook") == 0
    capsys.readouterr()
    options = ("--session", "s", "On day 12 the", "--max-tokens", 10, "--learn", "--save", "t", "--json")
    assert run("generate", *options, "--notebook") == 0
    captured = capsys.readouterr()
    report, facts = json.loads(captured.out), session_facts(here / "t")
    read_more = facts["text_bytes"] - session_facts(here / "s")["text_bytes"]
    assert read_more > len("On day 12 the") + sum(len(source["text"].strip()) for source in report["sources"])
    assert "copy s.notebook to t.notebook" in captured.err
    shutil.copytree("s.notebook", "t.notebook")
    assert run("generate", "--session", "t", "The heron", "--notebook", "--max-tokens", 3) == 0
    assert recorded("t") == recorded("s") == TEXT


def test_texts_read_one_after_another_are_recorded(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read("lake.txt", "--save", "s", "--notebook") == 0
    assert read("next.txt", "--session", "s", "--save", "t", "--notebook") == 0
    assert read("next.txt", "--session", "./s", "--save", "s", "--notebook") == 0
    assert recorded("s") == recorded("t") == TEXT + NEXT
    assert session_facts(here / "s")["text_bytes"] == len(TEXT + NEXT)
    capsys.readouterr()
    assert read("next.txt", "--session", "s", "--save", "s") == 0
    assert capsys.readouterr().err == "The notebook s.notebook will not have this text; --notebook records it.\n"
    assert recorded("s") == TEXT + NEXT
    assert read("lake.txt", "--save", "plain") == 0
    assert read("next.txt", "--session", "plain", "--save", "plain", "--notebook") == 0
    assert "plain has read before is not in its notebook" in capsys.readouterr().err
    assert recorded("plain") == NEXT
    assert read("next.txt", "--save", "s", "--notebook", "--json") == 0
    captured = capsys.readouterr()
    assert "s.notebook is replaced" in captured.err and json.loads(captured.out)["bytes"] == len(NEXT)
    assert recorded("s") == NEXT


def test_embeddings_find_passages_by_meaning(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def load_embed(folder: Path) -> search_index.Embed:
        asked.append(folder)
        return lambda texts: search_index.np.array([[1.0, "badger" in t or "brock" in t] for t in texts])

    monkeypatch.setattr(search_index, "load_embed", load_embed)
    (here / "both.txt").write_text(TEXT + NEXT)
    assert read("both.txt", "--save", "s", "--notebook") == 0
    capsys.readouterr()
    assert run("notebook", "search", "s", "brock", "--embeddings", "folder") == 0
    assert "badger" in capsys.readouterr().out.split("\n\n")[0]
    assert run("generate", "brock", "--session", "s", "--notebook", "--embeddings", "other", "--max-tokens", 2) == 0
    assert "badger" in capsys.readouterr().err
    assert asked == [Path("folder"), Path("other")]


def test_ctrl_c_and_the_same_command_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read("lake.txt", "--save", "whole", "--notebook") == 0
    score_pending = session_module.Session.score_pending

    def stopped(self: session_module.Session) -> object:
        raise KeyboardInterrupt  # as by a second Ctrl-C, when all was read and recorded

    for _ in range(2):
        monkeypatch.setattr(session_module.Session, "score_pending", stopped)
        assert read("lake.txt", "--save", "s", "--notebook", "--save-every", 0) == cli.INTERRUPTED
        assert recorded("s") == TEXT and session_facts(here / "s")["unfinished"]["notebook_start"] == 0
    monkeypatch.setattr(session_module.Session, "score_pending", score_pending)
    assert read("lake.txt", "--save", "s", "--notebook", "--save-every", 0) == 0
    assert (here / "s").read_bytes() == (here / "whole").read_bytes()
    assert recorded("s") == TEXT


@pytest.mark.parametrize("then", ["read", "generate"])
def test_text_that_a_killed_reading_recorded_but_did_not_read_is_removed(
    here: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    assert read("lake.txt", "--save", "s", "--notebook") == 0
    with monkeypatch.context() as patch:
        patch.setattr(session_module.Session, "read_chunks", killed)
        with pytest.raises(Killed):
            read("next.txt", "--session", "s", "--save", "s", "--notebook")
    assert recorded("s") == TEXT + NEXT and session_facts(here / "s")["unfinished"]["tokens"] == 0
    if then == "read":
        assert read("next.txt", "--session", "s", "--save", "s") == 0
    else:
        assert run("generate", "--session", "s", "On", "--learn", "--max-tokens", 3, "--save", "s") == 0
    assert recorded("s") == TEXT and "unfinished" not in session_facts(here / "s")


class Killed(BaseException):
    pass


def killed(self: object, ids: object) -> None:
    raise Killed


def test_a_stream_that_is_not_text_changes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read("lake.txt", "--save", "s", "--notebook") == 0
    kept = (here / "s").read_bytes()
    for data in (b"", b"\x7fELF\0"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert read("-", "--save", "s", "--notebook") == 1
        assert (here / "s").read_bytes() == kept and recorded("s") == TEXT


@pytest.mark.slow
def test_killed_at_random_and_run_again_it_ends_the_same(
    here: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TEXT * 20
    options = ["--notebook", "--no-plot", "--no-baseline", "--quiet", "--threads", "1", "--device", "cpu"]
    options += ["--model", str(model_dir.with_name("coarse"))]
    for name in ("s", "whole"):
        assert run("read", "lake.txt", "--save", name, *options) == 0

    def read_all(name: str) -> int:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return run("read", "-", "--session", name, "--save", name, *options)

    def progress() -> tuple[int, int]:
        return len(recorded("s")), session_facts(here / "s")["tokens"]

    moments = random.Random()
    for i in range(2):
        command = ["read", "-", "--session", "s", "--save", "s", "--save-every", "0", *options]
        some = text[: 20_000 * (i + 1)]  # a segment for the tokenizer and more, each time
        kill_while_reading(command, some, progress, moments.uniform(0, 0.1))
        assert (TEXT + text).startswith(recorded("s"))
    assert session_facts(here / "s")["unfinished"]
    assert read_all("whole") == read_all("s") == 0
    assert (here / "s").read_bytes() == (here / "whole").read_bytes()
    assert recorded("s") == recorded("whole") == TEXT + text
    assert temporary_files(here) == []


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("read lake.txt --notebook", "add --save"),
        ("read lake.txt --session s --notebook", "add --save"),
        ("generate x --notebook", "--session"),
        ("generate --session s --notebook", "words of the prompt"),
        ("generate x --session s --notebook", "no notebook s.notebook"),
        ("generate x --session s --passages 2", "add --notebook"),
        ("generate x --session s --embeddings folder", "add --notebook"),
        ("notebook search s heron", "no notebook s.notebook"),
        ("notebook search nowhere heron", "no notebook nowhere.notebook"),
        ("notebook search . heron", "no notebook ."),
        ("notebook search n heron --embeddings .", "embedding"),
    ],
)
def test_errors_are_one_sentence(here: Path, refused: Callable[..., str], argv: str, words: str) -> None:
    session_module.Session(*load_module.load_model(load_module.shipped_model())).save(here / "s")
    shutil.copy("s", "n")
    with Notebook(here / "n.notebook") as notebook:
        notebook.add(TEXT)
    assert words in refused(*argv.split())
    assert not (here / "s.notebook").exists() and recorded("n") == TEXT


@pytest.mark.parametrize("command", ["notebook search n", "generate --session n --notebook"])
def test_words_in_another_encoding_are_refused(here: Path, refused: Callable[..., str], command: str) -> None:
    said = refused(*command.split(), os.fsdecode(b"h\xe9ron"), code=2)
    assert rf"'h\udce9ron' is not valid {sys.getfilesystemencoding()}, the encoding of this locale" in said


def test_an_old_notebook_is_an_error(here: Path, refused: Callable[..., str]) -> None:
    assert read("lake.txt", "--save", "s") == 0
    kept = (here / "s").read_bytes()
    (here / "s.notebook").mkdir()
    (here / "s.notebook/notebook.json").write_text('{"format": "ttt-e2e notebook", "version": 1, "size": 400}')
    for argv in (
        "read next.txt --session s --save s --notebook",
        "read next.txt --save s --notebook",
        "generate --session s --notebook heron",
        "notebook search s heron",
        "notebook search s.notebook heron",
    ):
        assert "version 1" in refused(*argv.split())
    assert (here / "s").read_bytes() == kept


def test_a_notebook_in_use_is_searched_but_not_written_to(
    here: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert read("lake.txt", "--save", "s", "--notebook") == 0
    kept = (here / "s").read_bytes()
    with Notebook(here / "s.notebook") as notebook:
        notebook.add("At last came a walrus.")
        for argv in (
            "read next.txt --session s --save s --notebook",
            "read next.txt --save s --notebook",
            "read next.txt --session s --save t --notebook",
        ):
            assert "s.notebook is in use" in refused(*argv.split())
        capsys.readouterr()
        assert run("notebook", "search", "s", "walrus") == 0
        assert "At last came a walrus" in capsys.readouterr().out
        assert run("generate", "--session", "s", "--notebook", "walrus", "--max-tokens", 2) == 0
    assert (here / "s").read_bytes() == kept and not (here / "t").exists()
    assert recorded("s") == TEXT + "At last came a walrus."
