"""What the command line looks like: sub-commands, options, help, and errors in one line with a hint."""

import argparse
import difflib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from ttt_e2e import __version__
from ttt_e2e.cli import convert as convert_command
from ttt_e2e.cli import cost as cost_command
from ttt_e2e.cli import notebook as notebook_command
from ttt_e2e.cli import reproduce as reproduce_command
from ttt_e2e.cli import serve as serve_command

_WIDTH = 100
# Commands that take a list of arguments: its name and its type.
_LISTS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "prepare": ("sources", Path),
    "train": ("settings", str),
    "cost": ("settings", str),
    "evaluate": ("files", Path),
    "notebook": ("words", str),
    "convert": ("settings", str),
}
Run = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """Errors in one line with a hint where help is."""

    def __init__(self, **options: Any) -> None:
        options.setdefault(
            "formatter_class",
            lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=_WIDTH),
        )
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        message = message.rstrip(".")
        self.exit(2, f"ttt-e2e: error: {message}. See {self.prog} --help.\n")


def parse(argv: list[str], functions: Mapping[str, Run]) -> argparse.Namespace:
    """The arguments in `argv`; their `run` is the function of the sub-command that they name.

    Raises SystemExit, as argparse does, after --help, --version or a command line that is none.
    """
    parser, commands = _parser(functions)
    if not argv:
        parser.print_help()
        raise SystemExit(2)
    first = next((word for word in argv if not word.startswith("-")), None)
    names = [name for name in commands if " " not in name]
    if first is not None and first not in names:
        parser.error(f"there is no command {first!r}{_near(first, names)}; there are: {', '.join(names)}")
    arguments, extra = parser.parse_known_args(argv)
    name, kind = _LISTS.get(arguments.command, ("", str))
    if hasattr(arguments, name) and not any(word.startswith("-") for word in extra):
        # argparse takes a list only where it stands in one piece; what follows an option goes to its end.
        setattr(arguments, name, [*getattr(arguments, name), *map(kind, extra)])
        extra = []
    if extra:
        command = commands[" ".join(filter(None, (arguments.command, getattr(arguments, "action", None))))]
        options = list(command._option_string_actions)
        option = extra[0].partition("=")[0]
        if option.startswith("-"):
            command.error(f"there is no option {option}{_near(option, options)}")
        command.error(f"there is one argument too many: {extra[0]!r}")
    return arguments


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Inside, warnings of this package are shown in one line, as errors are; those of others as Python shows them."""
    package = Path(__file__).parent

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if package in Path(filename).parents:
            from tqdm import tqdm

            # Above a progress bar, if one is there.
            tqdm.write(f"ttt-e2e: warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            shown(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        shown, warnings.showwarning = warnings.showwarning, show
        yield


def _near(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1)
    return f", did you mean {near[0]}?" if near else ""


def _parser(functions: Mapping[str, Run]) -> tuple[_Parser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(
        prog="ttt-e2e",
        description="A language model that keeps learning while it reads (end-to-end test-time training).",
        epilog="""Begin with:
  ttt-e2e read                      read a document that every Python has, with the shipped model
  ttt-e2e read BOOK.txt             read a text of yours
  ttt-e2e COMMAND --help            what a command does, with examples

A model of your own:
  ttt-e2e prepare TEXTS --out tokens
  ttt-e2e train tiny --data tokens --out run
  ttt-e2e read BOOK.txt --model run/model""",
    )
    parser.add_argument("--version", action="version", version=f"ttt-e2e {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, short: str, description: str, epilog: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=short, description=description, epilog=epilog)
        sub.set_defaults(run=functions[name])
        return sub

    sub = command(
        "read",
        "read a text while learning from it",
        """Read a text of any length, learning from it mini-batch by mini-batch, and show what that was worth:
the loss along the text with learning and without it (the same weights and window, nothing updated).
Losses are in nats per token: the lower, the better the model foresaw the text.""",
        """examples:
  ttt-e2e read                            the source of Python's asyncio package
  ttt-e2e read BOOK.txt --save book.session
  ttt-e2e generate --session book.session "Once more"
  cat *.txt | ttt-e2e read -              standard input
  ttt-e2e read BOOK.txt --json > report.json

