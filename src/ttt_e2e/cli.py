"""The command `ttt-e2e`: one thin function a sub-command. What takes long to import is imported where it is used."""

import argparse
import difflib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from ttt_e2e import __version__
from ttt_e2e.config import PRESETS, ModelConfig, RunConfig, extension, override, preset, rope_theta_for
from ttt_e2e.errors import UserError

if TYPE_CHECKING:
    from ttt_e2e.data.tokenizer import Tokenizer
    from ttt_e2e.model import Transformer

INTERRUPTED = 130
_WIDTH = 100
# Commands that take a list of arguments: its name and its type.
_LISTS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "prepare": ("sources", Path),
    "train": ("settings", str),
    "evaluate": ("files", Path),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own); returns the exit code.

    0: done. 1: something that the user can mend, said in one sentence. 2: a command line that is none. 130: Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse: --help, --version or a command line that is none
        return stop.code if isinstance(stop.code, int) else 2
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone, as `head` does; the interpreter would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" while writing {error.filename}" if error.filename else ""
            return _fail(f"No space left on the disk{where}; make room and run the command again.")
        raise


def _fail(sentence: str) -> int:
    print(f"ttt-e2e: error: {' '.join(sentence.split())}", file=sys.stderr)
    return 1


# -- the command line --------------------------------------------------------------------------------------------------


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


def _parse(argv: list[str]) -> argparse.Namespace:
    parser, commands = _parser()
    if not argv:
        parser.print_help()
        raise SystemExit(2)
    first = next((word for word in argv if not word.startswith("-")), None)
    if first is not None and first not in commands:
        parser.error(f"there is no command {first!r}{_near(first, list(commands))}; there are: {', '.join(commands)}")
    arguments, extra = parser.parse_known_args(argv)
    if arguments.command in _LISTS and not any(word.startswith("-") for word in extra):
        # argparse takes a list only where it stands in one piece; what follows an option goes to its end.
        name, kind = _LISTS[arguments.command]
        setattr(arguments, name, [*getattr(arguments, name), *map(kind, extra)])
        extra = []
    if extra:
        command = commands[arguments.command]
        options = list(command._option_string_actions)
        option = extra[0].partition("=")[0]
        if option.startswith("-"):
            command.error(f"there is no option {option}{_near(option, options)}")
        command.error(f"there is one argument too many: {extra[0]!r}")
    return arguments


def _near(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1)
    return f", did you mean {near[0]}?" if near else ""


