"""The command `ttt-e2e`: it finds the command's file, runs it, and turns errors into sentences.

Every command is one file here, which defines HELP (its line in the list of commands), DESCRIPTION, EPILOG (examples),
`add_arguments(parser)` and `run(arguments)`, which returns the exit code. What takes long to import, PyTorch above all,
is imported inside `run`, so that help is fast.
"""

import errno
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from ttt_e2e.cli.common import check_output
from ttt_e2e.cli.parser import parse
from ttt_e2e.errors import INTERRUPTED, UserError

_NAMES = "read generate notebook prepare train evaluate presets cost convert export serve mcp reproduce info"
COMMANDS = {name: import_module(f"ttt_e2e.cli.{name}") for name in _NAMES.split()}


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process); returns the exit code.

    0: success. 1: an error that the user can fix, explained in one sentence. 2: an invalid command line. 130: Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a character that the terminal lacks is no reason to stop
    try:
        try:
            arguments = parse(sys.argv[1:] if argv is None else argv, COMMANDS)
            with warnings_in_one_line():
                code: int = arguments.run(arguments)
        except SystemExit as stop:  # from argparse: --help, --version or an invalid command line
            code = stop.code if isinstance(stop.code, int) else 2
        check_output()
        return code
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has ended, as `head` does; otherwise the interpreter would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" while writing {error.filename}" if error.filename else ""
            return _fail(f"No space left on the disk{where}; make room and run the command again.")
        if error.filename is None:
            raise
        name = str(error.filename)
        name = name if len(name) <= 200 else f"{name[:200]}..."
        return _fail(f"Cannot use {name}: {error.strerror}; check the name and the permissions.")


def _fail(sentence: str) -> int:
    print(f"ttt-e2e: error: {' '.join(sentence.split())}", file=sys.stderr)
    return 1


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Inside the block, warnings of this package are printed in one line, like errors; others as Python prints them."""
    package = Path(__file__).parents[1]

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        if package in Path(filename).parents:
            from tqdm import tqdm

            # Above the progress bar, if there is one.
            tqdm.write(f"ttt-e2e: warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            default_show(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        default_show, warnings.showwarning = warnings.showwarning, show
        yield
