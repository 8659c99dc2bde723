"""What the tests of the command line share."""

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import start_command

from ttt_e2e.cli.main import main
from ttt_e2e.inner_loop.compiled import compiled_functions
from ttt_e2e.inner_loop.functions import LoopFunctions

TEXT = "".join(f"{i} grey geese flew over the {'lake' if i % 2 else 'wood'} at dusk.\n" for i in range(40))


def run(*argv: object) -> int:
    """Run the command line in this process; returns its exit code."""
    return main([str(word) for word in argv])


def fails_to_compile(device: torch.device, sharded: None = None) -> LoopFunctions:
    """`compiled_functions` on a machine without a compiler."""

    def broken(*_: object) -> None:
        raise RuntimeError("no compiler on this machine")

    return compiled_functions(device, broken)  # type: ignore[arg-type]


def is_compilation_warning(error: str) -> bool:
    """Whether `error` is one line that says that compilation failed."""
    begin = "ttt-e2e: warning: Continuing without compilation"
    return error.count("\n") == 1 and error.startswith(begin) and "compiler" in error


def kill_while_reading(command: list[str], text: str, progress: Callable[[], object], delay: float) -> str:
    """Run a `ttt-e2e` command in a copy of this process, kill it while it reads standard input; returns its errors.

    It is given `text` and no end of file, so it cannot finish before the kill, which comes `delay` seconds after the
    value of `progress` has changed.
    """
    before = progress()
    stdin, ours = os.pipe()
    with tempfile.TemporaryFile() as stderr, Path(os.devnull).open("w") as null, os.fdopen(ours, "wb", 0) as pipe:
        child = start_command(command, stdin, null.fileno(), stderr.fileno(), pipe.close)
        os.close(stdin)
        pipe.write(text.encode())
        while os.waitpid(child, os.WNOHANG) == (0, 0) and progress() == before:
            time.sleep(0.005)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        stderr.seek(0)
        error = stderr.read().decode()
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, error
    return error


def temporary_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]
