"""Every command that the program prints works as it is printed: those in the help, and what `prepare` advises.

Words at the end of a command shorten what would take long; what cannot run here is named with the reason.
"""

import contextlib
import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from cli_helpers import TEXT, run

from ttt_e2e.cli.main import COMMANDS, main
from ttt_e2e.data.text import Document, standard_library_document

ELSEWHERE = {
    "ttt-e2e serve": "does not end; tests/docs runs it",
    "ttt-e2e mcp": "does not end; tests/cli/test_mcp_command.py runs it",
    "ttt-e2e convert from-official": "needs an official checkpoint; tests/convert/test_from_official.py writes one",
    "ttt-e2e convert from-hf": "needs a pretrained checkpoint; tests/docs writes one",
    "ttt-e2e convert from-gguf": "needs a GGUF file; tests/convert/test_from_gguf.py writes one",
    "ttt-e2e cost Qwen/": "the same",
    "ttt-e2e export lora": "needs a session of a converted model; tests/convert/test_to_plain.py has one",
    "ttt-e2e convert to-hf model plain --plain": "the same",
    "ttt-e2e reproduce needles": "reads long texts; tests/docs shortens them",
    "ttt-e2e reproduce latency": "the same",
    "ttt-e2e train small": "the same as tiny, only larger",
    "ttt-e2e prepare c4.parquet": "downloads a tokenizer",
    "ttt-e2e prepare train/": "needs an installed model; tests/reproduce/test_pretrained.py has one",
    "ttt-e2e reproduce pretrained": "the same",
    "torchrun": "starts processes; tests/training does",
}
STANDARD = "hidden_size=16 num_attention_heads=2 intermediate_size=24 sliding_window=1024"
SHAPE = STANDARD.replace("1024", "32 mini_batch_size=16")
STEPS = "context=32 batch=1 accumulate=1 steps=1 warmup_steps=0 eval_tokens=64 --quiet"
END = {
    "read": "--quiet --no-plot --no-baseline",
    "generate": "--max-tokens 3",
    "prepare": "--quiet",
    "train": STEPS,
    "evaluate": "--max-tokens 100",
    "reproduce figure1": "--dry-run",
}


def help_pages() -> Iterator[str]:
    """What --help prints, of the program, of every command and of every action."""
    pages: list[tuple[str, ...]] = [(), *((name,) for name in COMMANDS)]
    for words in pages:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            assert main([*words, "--help"]) == 0
        yield output.getvalue()
        _, is_there, actions = output.getvalue().partition("\n  ACTION")
        if is_there:
            pages += [(*words, name) for name in re.findall(r"^    ([a-z]\S+)", actions, re.M)]


def examples() -> list[str]:
    """The commands in the help: lines that begin with two spaces, without what explains them behind."""
    found = [
        line for page in help_pages() for line in re.findall(r"^  ((?:cat|torchrun|ttt-e2e) (?!\().*)", page, re.M)
    ]
    lines = [re.split(r" {2,}", line)[0] for line in found]
    return [line for line in dict.fromkeys(lines) if " ACTION" not in line and " COMMAND" not in line]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A folder with what the examples take for given."""
    folder = tmp_path_factory.mktemp("workspace")
    for name, text in {
        "BOOK.txt": "The white whale. " + TEXT[:600],
        "books/json.txt": standard_library_document("json").text,
        "books/email.txt": standard_library_document("email").text,
        "more.jsonl": json.dumps({"text": TEXT}),
        "test.jsonl": json.dumps({"text": TEXT[:300]}),
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    shutil.copytree(folder / "books", folder / "TEXTS")
    pyarrow.parquet.write_table(pyarrow.table({"content": [TEXT, TEXT[:300]]}), folder / "c4.parquet")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr("ttt_e2e.inference.load.shipped_model", lambda: model_dir / "model")
        assert run("read", "BOOK.txt", "--save", "book.session", "--notebook", "--quiet", "--no-plot") == 0
        assert run("prepare", "books", "--val", "TEXTS/json.txt", "--out", "tokens", "--quiet") == 0
        for preset, out, shape in (("tiny", "run", SHAPE), ("tiny-window", "standard", STANDARD)):
            assert run("train", preset, "--data", "tokens", "--out", out, *shape.split(), *STEPS.split()) == 0
        shutil.copytree("run/model", "model")
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_every_example_in_the_help_runs(workspace: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = [Document(name, standard_library_document(name).text) for name in ("json", "email")]
    monkeypatch.setattr("ttt_e2e.data.prepare.standard_library", lambda: iter(library))
    monkeypatch.setattr("ttt_e2e.data.text.standard_library_document", lambda: Document("asyncio", TEXT[:600]))
    commands = examples()
    assert len(commands) > 40 and all(any(command.startswith(word) for command in commands) for word in ELSEWHERE)
    for number, command in enumerate(commands):
        if any(command.startswith(beginning) for beginning in ELSEWHERE):
            continue
        folder = Path(shutil.copytree(workspace, here / str(number)))
        monkeypatch.chdir(folder)
        words = shlex.split(command.partition(" > ")[0].rpartition("| ")[2])[1:]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT[:600].encode())))
        words = [
            word for given in words for word in (sorted(map(str, Path().glob(given))) if "*" in given else [given])
        ]
        name = " ".join(words[:2]) if words[0] in ("reproduce", "convert") else words[0]
        if name == "train" and "--from" not in words:
            words[2:2] = (STANDARD if words[1] == "tiny-window" else SHAPE).split()
        if name == "convert from-standard":
            words[2] = "standard/model"
        written = words[words.index("--out") + 1] if "--out" in words else words[3] if words[0] == "convert" else ""
        if written and "--resume" not in words:
            shutil.rmtree(folder / written, ignore_errors=True)
        assert run(*words, *END.get(name, "").split()) == 0, command
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("out", "text", "options", "expected"),
    [
        ("tokens", TEXT, (), ["vocab_size=", "context="]),
        ('it\'s a "folder"/tokens; x', TEXT[:300], (), ["vocab_size=", "context="]),
        ("tokens", "ab", (), ["vocab_size=257", "context=1"]),
        ("tokens", "word " * 300, ("--val-share", 0), ["vocab_size=", "context=", "eval_every=0"]),
        ("tokens", "word " * 300, ("--val", "geese.txt"), ["vocab_size=", "context="]),
    ],
)
def test_what_prepare_advises_works(
    here: Path, capsys: pytest.CaptureFixture[str], out: str, text: str, options: tuple, expected: list[str]
) -> None:
    (here / "input.txt").write_text(text)
    for run_folder in ("run", "run-2") if text == "ab" else ("run",):
        capsys.readouterr()
        assert run("prepare", "input.txt", "--out", out, "--quiet", *options) == 0
        advice = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Train on it with: "))
        words = shlex.split(advice.removeprefix("Train on it with: "))
        assert words[:7] == ["ttt-e2e", "train", "tiny", "--data", out, "--out", run_folder]
        assert len(words) == 7 + len(expected)
        assert all(word.startswith(start) for word, start in zip(words[7:], expected, strict=True))
        assert run(*words[1:], *SHAPE.split(), "steps=1", "batch=1", "--quiet") == 0
