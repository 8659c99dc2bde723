"""The process `ttt-e2e`: standard streams that may be closed, full or without a reader, and an end without delay.

What cannot be printed is no reason to lose what was to be saved: the command goes on, and fails at its end.
"""

import atexit
import io
import os
import signal
import sys
from typing import IO, Any, NoReturn

from ttt_e2e.cli.main import main


def run() -> NoReturn:
    """Run the command line of this process, and end it."""
    for descriptor in range(3):
        _open_if_closed(descriptor)
    if sys.stdin is None:
        sys.stdin = _text(io.FileIO(0, closefd=False), "<stdin>")
    sys.stdout = _text(_Printer(1, "w", closefd=False), "<stdout>", sys.stdout)
    sys.stderr = _text(_Printer(2, "w", closefd=False), "<stderr>", sys.stderr, line_buffering=True)
    code = main()
    # The command has ended, so nothing may stop the process with another exit code, while PyTorch takes a second to go.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


class _Printer(io.FileIO):
    """A stream that drops everything after the first error, which it keeps for `common.check_output`."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return super().write(data) or 0
            except OSError as error:
                self.error = error
                error.filename = "standard output" if self.fileno() == 1 else self.name
        return memoryview(data).nbytes


def _open_if_closed(descriptor: int) -> None:
    """Otherwise the next file that is opened takes the number, and what libraries print ends up in it."""
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, descriptor)
        if null != descriptor:
            os.close(null)


def _text(raw: io.FileIO, name: str, old: IO[str] | None = None, line_buffering: bool = False) -> io.TextIOWrapper:
    """A text stream over `raw`, with the encoding of the stream that it replaces."""
    raw.name = name  # as of the streams that Python opens
    buffer = io.BufferedReader(raw) if raw.readable() else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, getattr(old, "encoding", "utf-8"), line_buffering=line_buffering or raw.isatty())
