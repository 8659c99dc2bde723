"""The command line as a whole: help, errors in one sentence, exit codes, warnings."""

import errno
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import TEXT, run

from ttt_e2e.cli import main as cli
from ttt_e2e.cli.main import COMMANDS, warnings_in_one_line
from ttt_e2e.inference import session_file

CONVERSIONS = ("from-hf", "from-gguf", "from-standard", "from-official", "to-hf")
ACTIONS = (*(f"convert {name}" for name in CONVERSIONS), "notebook search")


@pytest.mark.parametrize("command", ["", *COMMANDS, *ACTIONS])
def test_help_teaches_by_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command.split(), "--help") == 0
    assert f"ttt-e2e {command}" in capsys.readouterr().out.split("\n\n", 1)[1]  # after the usage


def test_help_and_version_import_neither_torch_nor_numpy() -> None:
    script = (
        "import sys; from ttt_e2e.cli.main import main, COMMANDS; main(['--version']); main(['--help']); "
        "[main([name, '--help']) for name in COMMANDS]; main(['notebook', 'search', '--help']); "
        "assert not {'torch', 'numpy', 'fastapi'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("raed x", "did you mean read"),
        ("read x --plo y", "did you mean --plot"),
        ("read --notebok", "did you mean --notebook"),
        ("read x y", "unexpected argument 'y'"),
        ("read --dtype float7", "float7"),
        ("read x --threads 0", "'0' is not a whole number"),
        ("generate x --max-tokens many", "many"),
        ("cost tiny --context 12X", "'12X' is not a number of tokens"),
        ("cost tiny --context 0", "'0' is not a number of tokens"),
        ("train tiny --out r", "--data"),
        ("train tiny --data d --out r --extend 0", "'0' is not a whole number"),
        ("notebook", "ACTION"),
        ("notebook serach s x", "serach"),
        ("notebook search s", "WORDS"),
        ("notebook search s x --cuont 2", "did you mean --count"),
        ("--nonsense", "COMMAND"),
    ],
)
def test_invalid_command_lines(here: Path, refused: Callable[..., str], argv: str, words: str) -> None:
    error = refused(*argv.split(), code=2)
    assert words in error and "--help" in error


@pytest.mark.parametrize(
    "argv",
    [
        "read geese.txt --model nowhere",
        "read geese.txt --model .",
        "read geese.txt --session geese.txt",
        "read geese.txt --session missing",
        "read geese.txt --save geese.txt",
        "read geese.txt --save .",
        "read geese.txt --plot p.docx",
        "read geese.txt --plot p.png --no-plot",
        "read geese.txt --device tpu",
        "generate x --stop=",
        "generate x --save s",
        "generate x --learn --save geese.txt",
        "generate x --session geese.txt",
        "info nowhere",
        "info geese.txt",
        "evaluate missing",
    ],
)
def test_errors_are_one_sentence(here: Path, refused: Callable[..., str], argv: str) -> None:
    refused(*argv.split())
    assert (here / "geese.txt").read_text() == TEXT


def test_unusable_names_are_errors(here: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "File name too long" in refused("read", "a whole paragraph in place of a name " * 20)

    def forbidden(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", forbidden)
    assert "geese.txt: Permission denied" in refused("read", "geese.txt")


def test_a_full_disk_is_an_error_and_keeps_the_session(
    here: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("read", "geese.txt", "--save", "s", "--quiet") == 0
    before = (here / "s").read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session_file, "save_safetensors", full)
    assert "No space left" in refused("read", "geese.txt", "--save", "s", "--quiet", "--no-plot")
    assert (here / "s").read_bytes() == before


def raising(error: type[BaseException]) -> Callable[..., None]:
    def function(*arguments: object, **options: object) -> None:
        raise error

    return function


def test_ctrl_c_has_its_exit_code(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt_e2e.reading.document.read_document", raising(KeyboardInterrupt))
    assert run("read", "geese.txt") == cli.INTERRUPTED


def test_bugs_are_not_hidden(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt_e2e.reading.document.read_document", raising(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        run("read", "geese.txt")


def test_warnings_of_other_packages_are_shown_as_usual(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    with warnings_in_one_line():
        warnings.simplefilter("always")
        warnings.warn_explicit("of\nours", UserWarning, cli.__file__, 1)
        warnings.warn_explicit("of ours", UserWarning, session_file.__file__, 1)
        warnings.warn_explicit("of theirs", UserWarning, json.__file__, 1)
    assert capsys.readouterr().err == "ttt-e2e: warning: of ours\n" * 2
    assert shown == ["of theirs"]
