"""Standard streams that are closed, full or without a reader: no traceback, and what was to be saved is saved."""

import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import run

COMMAND = f'"{sys.executable}" -m ttt_e2e'
FULL = "ttt-e2e: error: No space left on the disk while writing standard output"


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell, in which TTT stands for the command."""
    return subprocess.run(["bash", "-c", line.replace("TTT", COMMAND)], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("line", "code", "error"),
    [
        ("TTT presets <&- >&- 2>&-", 0, ""),
        ("TTT presets > /dev/full", 1, FULL),
        ("TTT presets | true; exit ${PIPESTATUS[0]}", 1, ""),
        ("TTT nonsense 2>&- >&-", 2, ""),
        ("TTT --help > /dev/full", 1, FULL),
    ],
)
def test_a_missing_stream_is_no_traceback(line: str, code: int, error: str) -> None:
    # `true` may end before or after the output has been written into the pipe.
    done = shell(line)
    assert done.returncode == code or ("true" in line and done.returncode == 0)
    assert done.stderr.startswith(error) and done.stderr.count("\n") == (1 if error else 0)
    assert done.stdout == "" or " >" not in line


@pytest.mark.parametrize("streams", ["<&- > /dev/full 2>&-"])
def test_what_is_read_is_saved_without_any_stream(here: Path, model_dir: Path, streams: str) -> None:
    options = "read geese.txt --no-plot --no-baseline --threads 1"
    assert run(*options.split(), "--save", "expected", "--quiet") == 0
    done = shell(f"TTT {options} --model {model_dir / 'model'} --save s {streams}")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert (here / "s").read_bytes() == (here / "expected").read_bytes()
    assert sorted(path.name for path in here.iterdir()) == ["expected", "geese.txt", "s"]


def test_standard_input_that_is_closed_is_an_empty_text(here: Path, model_dir: Path) -> None:
    done = shell(f"TTT read - --model {model_dir / 'model'} --save s --quiet <&-")
    assert done.returncode == 1 and "standard input is empty" in done.stderr and done.stderr.count("\n") == 1
    assert not (here / "s").exists()
