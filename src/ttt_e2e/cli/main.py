"""The command `ttt-e2e`: one thin function a sub-command. What takes long to import is imported where it is used."""

import argparse
import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ttt_e2e.cli import convert as convert_command
from ttt_e2e.cli import cost as cost_command
from ttt_e2e.cli import notebook as notebook_command
from ttt_e2e.cli import reproduce as reproduce_command
from ttt_e2e.cli import serve as serve_command
from ttt_e2e.cli.common import parse, warnings_in_one_line
from ttt_e2e.config.parse import override
from ttt_e2e.config.presets import PRESETS, at_context, extension, preset
from ttt_e2e.config.schema import RunConfig
from ttt_e2e.errors import INTERRUPTED, UserError

if TYPE_CHECKING:
    from ttt_e2e.data.tokenizer import Tokenizer
    from ttt_e2e.model.transformer import Transformer

_NAME = 200  # characters of a file's name in an error


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own); returns the exit code.

    0: done. 1: something that the user can mend, said in one sentence. 2: a command line that is none. 130: Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv, _FUNCTIONS)
        with warnings_in_one_line():
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
        if error.filename is None:
            raise
        name = f"{str(error.filename)[:_NAME]}{'...' * (len(str(error.filename)) > _NAME)}"
        return _fail(f"Cannot use {name}: {error.strerror}; check the name and who may use it.")


def _fail(sentence: str) -> int:
    print(f"ttt-e2e: error: {' '.join(sentence.split())}", file=sys.stderr)
    return 1


# -- sub-commands ------------------------------------------------------------------------------------------------------


def _read(arguments: argparse.Namespace) -> int:
    _require_threads(arguments.threads)
    if arguments.no_picture and arguments.picture:
        raise UserError("--picture and --no-picture contradict each other; leave one of them out.")
    if arguments.session and arguments.no_learning:
        raise UserError("A session goes on as it began; leave --no-learning or --session out.")
    notebook_command.check_reading(arguments)
    name, pieces, size = _text(arguments.file)
    from ttt_e2e.inference.session import Session
    from ttt_e2e.inference.session_file import check_session_target
    from ttt_e2e.reading.document import read_document, summary
    from ttt_e2e.reading.plot import check_picture_target, reading_picture

    # What could be refused at the end is refused now, before the work.
    picture = arguments.picture or Path(f"{_file_stem(name)}.reading.png")
    if not arguments.no_picture:
        check_picture_target(picture)
    if arguments.save:
        check_session_target(arguments.save)
    model, tokenizer, dtype = _reader(arguments)
    if arguments.session:
        session = _saved_session(arguments, model, tokenizer, compile=arguments.compile)
    else:
        learn = not arguments.no_learning
        session = Session(model, tokenizer, learn=learn, dtype=dtype, compile=arguments.compile)
    if arguments.compile and not session.learn:  # what else is in the way, the session says itself
        _note("Nothing is compiled: that needs a model that learns while it reads.")
    pieces, noting = notebook_command.noted_pieces(arguments, pieces, model.config.sliding_window)
    report = read_document(
        session,
        pieces,
        name=name,
        model_name=_model_name(arguments.model),
        total_bytes=size,
        baseline=not arguments.no_baseline,
        progress=not arguments.quiet,
        save=arguments.save,
        save_every=arguments.save_every,
        precision=arguments.precision,
        begin=noting.begin if noting else None,
    )
    if arguments.json:
        _print_json(report.to_dict())
    else:
        print(summary(report))
    say = _note if arguments.json else print
    if arguments.save:
        say(f"session: {arguments.save}")
    if noting:
        say(f"notebook: {noting.folder}")
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
    if arguments.save and not arguments.learn:
        raise UserError("Without --learn there is nothing new to --save; add --learn, or leave --save out.")
    notebook_command.check_writing(arguments)
    from ttt_e2e.inference.session import Session
    from ttt_e2e.inference.session_file import check_session_target

    if arguments.save:
        check_session_target(arguments.save)
    model, tokenizer, dtype = _reader(arguments)
    if arguments.session:
        session = _saved_session(arguments, model, tokenizer)
    else:
        session = Session(model, tokenizer, dtype=dtype)
    if arguments.learn and not session.learn:
        _note(
            "Nothing is learned: the session, or its model, does not. What is written becomes part of it all the same."
        )
    options = {
        "max_tokens": arguments.max_tokens,
        "stop": arguments.stop,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "min_p": arguments.min_p,
        "seed": arguments.seed,
    }
    if arguments.notebook:
        pieces, sources = notebook_command.write_with_notebook(session, arguments, options)
    else:
        pieces = session.generate(arguments.prompt, learn_from_writing=arguments.learn, **options)
    if arguments.json:
        written: dict[str, Any] = {"prompt": arguments.prompt, "text": "".join(pieces)}
        if arguments.notebook:
            written["sources"] = notebook_command.as_json(sources)
        _print_json(written)
    else:
        first = next(pieces, "")  # raises what there is to raise before anything is printed
        print(arguments.prompt + first, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)
        if arguments.notebook:
            notebook_command.print_sources(sources)
    if arguments.save:
        notebook_command.forget_unread(arguments.save)
        session.save(arguments.save, arguments.precision)
        _note(f"session: {arguments.save}")
        if arguments.notebook:
            notebook_command.say_where_it_lies(arguments)
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
        from ttt_e2e.model.checkpoint import load_config

        config = RunConfig(load_config(arguments.start_from), config.train)
    if arguments.extend is not None:
        longer = extension(config.train, arguments.extend, config.train.steps)
        config = RunConfig(at_context(config.model, arguments.extend), longer)
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
        compile=arguments.compile,
    )
    return INTERRUPTED if result.interrupted else 0