def _parser() -> tuple[_Parser, dict[str, argparse.ArgumentParser]]:
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

    def command(
        name: str, run: Callable[[argparse.Namespace], int], short: str, description: str, epilog: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=short, description=description, epilog=epilog)
        sub.set_defaults(run=run)
        return sub

    sub = command(
        "read",
        _read,
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

Ctrl-C ends the reading at the next mini-batch; summary, picture and session are still written.""",
    )
    sub.add_argument("file", nargs="?", metavar="FILE", help="a UTF-8 text; - for standard input")
    _model_options(sub)
    sub.add_argument("--session", type=Path, metavar="SESSION", help="go on reading with this saved session")
    sub.add_argument("--save", type=Path, metavar="SESSION", help="keep what was learned in this file")
    sub.add_argument("--picture", type=Path, metavar="PATH", help="where to draw (default: NAME.reading.png here)")
    sub.add_argument("--no-picture", action="store_true", help="draw nothing")
    sub.add_argument("--no-baseline", action="store_true", help="do not read a second time without learning: faster")
    sub.add_argument("--no-learning", action="store_true", help="only read, without learning")
    sub.add_argument("--json", action="store_true", help="print the report as JSON")
    sub.add_argument("--quiet", action="store_true", help="show no progress bar")

    sub = command(
        "generate",
        _generate,
        "write on after a prompt, or after what a session has read",
        """Write on. With --session the model has read a text and learned from it (`ttt-e2e read --save`);
the session file stays as it is. Without, it goes on from the prompt alone.""",
        """examples:
  ttt-e2e generate "def main("
  ttt-e2e generate --session book.session "The next morning" --max-tokens 400
  ttt-e2e generate --session book.session --temperature 0""",
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
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, another text (default: 0)")
    sub.add_argument("--json", action="store_true", help="print prompt and text as JSON")

    sub = command(
        "prepare",
        _prepare,
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
        _train,
        "train a model to learn well while it reads",
        """Train a preset on prepared tokens: through the inner updates, so that learning while reading helps most.
Settings are changed as NAME=VALUE, such as train.steps=500 or window=512. Ctrl-C writes a checkpoint;
the same command with --resume goes on from the last one as if nothing had happened.""",
        """examples:
  ttt-e2e train tiny --data tokens --out run
  ttt-e2e train tiny --data tokens --out run --resume
  ttt-e2e train tiny-window --data tokens --out window train.steps=2000
  ttt-e2e train tiny --data tokens --out long --from run/model --extend 8192
  torchrun --nproc-per-node 8 -m ttt_e2e train 125m --data tokens --out run""",
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
    sub.add_argument("--tensorboard", action="store_true", help="log for TensorBoard, in RUN/tensorboard")
    sub.add_argument("--wandb", action="store_true", help="log to Weights & Biases")
    sub.add_argument("--quiet", action="store_true", help="show no progress bar")

    sub = command(
        "evaluate",
        _evaluate,
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
        _presets,
        "list the models that can be trained",
        "List the presets: the published sizes (125m to 3b) and two for a laptop, with their baselines.",
        """NAME is the method, NAME-full the same size with full attention, NAME-window with a sliding window.

example:
  ttt-e2e presets --json""",
    )
    sub.add_argument("--json", action="store_true", help="print all their settings as JSON")

    sub = command(
        "info",
        _info,
        "say what a model folder or a session is",
        "Say what a model folder or a session file holds: sizes, parameters, digests.",
        """examples:
  ttt-e2e info                      the shipped model
  ttt-e2e info run/model
  ttt-e2e info book.session""",
    )
    sub.add_argument("path", nargs="?", type=Path, metavar="PATH", help="a model folder or a session file")
    sub.add_argument("--json", action="store_true", help="print it as JSON")
    return parser, dict(commands.choices)


def _device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: a GPU if there is one)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as many as cores)")


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model folder (default: the shipped model)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the matrix products (default: float32)",
    )
    _device_options(parser)


# -- sub-commands ------------------------------------------------------------------------------------------------------


def _read(arguments: argparse.Namespace) -> int:
    _require_threads(arguments.threads)
    if arguments.no_picture and arguments.picture:
        raise UserError("--picture and --no-picture contradict each other; leave one of them out.")
    if arguments.session and arguments.no_learning:
        raise UserError("A session goes on as it began; leave --no-learning or --session out.")
    name, pieces, size = _text(arguments.file)
    from ttt_e2e.picture import check_picture_target, reading_picture
    from ttt_e2e.reading import read_document, summary
    from ttt_e2e.session import Session, check_session_target

    # What could be refused at the end is refused now, before the work.
    picture = arguments.picture or Path(f"{_file_stem(name)}.reading.png")
    if not arguments.no_picture:
        check_picture_target(picture)
    if arguments.save:
        check_session_target(arguments.save)
    model, tokenizer, dtype = _reader(arguments)
    if arguments.session:
        session = Session.load(arguments.session, model, tokenizer)
    else:
        session = Session(model, tokenizer, learn=not arguments.no_learning, dtype=dtype)
    report = read_document(
        session,
        pieces,
        name=name,
        model_name=_model_name(arguments.model),
        total_bytes=size,
        baseline=not arguments.no_baseline,
        progress=not arguments.quiet,
    )
    if arguments.save:
        session.save(arguments.save)
    if arguments.json:
        _print_json(report.to_dict())
    else:
        print(summary(report))
    say = _note if arguments.json else print
    if arguments.save:
        say(f"session: {arguments.save}")
    if not arguments.no_picture:
        try:
            reading_picture(report, picture)
            say(f"picture: {picture}")
        except UserError as error:
            if arguments.picture:
                raise
            _note(f"No picture: {error}")
    if report.diverged:
        raise UserError(report.diverged)
    return INTERRUPTED if report.interrupted else 0


def _generate(arguments: argparse.Namespace) -> int:
    _require_threads(arguments.threads)
    from ttt_e2e.session import Session

    model, tokenizer, dtype = _reader(arguments)
    if arguments.session:
        session = Session.load(arguments.session, model, tokenizer)
    else:
        session = Session(model, tokenizer, dtype=dtype)
    pieces = session.generate(
        arguments.prompt,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    if arguments.json:
        _print_json({"prompt": arguments.prompt, "text": "".join(pieces)})
        return 0
    first = next(pieces, "")  # raises what there is to raise before anything is printed
    print(arguments.prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from ttt_e2e.data.prepare import prepare

    prepared = prepare(
        arguments.sources or None,
        arguments.out,
        tokenizer=arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        text_column=arguments.text_column,
        val=arguments.val,
        val_share=arguments.val_share,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    if arguments.json:
        _print_json(
            {
                "folder": str(prepared.folder),
                "vocab_size": prepared.vocab_size,
                "documents": prepared.documents,
                "tokens": prepared.tokens,
                "characters": prepared.characters,
                "skipped": prepared.skipped,
            }
        )
        return 0
    for split, count in prepared.documents.items():
        print(f"{split}: {count:,} documents, {prepared.tokens[split]:,} tokens")
    print(f"vocabulary: {prepared.vocab_size:,} tokens")
    if prepared.skipped:
        print(f"left out: {len(prepared.skipped)}, the first: {prepared.skipped[0]}")
    print(f"Train on it with: ttt-e2e train tiny --data {prepared.folder} --out run")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    _require_threads(arguments.threads)
    config = preset(arguments.preset)
    if arguments.extend is not None and arguments.start_from is None:
        raise UserError("--extend trains a model further; name the model with --from.")
    if arguments.extend is not None and arguments.extend < 1:
        raise UserError(f"--extend must be at least 1 token, not {arguments.extend}.")
    if arguments.start_from is not None:
        from ttt_e2e.model_files import load_config

        config = RunConfig(load_config(arguments.start_from), config.train)
    if arguments.extend is not None:
        config = _extended(config, arguments.extend)
    config = override(config, arguments.settings)
    from ttt_e2e.training.trainer import train

    result = train(
        config,
        arguments.data,
        arguments.out,
        resume=arguments.resume,
        start_from=arguments.start_from,
        tokenizer=arguments.tokenizer,
        device=arguments.device,
        tensorboard=arguments.tensorboard,
        wandb=arguments.wandb,
        progress=not arguments.quiet,
        threads=arguments.threads,
    )
    return INTERRUPTED if result.interrupted else 0


def _extended(config: RunConfig, context: int) -> RunConfig:
    from dataclasses import replace

    model = config.model
    if model.window is None:
        model = replace(model, rope_theta=max(model.rope_theta, rope_theta_for(context)))
    return RunConfig(model, extension(config.train, context, config.train.steps))


def _evaluate(arguments: argparse.Namespace) -> int:
    _require_threads(arguments.threads)
    from ttt_e2e.data.text import documents
    from ttt_e2e.evaluation.books import evaluate, table

    skipped: list[str] = []
    for path in arguments.files:
        if not path.exists():
            raise UserError(f"{path} does not exist; check the path.")
    model, tokenizer, dtype = _reader(arguments)
    report = evaluate(
        model,
        tokenizer,
        documents(arguments.files, arguments.text_column, skipped),
        batch=arguments.batch,
        max_tokens=arguments.max_tokens,
        dtype=dtype,
        progress=not arguments.quiet,
    )
    if arguments.json:
        _print_json(report.to_dict() | {"skipped": skipped})
    else:
        print(table(report))
    for sentence in skipped:
        _note(f"Left out: {sentence}")
    return 0


def _presets(arguments: argparse.Namespace) -> int:
    from ttt_e2e.config import to_dict

    counts = {name: _parameters(config.model) for name, config in PRESETS.items()}
    if arguments.json:
        _print_json({name: {"parameters": counts[name], **to_dict(config)} for name, config in PRESETS.items()})
        return 0
    columns = (
        "preset",
        "parameters",
        "blocks",
        "suffix",
        "width",
        "window k",
        "mini-batch b",
        "context",
        "steps",
    )
    print(f"{columns[0]:<14}" + "".join(f"{column:>14}" for column in columns[1:]))
    for name, config in PRESETS.items():
        model, plan = config.model, config.train
        values = (
            f"{counts[name] / 1e6:,.1f} M",
            model.layers,
            model.suffix_layers or "-",
            model.width,
            model.window or "all",
            model.mini_batch if model.suffix_layers else "-",
            plan.context,
            plan.steps,
        )
        print(f"{name:<14}" + "".join(f"{value!s:>14}" for value in values))
    print("\nTrain one with: ttt-e2e train PRESET --data DIR --out RUN [NAME=VALUE ...]")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from ttt_e2e.session import DTYPES, session_facts, shipped_model

    path = shipped_model() if arguments.path is None else arguments.path
    if path.is_file():
        facts = session_facts(path)
        assert facts["dtype"] in DTYPES
        info = {"kind": "session", "path": str(path), "bytes": path.stat().st_size, **facts}
    else:
        from ttt_e2e.config import to_dict
        from ttt_e2e.model_files import load_model, model_digest, read_json

        model = load_model(path)
        info = {
            "kind": "model",
            "path": str(path),
            "bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "fast_weights": sum(w.numel() for pair in model.initial_fast_weights(1) for w in pair),
            "digest": model_digest(model),
            **to_dict(model.config),
            "notes": read_json(path / "config.json").get("notes", {}),
        }
    if arguments.json:
        _print_json(info)
    else:
        for key, value in info.items():
            print(f"{key:<16}{f'{value:,}' if isinstance(value, int) and not isinstance(value, bool) else value}")
    return 0


# -- what several of them need -----------------------------------------------------------------------------------------


def _reader(arguments: argparse.Namespace) -> "tuple[Transformer, Tokenizer, Any]":
    """The model to read with, its tokenizer, and the dtype, as the command line says."""
    import torch

    from ttt_e2e.session import DTYPES, load_reader
    from ttt_e2e.training.distributed import choose_device

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model, tokenizer = load_reader(arguments.model, choose_device(arguments.device))
    return model, tokenizer, DTYPES[arguments.dtype]


def _text(file: str | None) -> tuple[str, Iterator[str], int | None]:
    """Name, pieces and size in bytes of the text to read. A file is checked from end to end before the reading."""
    from ttt_e2e.data.text import standard_library_document, text_pieces

    if file is None:
        document = standard_library_document()
        size = sum(len(piece.encode()) for piece in document.pieces())
        return f"Python's {document.name}", document.pieces(), size
    if file == "-":
        stream: IO[bytes] = sys.stdin.buffer
        return "standard input", text_pieces(stream), None
    path = Path(file)
    regular = not path.exists() or path.is_file() or path.is_dir()  # a pipe can be read only once
    length = sum(len(piece.encode()) for piece in text_pieces(path)) if regular else None
    return path.name, text_pieces(path), length


def _file_stem(name: str) -> str:
    """A file name made of a text's name."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in Path(name).stem.replace("'s ", "-")) or "text"


def _model_name(folder: Path | None) -> str:
    return "the shipped model" if folder is None else str(folder)


def _parameters(config: ModelConfig) -> int:
    import torch

    from ttt_e2e.model import Transformer

    with torch.device("meta"):
        return sum(weight.numel() for weight in Transformer(config).parameters())


def _require_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise UserError(f"--threads must be at least 1, not {threads}.")


def _note(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


if __name__ == "__main__":
    sys.exit(main())