Ctrl-C ends the reading within eight mini-batches; summary, picture and session are still written.
With --save, the same command goes on where it stopped, after Ctrl-C as after a power cut.""",
    )
    sub.add_argument("file", nargs="?", metavar="FILE", help="a UTF-8 text; - for standard input")
    _model_options(sub)
    sub.add_argument("--session", type=Path, metavar="SESSION", help="go on reading with this saved session")
    sub.add_argument("--save", type=Path, metavar="SESSION", help="keep what was learned in this file")
    sub.add_argument(
        "--save-every",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="keep it so often on the way (default: 30)",
    )
    _precision(sub)
    notebook_command.add_reading_options(sub)
    sub.add_argument("--picture", type=Path, metavar="PATH", help="where to draw (default: NAME.reading.png here)")
    sub.add_argument("--no-picture", action="store_true", help="draw nothing")
    sub.add_argument("--no-baseline", action="store_true", help="do not read a second time without learning: faster")
    sub.add_argument("--no-learning", action="store_true", help="only read, without learning")
    _compile_option(sub, "for a million tokens and more: learns faster, after a minute or two of compilation")
    sub.add_argument("--json", action="store_true", help="print the report as JSON")
    sub.add_argument("--quiet", action="store_true", help="show no progress bar")

    sub = command(
        "generate",
        "write on after a prompt, or after what a session has read",
        """Write on. With --session the model has read a text and learned from it (`ttt-e2e read --save`);
the session file stays as it is. Without, it goes on from the prompt alone. With --learn it learns from
prompt and writing too, as from a text that it reads.""",
        """examples:
  ttt-e2e generate "def main("
  ttt-e2e generate --session book.session "The next morning" --max-tokens 400
  ttt-e2e generate --session book.session --temperature 0
  ttt-e2e generate --session book.session "Chapter 2" --learn --save book.session
  ttt-e2e generate --session book.session "The white whale" --notebook""",
    )
    sub.add_argument("prompt", nargs="?", default="", metavar="PROMPT", help="what to go on from")
    _model_options(sub)
    sub.add_argument("--session", type=Path, metavar="SESSION", help="what was read before")
    sub.add_argument("--max-tokens", type=int, default=200, metavar="N", help="write at most so many (default: 200)")
    sub.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="0: always the likeliest token; 1: as the model has it (default: 0.8)",
    )
    sub.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="draw among the likeliest tokens of that probability together (default: 0.95)",
    )
    sub.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest tokens; 0: all (default: 0)"
    )
    sub.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="draw among tokens at least P times as likely as the likeliest (default: 0)",
    )
    sub.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, another text (default: 0)")
    sub.add_argument("--learn", action="store_true", help="learn from the prompt and from what is written")
    sub.add_argument("--save", type=Path, metavar="SESSION", help="with --learn: keep what was learned in this file")
    _precision(sub)
    notebook_command.add_writing_options(sub)
    sub.add_argument("--json", action="store_true", help="print prompt and text as JSON")

    sub = command(
        "notebook",
        "find passages of what a session has read",
        notebook_command.DESCRIPTION,
        notebook_command.EPILOG,
    )
    of_notebook = notebook_command.add_actions(sub)

    sub = command(
        "prepare",
        "turn texts into tokens to train on",
        """Tokenise texts into a folder to train on, with a tokenizer that is trained on them unless one is named.
Text files are one document each; JSONL and parquet files one a row; folders are searched. A part of the
documents is held out for validation. What was interrupted goes on where it was when run again.""",
        """examples:
  ttt-e2e prepare --out tokens                          Python's own library, a small corpus everyone has
  ttt-e2e prepare books/ more.jsonl --out tokens --vocab-size 8192
  ttt-e2e prepare c4.parquet --out tokens --tokenizer gpt2 --text-column content""",
    )
    sub.add_argument(
        "sources",
        nargs="*",
        type=Path,
        metavar="SOURCE",
        help="files and folders (default: Python's library)",
    )
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    sub.add_argument("--tokenizer", metavar="NAME", help="a tokenizer.json, a folder with one, or a Hugging Face name")
    sub.add_argument(
        "--vocab-size",
        type=int,
        default=4096,
        metavar="N",
        help="of a tokenizer trained here (default: 4096)",
    )
    sub.add_argument("--text-column", default="text", metavar="NAME", help="where rows have their text (default: text)")
    sub.add_argument(
        "--val",
        type=Path,
        nargs="+",
        metavar="SOURCE",
        help="the documents to hold out (default: some of the sources)",
    )
    sub.add_argument(
        "--val-share", type=float, default=0.02, metavar="SHARE", help="how much to hold out (default: 0.02)"
    )
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of held-out documents")
    sub.add_argument("--json", action="store_true", help="print what was prepared as JSON")
    sub.add_argument("--quiet", action="store_true", help="show no progress bar")

    sub = command(
        "train",
        "train a model to learn well while it reads",
        """Train a preset on prepared tokens: through the inner updates, so that learning while reading helps most.
Settings are changed as NAME=VALUE, such as train.steps=500 or window=512. Ctrl-C writes a checkpoint;
the same command with --resume goes on from the last one as if nothing had happened.""",
        """examples:
  ttt-e2e train tiny --data tokens --out run
  ttt-e2e train tiny --data tokens --out run --resume
  ttt-e2e train tiny-window --data tokens --out window train.steps=2000
  ttt-e2e train tiny --data tokens --out long --from run/model --extend 8192
  torchrun --nproc-per-node 8 -m ttt_e2e train 125m --data tokens --out run