def _evaluate(arguments: argparse.Namespace) -> int:
    _require_threads(arguments.threads)
    from ttt_e2e.data.text import documents
    from ttt_e2e.evaluation.documents import evaluate, table
    from ttt_e2e.hardware import machine
    from ttt_e2e.model.checkpoint import model_digest

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
        measured = {
            "model": model_digest(model),
            "max_tokens": arguments.max_tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "machine": machine(model.embedding.device),
        }
        _print_json(report.to_dict() | {"skipped": skipped, "measured": measured})
    else:
        print(table(report))
    for sentence in skipped:
        _note(f"Left out: {sentence}")
    return 0


def _presets(arguments: argparse.Namespace) -> int:
    from ttt_e2e.config.parse import to_dict
    from ttt_e2e.model.cost import parameters

    counts = {name: parameters(config.model) for name, config in PRESETS.items()}
    if arguments.json:
        _print_json({name: {"parameters": counts[name], **to_dict(config)} for name, config in PRESETS.items()})
        return 0
    columns = ("parameters", "vocabulary", "blocks", "suffix", "width", "window k", "b", "context", "steps")
    print(f"{'preset':<22}" + "".join(f"{column:>12}" for column in columns) + "  mixers")
    for name, config in PRESETS.items():
        model, plan = config.model, config.train
        values = (
            f"{counts[name] / 1e6:,.1f} M",
            f"{model.vocab_size:,}",
            model.num_hidden_layers,
            model.suffix_layers or "-",
            model.hidden_size,
            model.sliding_window if set(model.mixers) - {"full"} else "all",
            model.mini_batch_size or "-",
            plan.context,
            plan.steps,
        )
        mixers = ", ".join(mixer if n == 1 else f"{n} x {mixer}" for mixer, n in _runs(model.pattern))
        print(("" if "-" in name else "\n") + f"{name:<22}" + "".join(f"{v!s:>12}" for v in values) + f"  {mixers}")
    print("\nTrain one with: ttt-e2e train PRESET --data DIR --out RUN [NAME=VALUE ...]")
    print("on tokens of its vocabulary: ttt-e2e prepare --vocab-size N, or --tokenizer NAME; or set vocab_size.")
    return 0


def _runs(names: tuple[str, ...]) -> list[tuple[str, int]]:
    """Equal neighbours together, and how many they are."""
    from itertools import groupby

    return [(name, len(list(group))) for name, group in groupby(names)]


def _info(arguments: argparse.Namespace) -> int:
    from ttt_e2e.inference.session import shipped_model
    from ttt_e2e.inference.session_file import session_facts

    path = shipped_model() if arguments.path is None else arguments.path
    if path.is_file():
        facts = session_facts(path)
        unfinished = facts.pop("unfinished", None)
        if unfinished:
            facts["unfinished"] = f"after {unfinished['tokens']:,} tokens of {unfinished['name']}"
        info = {"kind": "session", "path": str(path), "bytes": path.stat().st_size, **facts}
    else:
        from ttt_e2e.config.parse import to_dict
        from ttt_e2e.model.checkpoint import load_model, model_digest, read_json

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
        width = max(map(len, info)) + 2
        for key, value in info.items():
            print(f"{key:<{width}}{f'{value:,}' if isinstance(value, int) and not isinstance(value, bool) else value}")
    return 0


# -- what several of them need -----------------------------------------------------------------------------------------


def _reader(arguments: argparse.Namespace) -> "tuple[Transformer, Tokenizer, Any]":
    """The model to read with, its tokenizer, and the dtype, as the command line says."""
    import torch

    from ttt_e2e.inference.session import DTYPES, load_reader
    from ttt_e2e.training.parallelize import choose_device

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model, tokenizer = load_reader(arguments.model, choose_device(arguments.device))
    return model, tokenizer, DTYPES[arguments.dtype or "float32"]


def _saved_session(arguments: argparse.Namespace, model: "Transformer", tokenizer: "Tokenizer", **more: Any) -> Any:
    """The session that `--session` names. Raises UserError if it began in another dtype than is asked for."""
    from ttt_e2e.inference.session import Session

    session = Session.load(arguments.session, model, tokenizer, **more)
    began = str(session.dtype).removeprefix("torch.")
    if arguments.dtype not in (None, began):
        raise UserError(f"The session {arguments.session} goes on in {began}, as it began; leave --dtype out.")
    return session


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


def _require_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise UserError(f"--threads must be at least 1, not {threads}.")


def _note(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


_FUNCTIONS = {
    "read": _read,
    "generate": _generate,
    "prepare": _prepare,
    "train": _train,
    "evaluate": _evaluate,
    "presets": _presets,
    "cost": cost_command.run,
    "notebook": notebook_command.run,
    "serve": serve_command.run,
    "convert": convert_command.run,
    "reproduce": reproduce_command.run,
    "info": _info,
}
