"""`ttt-e2e read`: read a text while learning from it, and show what learning was worth."""

import argparse
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import IO

from ttt_e2e.cli.common import add_options, check_output, lock_saved, note, open_session, print_json
from ttt_e2e.errors import INTERRUPTED, UserError
from ttt_e2e.files import lock_beside
from ttt_e2e.units import amount

HELP = "read a text while learning from it"
DESCRIPTION = """Read a text of any length, learning from it mini-batch by mini-batch, and show what that was worth:
the loss along the text with learning and without it (the same weights and window, nothing updated).
Losses are in nats per token; lower is better."""
EPILOG = """examples:
  ttt-e2e read                            the source of Python's asyncio package
  ttt-e2e read BOOK.txt --save book.session
  ttt-e2e generate --session book.session "Once more"
  cat *.txt | ttt-e2e read -              standard input
  ttt-e2e read BOOK.txt --json > report.json

Ctrl-C stops within eight mini-batches; summary, plot and session are still written. With --save,
running the same command again continues where it stopped, whether by Ctrl-C or by a power cut."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `read`."""
    add = parser.add_argument
    add("file", nargs="?", metavar="FILE", help="a UTF-8 text, perhaps compressed; - for standard input")
    add_options(parser, "model", "dtype", "device", "threads")
    add("--session", type=Path, metavar="SESSION", help="continue from this saved session")
    add("--save", type=Path, metavar="SESSION", help="save what was learned to this file")
    add(
        "--save-every",
        type=amount,
        default=30,
        metavar="SECONDS",
        help="save every SECONDS while reading (default: 30)",
    )
    add_options(parser, "precision")
    add("--notebook", action="store_true", help="with --save: also record the text and its name, in SESSION.notebook")
    add("--plot", type=Path, metavar="PATH", help="file of the plot (default: NAME.reading.png)")
    add("--no-plot", action="store_true", help="draw no plot")
    add("--no-baseline", action="store_true", help="skip the second reading, without learning; faster")
    add("--no-learning", action="store_true", help="read without learning")
    add_options(parser, "compile", "json", "quiet")


def run(arguments: argparse.Namespace) -> int:
    """Read the text and print the report; returns the exit code."""
    if arguments.no_plot and arguments.plot:
        raise UserError("--plot and --no-plot contradict each other; leave one of them out.")
    if arguments.session and arguments.no_learning:
        raise UserError("A session continues as it began; leave --no-learning or --session out.")
    if arguments.notebook and not arguments.save:
        raise UserError("A notebook belongs to a saved session; add --save SESSION, or leave --notebook out.")
    name, chunks, size = _open_text(arguments.file)
    with lock_beside(arguments.plot) if arguments.plot else nullcontext(), lock_saved(arguments) as lock:
        return _read(arguments, name, chunks, size, lock)


def _read(
    arguments: argparse.Namespace, name: str, chunks: Iterator[str], size: int | None, lock: IO[str] | None
) -> int:
    from ttt_e2e.hardware import keep_freed_memory
    from ttt_e2e.reading.document import read_document
    from ttt_e2e.reading.plot import check_plot_target, plot_reading
    from ttt_e2e.reading.recording import plan_recording
    from ttt_e2e.reading.report import ReadingReport, summary
    from ttt_e2e.retrieval.notebook import notebook_folder

    # Fail now, not after the work.
    stem = re.sub(r"[^\w.-]", "-", Path(name).stem.replace("'s ", "-"))
    plot = arguments.plot or Path(f"{stem or 'text'}.reading.png")
    if not arguments.no_plot:
        check_plot_target(plot)
    session = open_session(arguments, learn=not arguments.no_learning, compile=arguments.compile)
    keep_freed_memory()  # not before: the file's weights are freed when the model has its own
    if arguments.compile and not session.learn:
        note("Nothing is compiled: only a model that learns while it reads is.")
    recording = None
    if arguments.notebook:
        window, document = session.model.config.sliding_window, "" if size is None else name
        recording = plan_recording(arguments.save, arguments.session, window, document)
        for remark in recording.remarks:
            note(remark)
    elif arguments.save:
        folders = [notebook_folder(path) for path in (arguments.save, arguments.session) if path]
        if existing := next((folder for folder in folders if folder.exists()), None):
            note(f"The notebook {existing} will not have this text; --notebook records it.")
    say = note if arguments.json else print

    def show(report: ReadingReport) -> None:
        if arguments.json:
            print_json(asdict(report))
        else:
            print(summary(report, shutil.get_terminal_size((120, 24)).columns))
        if not arguments.no_plot:
            try:
                plot_reading(report, plot)
                say(f"plot: {plot}")
            except UserError as error:
                if arguments.plot:
                    raise
                note(f"No plot: {error}")

    report = read_document(
        session,
        chunks,
        name=name,
        model_name="the shipped model" if arguments.model is None else str(arguments.model),
        total_bytes=size,
        baseline=not arguments.no_baseline,
        progress=not arguments.quiet,
        save=arguments.save,
        save_every=arguments.save_every,
        precision=arguments.precision,
        recording=recording,
        lock=lock,
        show=show,
    )
    if arguments.model is None and arguments.session is None:
        say('A model that writes English: pip install "ttt-e2e[smollm2]", then --model smollm2.')
    if arguments.save:
        stopped = report.interrupted and not report.diverged
        say(f"session: {arguments.save}{'; the same command continues the reading' if stopped else ''}")
    if recording:
        say(f"notebook: {recording.folder}")
    check_output()
    if report.diverged:
        raise UserError(report.diverged)
    return INTERRUPTED if report.interrupted else 0


def _open_text(file: str | None) -> tuple[str, Iterator[str], int | None]:
    """Name, chunks and size in bytes of the text, None for standard input and other streams.

    A regular file is checked from end to end before it is read.
    """
    from ttt_e2e.data.text import printable, standard_library_document, text_chunks

    if file is None:
        document = standard_library_document()
        return f"Python's {document.name}", document.chunks(), len(document.text.encode())
    if file == "-":
        return "standard input", text_chunks(sys.stdin.buffer), None
    path = Path(file)
    can_be_read_twice = not path.exists() or path.is_file() or path.is_dir()  # unlike a pipe
    size = sum(len(chunk.encode()) for chunk in text_chunks(path)) if can_be_read_twice else None
    return printable(path.name), text_chunks(path), size