Tokens must have the preset's vocabulary: 4,096 for tiny, which is what `prepare` makes, 8,192 for small, and that of
Llama 3's tokenizer for the published sizes; or set vocab_size. `ttt-e2e presets --json` lists all settings; what each
means stands in ttt_e2e/config.py.""",
    )
    sub.add_argument("preset", metavar="PRESET", help="see `ttt-e2e presets`")
    sub.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="change a setting of the preset")
    sub.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="what `prepare` has written, or the official zarr arrays",
    )
    sub.add_argument("--tokenizer", metavar="NAME", help="with zarr arrays: the tokenizer that made them")
    sub.add_argument("--out", type=Path, required=True, metavar="RUN", help="the folder of the run")
    sub.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    sub.add_argument(
        "--from",
        dest="start_from",
        type=Path,
        metavar="MODEL",
        help="start from this model folder (or checkpoint), in its shape",
    )
    sub.add_argument(
        "--extend",
        type=int,
        metavar="TOKENS",
        help="train further for this context, by the published recipe; with --from",
    )
    _device_options(sub)
    _compile_option(sub, "the first step takes a minute or two longer, all others less")
    sub.add_argument("--tensorboard", action="store_true", help="log for TensorBoard, in RUN/tensorboard")
    sub.add_argument("--wandb", action="store_true", help="log to Weights & Biases")
    sub.add_argument("--quiet", action="store_true", help="show no progress bar")

    sub = command(
        "evaluate",
        "measure on whole documents what learning is worth",
        """Read documents from their first token to their last, with learning and without, several at once,
and print a line for each, their mean with its standard error, and the loss by position.""",
        """examples:
  ttt-e2e evaluate books/*.txt
  ttt-e2e evaluate --model run/model test.jsonl --max-tokens 100000 --json""",
    )
    sub.add_argument("files", nargs="+", type=Path, metavar="FILE", help="texts, JSONL, parquet, or folders of them")
    _model_options(sub)
    sub.add_argument("--text-column", default="text", metavar="NAME", help="where rows have their text (default: text)")
    sub.add_argument("--max-tokens", type=int, metavar="N", help="read at most so many of each document")
    sub.add_argument("--batch", type=int, default=8, metavar="N", help="documents at once (default: 8)")
    sub.add_argument("--json", action="store_true", help="print the report as JSON")
    sub.add_argument("--quiet", action="store_true", help="show no progress bar")

    sub = command(
        "presets",
        "list the models that can be trained",
        """List the presets: the published sizes (125m to 3b), tiny for a laptop and small for a single GPU, with
their baselines.""",
        """NAME is the method, NAME-full the same size with full attention, NAME-window with a sliding window.

example:
  ttt-e2e presets --json""",
    )
    sub.add_argument("--json", action="store_true", help="print all their settings as JSON")

    sub = command("cost", "count what a model costs, without running it", cost_command.DESCRIPTION, cost_command.EPILOG)
    cost_command.add_arguments(sub)

    sub = command(
        "convert", "models of other programs, in and out", convert_command.DESCRIPTION, convert_command.EPILOG
    )
    of_convert = convert_command.add_actions(sub)

    sub = command("serve", "serve a model over HTTP, with memory", serve_command.DESCRIPTION, serve_command.EPILOG)
    serve_command.add_arguments(sub)

    sub = command(
        "reproduce",
        "repeat the paper's comparison with other systems",
        reproduce_command.DESCRIPTION,
        reproduce_command.EPILOG,
    )
    of_reproduce = reproduce_command.add_actions(sub)

    sub = command(
        "info",
        "say what a model folder or a session is",
        "Say what a model folder or a session file holds: sizes, parameters, digests.",
        """examples:
  ttt-e2e info                      the shipped model
  ttt-e2e info run/model
  ttt-e2e info book.session""",
    )
    sub.add_argument("path", nargs="?", type=Path, metavar="PATH", help="a model folder or a session file")
    sub.add_argument("--json", action="store_true", help="print it as JSON")
    actions = {f"reproduce {name}": action for name, action in of_reproduce.items()}
    actions |= {f"notebook {name}": action for name, action in of_notebook.items()}
    actions |= {f"convert {name}": action for name, action in of_convert.items()}
    return parser, {**commands.choices, **actions}


def _compile_option(parser: argparse.ArgumentParser, when: str) -> None:
    needs = "on a CPU it needs a C++ compiler, on a GPU it runs as CUDA graphs"
    parser.add_argument("--compile", action="store_true", help=f"{when}; {needs}")


def _device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: a GPU if there is one)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as many as cores)")


def _precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of what --save keeps of it: float32 is exact, the others take half the space (default: float32)",
    )


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model folder (default: the shipped model)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the matrix products (default: float32, or the session's)",
    )
    _device_options(parser)
