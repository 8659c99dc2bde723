"""`ttt-e2e read` from end to end, with a small random model."""

import io
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from cli_helpers import TEXT, fails_to_compile, is_compilation_warning, kill_while_reading, run, temporary_files

from ttt_e2e.cli import main as cli
from ttt_e2e.data.text import Document
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.inference import session as session_module
from ttt_e2e.inference import session_file
from ttt_e2e.inference.session_file import session_facts
from ttt_e2e.reading.reading import Reading


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_read_save_and_generate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("read", "geese.txt", "--save", "geese.session", "--quiet") == 0
    out = capsys.readouterr().out
    assert "geese.txt" in out and "whole text" in out and "with learning" in out
    assert (here / "geese.reading.png").read_bytes().startswith(b"\x89PNG")
    assert session_facts(here / "geese.session")["learn"] is True

    texts = []
    for _ in range(2):
        assert run("generate", "--session", "geese.session", "The geese", "--max-tokens", 8) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("The geese") and len(texts[0]) > len("The geese\n")

    assert run("read", "geese.txt", "--session", "geese.session", "--no-plot", "--quiet", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > 0


def test_read_precision_halves_the_session(here: Path) -> None:
    options = ("--no-plot", "--quiet")
    assert run("read", "geese.txt", "--save", "exact", *options) == 0
    assert run("read", "geese.txt", "--save", "small", "--precision", "bfloat16", *options) == 0
    exact, small = (session_facts(here / name) for name in ("exact", "small"))
    assert (exact["precision"], small["precision"]) == ("float32", "bfloat16")
    assert small["text_digest"] == exact["text_digest"]
    assert (here / "small").stat().st_size < (here / "exact").stat().st_size
    learned = ("--session", "small", "--learn", "--save", "more", "--precision", "float16")
    assert run("generate", "The geese", "--max-tokens", 3, *learned) == 0
    assert session_facts(here / "more")["precision"] == "float16"


def test_read_json_prints_only_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("read", "geese.txt", "--json", "--plot", "p.svg") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == len(TEXT) and len(report["parts"]) == 10
    assert report["gain"] == pytest.approx(report["loss_without"] - report["loss"])
    assert (here / "p.svg").exists()


def test_read_standard_input_equals_the_file(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("read", "geese.txt", "--json", "--no-plot", "--quiet") == 0
    file = json.loads(capsys.readouterr().out)
    feed(monkeypatch, TEXT.encode())
    assert run("read", "-", "--json", "--no-plot", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["loss"] == file["loss"]


def test_read_without_a_file(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt_e2e.data.text.standard_library_document", lambda: Document("asyncio", TEXT))
    assert run("read", "--quiet", "--no-learning") == 0
    assert "Python's asyncio" in capsys.readouterr().out
    assert (here / "Python-asyncio.reading.png").exists()


def test_read_prints_for_the_terminal_that_there_is(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert run("read", "geese.txt", "--no-plot", "--quiet") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if re.match(r"first|whole|\d+ -|last", line)]
    assert len(rows) == 11 and max(map(len, rows)) <= 40


# -- compiled ----------------------------------------------------------------------------------------------------------


def test_read_compiled_without_a_compiler_warns(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(session_module, "compiled_functions", fails_to_compile)
    options = ("--no-plot", "--quiet", "--compile")
    assert run("read", "geese.txt", *options) == 0
    assert is_compilation_warning(capsys.readouterr().err)
    assert run("read", "geese.txt", *options, "--no-learning") == 0
    assert capsys.readouterr().err.startswith("Nothing is compiled")


def read_plain_and_compiled(
    here: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    """Read plainly and compiled, in `here`/cache, to about the same loss; returns standard error of the latter."""
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(here / "cache"))
    words = ["read", "geese.txt", "--model", str(model), "--json", "--no-plot", "--quiet", "--device", "cpu"]
    words += ["--threads", "1"]
    losses = []
    for option in ((), ("--compile",)):
        capsys.readouterr()
        assert run(*words, *option) == 0
        captured = capsys.readouterr()
        losses.append(json.loads(captured.out)["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    return captured.err


@pytest.mark.slow
def test_read_without_a_compiler_gives_the_same_result(
    here: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch._inductor.config.patch({"cpp.cxx": (None, str(here / "no-compiler"))}):
        error = read_plain_and_compiled(here, model_dir / "shallow", capsys, monkeypatch)
    assert is_compilation_warning(error)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_read_with_generated_code(
    here: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compilers of today know the processor's vector instructions; to try them takes six seconds.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True}):
        assert read_plain_and_compiled(here, model_dir / "shallow", capsys, monkeypatch) == ""
    assert any((here / "cache").rglob("*.so"))


# -- stopped and run again ---------------------------------------------------------------------------------------------


def test_read_killed_at_random_and_run_again_ends_the_same(
    here: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, kills = TEXT * 24, 2
    command = ["read", "-", "--json", "--no-plot", "--device", "cpu", "--threads", "1"]
    command += ["--model", str(model_dir / "coarse"), "--save"]

    def tokens_saved() -> int:
        unfinished = (here / "s").exists() and session_facts(here / "s").get("unfinished")
        return unfinished["tokens"] if unfinished else 0

    def report_of(name: str) -> dict:
        feed(monkeypatch, text.encode())
        capsys.readouterr()
        assert run(*command, name) == 0
        report = json.loads(capsys.readouterr().out)
        times = ("seconds", "learning_seconds", "tokens_per_second")
        assert all(report.pop(name) > 0 for name in times)
        return report

    moments = random.Random()
    for i in range(kills):
        saved = tokens_saved()
        some = text[: 20_000 * (i + 1)]  # a segment for the tokenizer and more, each time
        error = kill_while_reading([*command, "s", "--save-every", "0"], some, tokens_saved, moments.uniform(0, 0.2))
        assert saved == 0 or f"Continuing after {saved:,} tokens" in error
    assert tokens_saved()
    assert report_of("s") == report_of("whole")
    assert (here / "s").read_bytes() == (here / "whole").read_bytes()
    assert temporary_files(here) == []


def test_read_resumes_standard_input_that_is_fed_again(
    here: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_after_saving(*arguments: object) -> None:
        session_file.write_session_file(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt  # as by a second Ctrl-C

    options = ("--save", "s", "--save-every", 0, "--no-plot", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr("ttt_e2e.reading.resume.write_session_file", stop_after_saving)
        feed(monkeypatch, TEXT.encode())
        assert run("read", "-", *options) == cli.INTERRUPTED
    assert run("info", "s") == 0
    assert re.search(r"unfinished +after \d+ tokens of standard input", capsys.readouterr().out)
    feed(monkeypatch, b"Other " + TEXT.encode())
    assert "does not begin with" in refused("read", "-", *options)
    feed(monkeypatch, TEXT.encode())
    assert run("read", "-", *options) == 0
    assert session_facts(here / "s")["text_bytes"] == len(TEXT.encode())


def test_after_ctrl_c_it_says_how_to_continue(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, read = ("read", "geese.txt", "--save", "s", "--no-plot", "--quiet"), Reading.read

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Reading, "read", interrupted)
        assert run(*command) == cli.INTERRUPTED
    assert "session: s; the same command continues the reading\n" in capsys.readouterr().out
    assert run(*command) == 0
    assert "session: s\n" in capsys.readouterr().out


# -- refused -----------------------------------------------------------------------------------------------------------


def test_invalid_texts_are_refused(here: Path, refused: Callable[..., str]) -> None:
    assert run("read", "geese.txt", "--save", "s", "--quiet") == 0
    kept = {name: (here / name).read_bytes() for name in ("s", "geese.reading.png")}
    (here / "empty").write_bytes(b"")
    (here / "binary").write_bytes(b"\x7fELF\0\0\1")
    (here / "half").write_bytes(TEXT.encode() * 3 + b"\xe2\x82")
    (here / "folder").mkdir()
    cases = {"missing": "does not exist", "empty": "is empty", "binary": "binary", "half": "UTF-8", "folder": "folder"}
    for name, words in cases.items():
        error = refused("read", name, "--save", "s", "--plot", "geese.reading.png", "--quiet")
        assert words in error and name in error
    for name in ("missing", "empty", "half"):
        assert cases[name] in refused("evaluate", name, "--quiet")
    assert {name: (here / name).read_bytes() for name in kept} == kept


def test_a_plot_that_cannot_be_written_is_refused_before_the_work(
    here: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Reading, "read", lambda *_: pytest.fail("the text was read"))
        error = refused("read", "geese.txt", "--plot", "geese.txt/p.png", "--save", "new/s", "--quiet")
        assert "Cannot write" in error and "geese.txt/p.png" in error
        assert sorted(path.name for path in here.iterdir()) == ["geese.txt"]
    assert run("read", "geese.txt", "--plot", "new/p.png", "--quiet") == 0
    assert [path.name for path in (here / "new").iterdir()] == ["p.png"]


def test_invalid_standard_input_leaves_no_session(
    here: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(monkeypatch, TEXT.encode() + b"\xff")
    assert "UTF-8" in refused("read", "-", "--save", "s", "--quiet")
    assert sorted(path.name for path in here.iterdir()) == ["geese.txt"]


def test_a_session_continues_as_it_began(here: Path, refused: Callable[..., str]) -> None:
    assert run("read", "geese.txt", "--save", "s", "--dtype", "bfloat16", "--no-plot", "--quiet") == 0
    assert "continues as it began" in refused("read", "geese.txt", "--session", "s", "--no-learning")
    assert "computes in bfloat16" in refused("generate", "x", "--session", "s", "--dtype", "float32")
    assert run("generate", "x", "--session", "s", "--max-tokens", "2") == 0


def test_damaged_models_are_refused(here: Path, refused: Callable[..., str], model_dir: Path) -> None:
    for name in ("truncated", "altered", "mismatched"):
        shutil.copytree(model_dir / "model", here / name)
    weights = (model_dir / "model" / "model.safetensors").read_bytes()
    (here / "truncated" / "model.safetensors").write_bytes(weights[:-100])
    (here / "altered" / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    Tokenizer.train([TEXT], 260).save(here / "mismatched" / "tokenizer.json")
    for name, words in (("truncated", "truncated"), ("altered", "altered"), ("mismatched", "cut short")):
        assert words in refused("read", "geese.txt", "--model", name, "--quiet")


def test_divergence_is_an_error_and_saves_the_last_good_state(
    here: Path, refused: Callable[..., str], model_dir: Path
) -> None:
    options = ("--model", model_dir / "diverging", "--save", "s", "--quiet")
    assert "diverged" in refused("read", "geese.txt", *options)
    assert session_facts(here / "s")["position"] == 0
    assert run("generate", "--model", model_dir / "diverging", "--session", "s", "--max-tokens", 3) == 0
