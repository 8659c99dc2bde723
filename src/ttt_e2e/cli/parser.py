"""The parser of the command line: help with examples, and errors in one line that say where help is."""

import argparse
import difflib
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, NoReturn

from ttt_e2e import __version__


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=100),
            **options,
        )
        self.set_defaults(parser=self)  # in the parsed arguments it is the parser of the command, or of its action

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ttt-e2e: error: {message.rstrip('.')}. See {self.prog} --help.\n")


def parse(argv: list[str], commands: Mapping[str, ModuleType]) -> argparse.Namespace:
    """Parse `argv`; `run` in the result is the function of the command that it names.

    Raises SystemExit, as argparse does, after --help, --version and for an invalid command line.
    """
    parser = _Parser(
        prog="ttt-e2e",
        description="A language model that keeps learning while it reads (end-to-end test-time training).",
        epilog="""Start with:
  ttt-e2e read                      read part of Python's own source with the shipped model
  ttt-e2e read BOOK.txt             read your own text
  ttt-e2e COMMAND --help            what a command does, with examples

Train your own model:
  ttt-e2e prepare TEXTS --out tokens
  ttt-e2e train tiny --data tokens --out run
  ttt-e2e read BOOK.txt --model run/model""",
    )
    parser.add_argument("--version", action="version", version=f"ttt-e2e {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in commands.items():
        sub = subparsers.add_parser(name, help=command.HELP, description=command.DESCRIPTION, epilog=command.EPILOG)
        sub.set_defaults(run=command.run)
        command.add_arguments(sub)
    if not argv:
        parser.print_help()
        raise SystemExit(2)
    first = next((word for word in argv if not word.startswith("-")), None)
    if first is not None and first not in commands:
        parser.error(f"there is no command {first!r}{_suggestion(first, commands)}; there are: {', '.join(commands)}")
    arguments, extra = parser.parse_known_args(argv)
    if extra:
        _complete_list(arguments, extra)
    return arguments


def _complete_list(arguments: argparse.Namespace, extra: list[str]) -> None:
    """Append `extra`, the words that argparse left over, to the command's list of arguments; otherwise an error.

    argparse accepts a list only in one piece: words of it that follow an option are left over.
    """
    parser = arguments.parser
    option = next((word.partition("=")[0] for word in extra if word.startswith("-")), None)
    if option is not None:
        parser.error(f"there is no option {option}{_suggestion(option, parser._option_string_actions)}")
    positionals = [action for action in parser._actions if not action.option_strings]
    lists = [action for action in positionals if action.nargs in ("*", "+")]
    if not lists:
        parser.error(f"unexpected argument {extra[0]!r}")
    name, convert = lists[0].dest, lists[0].type or str
    setattr(arguments, name, [*getattr(arguments, name), *map(convert, extra)])


def _suggestion(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
