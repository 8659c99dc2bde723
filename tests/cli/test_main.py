"""The command line from end to end, with a tiny random model: what it prints, and how it refuses."""

import errno
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import small_model

from ttt_e2e.cli import main as cli
from ttt_e2e.cli.common import warnings_in_one_line
from ttt_e2e.config.presets import PRESETS
from ttt_e2e.data.text import Document
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.inference import session as session_module
from ttt_e2e.inference import session_file as session_files
from ttt_e2e.inference.session_file import session_facts
from ttt_e2e.inner_loop.compiled import compiled_functions
from ttt_e2e.inner_loop.step import LoopFunctions
from ttt_e2e.model.checkpoint import save_model

TEXT = "".join(f"{i} grey geese flew over the {'lake' if i % 2 else 'wood'} at dusk.\n" for i in range(40))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train([TEXT], 290)
    tokenizer.save(folder / "t.json")
    save_model(small_model(vocab_size=tokenizer.vocab_size), folder / "model", folder / "t.json")
    wild = small_model(vocab_size=tokenizer.vocab_size, inner_loop__lr=1e30)
    save_model(wild, folder / "wild", folder / "t.json")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> Path:
    """A working folder with a text, in which a copy of the model is the shipped one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session_module, "shipped_model", lambda: model_dir / "model")
    (tmp_path / "geese.txt").write_text(TEXT)
    return tmp_path


def run(*argv: object) -> int:
    return cli.main([str(word) for word in argv])


def refused(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 1) -> str:
    """Run what must fail in one sentence; returns the sentence."""
    capsys.readouterr()
    assert run(*argv) == code
    captured = capsys.readouterr()
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith("ttt-e2e: error: ") and "Traceback" not in captured.err
    return error


# -- what works --------------------------------------------------------------------------------------------------------


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

    assert run("read", "geese.txt", "--session", "geese.session", "--no-picture", "--quiet", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > 0


def test_a_session_in_half_the_space(here: Path) -> None:
    options = ("--no-picture", "--quiet")
    assert run("read", "geese.txt", "--save", "exact", *options) == 0
    assert run("read", "geese.txt", "--save", "small", "--precision", "bfloat16", *options) == 0
    exact, small = (session_facts(here / name) for name in ("exact", "small"))
    assert (exact["precision"], small["precision"]) == ("float32", "bfloat16")
    assert small["text_digest"] == exact["text_digest"]
    assert (here / "small").stat().st_size < (here / "exact").stat().st_size
    learned = ("--session", "small", "--learn", "--save", "more", "--precision", "float16")
    assert run("generate", "The geese", "--max-tokens", 3, *learned) == 0
    assert session_facts(here / "more")["precision"] == "float16"


def test_read_json_prints_json_only(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("read", "geese.txt", "--json", "--picture", "p.svg") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == len(TEXT) and len(report["parts"]) == 10
    assert report["gain"] == pytest.approx(report["loss_without"] - report["loss"])
    assert (here / "p.svg").exists()


def test_read_standard_input_equals_the_file(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("read", "geese.txt", "--json", "--no-picture", "--quiet") == 0
    file = json.loads(capsys.readouterr().out)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert run("read", "-", "--json", "--no-picture", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["loss"] == file["loss"]


def test_read_without_a_file(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt_e2e.data.text.standard_library_document", lambda: Document("asyncio", TEXT))
    assert run("read", "--quiet", "--no-learning") == 0
    assert "Python's asyncio" in capsys.readouterr().out
    assert (here / "Python-asyncio.reading.png").exists()


def no_compiler(device: torch.device) -> LoopFunctions:
    """`compiled_functions` on a machine that has none."""

    def broken(*_: object) -> None:
        raise RuntimeError("no compiler on this machine")

    return compiled_functions(device, broken)  # type: ignore[arg-type]


def failed_compilation(error: str) -> bool:
    """Whether `error` is one line that says so."""
    begin = "ttt-e2e: warning: Going on without compilation"
    return error.count("\n") == 1 and error.startswith(begin) and "compiler" in error


def test_read_compiled(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(session_module, "compiled_functions", no_compiler)
    options = ("--no-picture", "--quiet", "--compile")
    assert run("read", "geese.txt", *options) == 0
    assert failed_compilation(capsys.readouterr().err)
    assert run("read", "geese.txt", *options, "--no-learning") == 0
    assert capsys.readouterr().err.startswith("Nothing is compiled")


@pytest.mark.slow
def test_without_a_compiler_the_result_is_the_same(here: Path, model_dir: Path) -> None:
    command = [sys.executable, "-m", "ttt_e2e", "read", "geese.txt", "--model", str(model_dir / "model")]
    command += ["--json", "--no-picture", "--quiet", "--device", "cpu", "--threads", "1"]
    without = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(here / "cache")}
    plain = subprocess.run(command, check=True, capture_output=True, text=True)
    compiled = subprocess.run([*command, "--compile"], check=True, capture_output=True, text=True, env=without)
    assert json.loads(compiled.stdout)["loss"] == pytest.approx(json.loads(plain.stdout)["loss"], abs=1e-4)
    assert failed_compilation(compiled.stderr)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_read_with_generated_code(here: Path, model_dir: Path) -> None:
    command = [sys.executable, "-m", "ttt_e2e", "read", "geese.txt", "--model", str(model_dir / "model")]
    command += ["--json", "--no-picture", "--quiet", "--device", "cpu", "--threads", "1"]
    fresh = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(here / "cache")}
    plain = subprocess.run(command, check=True, capture_output=True, text=True)
    compiled = subprocess.run([*command, "--compile"], check=True, capture_output=True, text=True, env=fresh)
    assert json.loads(compiled.stdout)["loss"] == pytest.approx(json.loads(plain.stdout)["loss"], abs=1e-4)
    assert compiled.stderr == "" and any((here / "cache").rglob("*.so"))


def test_warnings_of_others_are_shown_as_ever(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    with warnings_in_one_line():
        warnings.simplefilter("always")
        warnings.warn_explicit("of\nours", UserWarning, cli.__file__, 1)
        warnings.warn_explicit("of theirs", UserWarning, json.__file__, 1)
    assert capsys.readouterr().err == "ttt-e2e: warning: of ours\n"
    assert shown == ["of theirs"]


def test_generate_that_learns_goes_on_with_its_session(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("read", "geese.txt", "--save", "s", "--quiet", "--no-picture") == 0
    capsys.readouterr()
    options = ("--session", "s", "--top-k", 20, "--min-p", 0.01, "--max-tokens", 40, "--json", "--learn")
    assert run("generate", "The geese", *options, "--save", "long") == 0
    text = json.loads(capsys.readouterr().out)["text"]
    stop = text[8:11]
    assert run("generate", "The geese", *options, "--save", "short", "--stop", "%%", "--stop", stop) == 0
    assert json.loads(capsys.readouterr().out)["text"] == text[: text.index(stop)]
    read, short, long = (session_facts(here / name)["tokens"] for name in ("s", "short", "long"))
    assert read < short < long == read + len(Tokenizer.load(session_module.shipped_model()).encode("The geese")) + 40
    assert run("generate", "x", "--session", "long", "--max-tokens", 3) == 0


def test_killed_at_random_and_run_again_it_ends_alike(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "geese.txt").write_text(TEXT * 6)
    command = ["read", "geese.txt", "--json", "--no-picture", "--device", "cpu", "--threads", "1", "--save-every", "0"]

    def report_of(*more: str) -> dict:
        capsys.readouterr()
        assert run(*command, *more) == 0
        report = json.loads(capsys.readouterr().out)
        return {name: value for name, value in report.items() if name not in ("seconds", "learning_seconds")}

    def tokens_kept() -> int:
        unfinished = (here / "s").exists() and session_facts(here / "s").get("unfinished")
        return unfinished["tokens"] if unfinished else 0

    model = str(session_module.shipped_model())
    moments, killed = random.Random(), 0
    for _ in range(3):
        kept = tokens_kept()
        with subprocess.Popen(
            [sys.executable, "-m", "ttt_e2e", *command, "--save", "s", "--model", model],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as process:
            while process.poll() is None and tokens_kept() <= kept:
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.2))
            process.kill()
            killed += process.wait() == -signal.SIGKILL
            assert process.stderr is not None
            assert kept == 0 or f"Going on after {kept:,} tokens" in process.stderr.read().decode()
    assert killed and tokens_kept()
    report = report_of("--save", "s", "--model", model)
    assert capsys.readouterr().out == ""
    expected = report_of("--save", "whole", "--model", model)
    assert report.pop("tokens_per_second") > 0 and expected.pop("tokens_per_second") > 0
    assert report == expected
    assert (here / "s").read_bytes() == (here / "whole").read_bytes()
    assert [path.name for path in here.iterdir() if path.name.endswith(".part")] == []


def test_standard_input_that_is_fed_again_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fed(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    options = ("--save", "s", "--save-every", 0, "--no-picture", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr("ttt_e2e.reading.resume.write_session_file", stopping_after(session_files.write_session_file))
        fed(TEXT)
        assert run("read", "-", *options) == cli.INTERRUPTED
    assert run("info", "s") == 0
    assert re.search(r"unfinished +after \d+ tokens of standard input", capsys.readouterr().out)
    fed("Other " + TEXT)
    assert "does not begin with" in refused(capsys, "read", "-", *options)
    fed(TEXT)
    assert run("read", "-", *options) == 0
    assert session_facts(here / "s")["text_bytes"] == len(TEXT.encode())


def stopping_after(function: Callable[..., None]) -> Callable[..., None]:
    """The function, and then an end as by Ctrl-C twice."""

    def call(*arguments: object) -> None:
        function(*arguments)
        raise KeyboardInterrupt

    return call


def test_evaluate(here: Path, capsys: pytest.CaptureFixture[str], model_dir: Path) -> None:
    (here / "b.jsonl").write_text(json.dumps({"body": TEXT[:300], "title": "short"}) + "\n")
    assert run("evaluate", "geese.txt", "--max-tokens", 60, "--quiet") == 0
    assert "geese.txt" in capsys.readouterr().out
    options = ("--model", model_dir / "model", "--text-column", "body", "--json", "--quiet")
    assert run("evaluate", "b.jsonl", *options, "geese.txt") == 0
    report = json.loads(capsys.readouterr().out)
    assert [document["name"] for document in report["documents"]] == ["short", "geese.txt"]
    measured = report["measured"]
    assert run("info", model_dir / "model", "--json") == 0
    assert measured["model"] == json.loads(capsys.readouterr().out)["digest"]
    assert (measured["max_tokens"], measured["dtype"]) == (None, "float32")
    assert measured["machine"]["device"] == "cpu"


def test_prepare_train_and_extend(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("ttt_e2e.training.trainer.compiled_functions", no_compiler)
    for i in range(4):
        (here / f"t{i}.txt").write_text(TEXT * (i + 1))
    texts = [f"t{i}.txt" for i in range(4)]
    assert run("prepare", *texts[:3], "--val", texts[3], "--out", "tokens", "--vocab-size", 280, "--quiet") == 0
    assert "ttt-e2e train" in capsys.readouterr().out
    shape = [
        "vocab_size=280",
        "hidden_size=16",
        "num_hidden_layers=2",
        "num_attention_heads=2",
        "intermediate_size=16",
        "suffix_layers=1",
    ]
    small = ["sliding_window=16", "mini_batch_size=8", "context=32", "batch=2", "steps=2", "eval_tokens=64"]
    assert run("train", "tiny", *shape, *small, "--data", "tokens", "--out", "run", "--quiet", "--compile") == 0
    assert failed_compilation(capsys.readouterr().err)
    assert run("read", "geese.txt", "--model", "run/model", "--quiet", "--no-picture") == 0
    longer = [
        "--from",
        "run/model",
        "--extend",
        64,
        "batch=1",
        "steps=1",
        "--data",
        "tokens",
        "--out",
        "long",
    ]
    assert run("train", "tiny", *longer, "--quiet") == 0
    assert json.loads((here / "long" / "config.json").read_text())["train"]["context"] == 64


def test_info_and_presets(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert info["kind"] == "model" and info["width"] == 16
    assert run("read", "geese.txt", "--save", "s", "--quiet", "--no-picture") == 0
    assert run("info", "s") == 0
    assert "session" in capsys.readouterr().out
    assert run("presets") == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^{name}\b", out, re.M) for name in PRESETS)


@pytest.mark.parametrize("command", ["", "read", "generate", "prepare", "train", "evaluate", "presets", "cost", "info"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command.split(), "--help") == 0
    assert "ttt-e2e " in capsys.readouterr().out.split("usage:")[1]


def test_help_and_version_need_no_torch() -> None:
    script = "import sys; from ttt_e2e.cli.main import main; main(['read', '--help']); main(['cost', 'tiny']); "
    script += "main(['--version']); "
    script += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_texts_that_are_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("read", "geese.txt", "--save", "s", "--quiet") == 0
    kept = {name: (here / name).read_bytes() for name in ("s", "geese.reading.png")}
    (here / "empty").write_bytes(b"")
    (here / "binary").write_bytes(b"\x7fELF\0\0\1")
    (here / "half").write_bytes(TEXT.encode() * 3 + b"\xe2\x82")
    (here / "folder").mkdir()
    cases = {
        "missing": "does not exist",
        "empty": "is empty",
        "binary": "binary",
        "half": "UTF-8",
        "folder": "folder",
    }
    for name, words in cases.items():
        for command in (["read", name, "--save", "s", "--picture", "geese.reading.png", "--quiet"],):
            error = refused(capsys, *command)
            assert words in error and name in error
    for name in ("missing", "empty", "half"):
        assert cases[name] in refused(capsys, "evaluate", name, "--quiet")
    assert {name: (here / name).read_bytes() for name in kept} == kept


def test_half_valid_standard_input(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode() + b"\xff")))
    assert "UTF-8" in refused(capsys, "read", "-", "--save", "s", "--quiet")
    assert sorted(path.name for path in here.iterdir()) == ["geese.txt"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("raed x", "did you mean read"),
        ("read x --pictur y", "did you mean --picture"),
        ("read x y", "too many"),
        ("read --dtype float7", "float7"),
        ("generate x --max-tokens many", "many"),
        ("cost tiny --context 12X", "'12X' is no number of tokens"),
        ("cost tiny --context 0", "'0' is no number of tokens"),
        ("train tiny --out r", "--data"),
        ("--nonsense", "COMMAND"),
    ],
)
def test_command_lines_that_are_none(here: Path, capsys: pytest.CaptureFixture[str], argv: str, words: str) -> None:
    error = refused(capsys, *argv.split(), code=2)
    assert words in error and "--help" in error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("train tniy", "'tiny'"),
        ("train tiny stepps=3", "'steps'"),
        ("train tiny steps=many", "whole number"),
        ("train tiny mini_batch=1024", "b <= k"),
        ("train tiny suffix_layers=9", "suffix of 9"),
        ("train tiny --extend 64", "--from"),
        ("train tiny --from nowhere", "nowhere"),
        ("train tiny", "tokens"),
    ],
)
def test_settings_that_do_not_fit(here: Path, capsys: pytest.CaptureFixture[str], argv: str, words: str) -> None:
    assert words in refused(capsys, *argv.split(), "--data", "tokens", "--out", "run")
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    "argv",
    [
        "read geese.txt --model nowhere",
        "read geese.txt --model .",
        "read geese.txt --session geese.txt",
        "read geese.txt --session missing",
        "read geese.txt --save geese.txt",
        "read geese.txt --save .",
        "read geese.txt --picture p.docx",
        "read geese.txt --picture p.png --no-picture",
        "read geese.txt --device tpu",
        "read geese.txt --threads 0",
        "generate x --top-p 2",
        "generate x --top-k -1",
        "generate x --stop=",
        "generate x --save s",
        "generate x --learn --save geese.txt",
        "read geese.txt --save s --save-every -1",
        "generate x --session geese.txt",
        "info nowhere",
        "info geese.txt",
        "evaluate missing",
        "evaluate geese.txt --batch 0",
    ],
)
def test_refused_in_one_sentence(here: Path, capsys: pytest.CaptureFixture[str], argv: str) -> None:
    refused(capsys, *argv.split())
    assert (here / "geese.txt").read_text() == TEXT


def test_names_that_cannot_be_used(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "File name too long" in refused(capsys, "read", "a whole paragraph in place of a name " * 20)

    def forbidden(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", forbidden)
    assert "geese.txt: Permission denied" in refused(capsys, "read", "geese.txt")


def test_a_session_goes_on_learning_or_not(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("read", "geese.txt", "--save", "s", "--no-picture", "--quiet") == 0
    assert "goes on as it began" in refused(capsys, "read", "geese.txt", "--session", "s", "--no-learning")


def test_a_session_goes_on_in_its_dtype(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("read", "geese.txt", "--save", "s", "--dtype", "bfloat16", "--no-picture", "--quiet") == 0
    assert "goes on in bfloat16" in refused(capsys, "generate", "x", "--session", "s", "--dtype", "float32")
    assert run("generate", "x", "--session", "s", "--max-tokens", "2") == 0


def test_checkpoints_that_are_not_whole(here: Path, capsys: pytest.CaptureFixture[str], model_dir: Path) -> None:
    for name in ("truncated", "altered", "mismatched"):
        shutil.copytree(model_dir / "model", here / name)
    weights = (model_dir / "model" / "model.safetensors").read_bytes()
    (here / "truncated" / "model.safetensors").write_bytes(weights[:-100])
    (here / "altered" / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    Tokenizer.train([TEXT], 260).save(here / "mismatched" / "tokenizer.json")
    for name, words in (("truncated", "truncated"), ("altered", "altered"), ("mismatched", "vocabulary")):
        assert words in refused(capsys, "read", "geese.txt", "--model", name, "--quiet")


def test_divergence_is_said_and_the_good_state_is_saved(
    here: Path, capsys: pytest.CaptureFixture[str], model_dir: Path
) -> None:
    options = ("--model", model_dir / "wild", "--save", "s", "--quiet")
    assert "diverged" in refused(capsys, "read", "geese.txt", *options)
    assert session_facts(here / "s")["position"] == 0
    assert run("generate", "--model", model_dir / "wild", "--session", "s", "--max-tokens", 3) == 0


def test_a_full_disk(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("read", "geese.txt", "--save", "s", "--quiet") == 0
    before = (here / "s").read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session_files, "save_safetensors", full)
    assert "No space left" in refused(capsys, "read", "geese.txt", "--save", "s", "--quiet", "--no-picture")
    assert (here / "s").read_bytes() == before


def test_ctrl_c(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ttt_e2e.reading.document.read_document", interrupted)
    assert run("read", "geese.txt") == cli.INTERRUPTED


def test_our_own_bugs_are_not_hidden(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("ttt_e2e.reading.document.read_document", bug)
    with pytest.raises(ZeroDivisionError):
        run("read", "geese.txt")
