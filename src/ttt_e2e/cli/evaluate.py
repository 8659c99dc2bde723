"""`ttt-e2e evaluate`: measure on whole documents what learning is worth."""

import argparse
from pathlib import Path

from ttt_e2e.cli.common import add_options, note, open_model, print_json
from ttt_e2e.errors import UserError
from ttt_e2e.units import count

HELP = "measure on whole documents what learning is worth"
DESCRIPTION = """Read documents from the first token to the last, with learning and without, several at once, and
print a line for each, their mean with its standard error, and the loss by position."""
EPILOG = """examples:
  ttt-e2e evaluate books/*.txt
  ttt-e2e evaluate --model run/model test.jsonl --max-tokens 100000 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="texts, JSONL, parquet, or folders of them")
    add_options(parser, "model", "dtype", "device", "threads", "text-column")
    add("--max-tokens", type=count, metavar="N", help="read at most N tokens of each document")
    add("--batch", type=count, default=8, metavar="N", help="documents at once (default: 8)")
    add_options(parser, "json", "quiet")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print the report; returns 0."""
    from ttt_e2e.data.text import documents
    from ttt_e2e.evaluation.documents import evaluate_documents, format_report
    from ttt_e2e.hardware import keep_freed_memory, machine
    from ttt_e2e.inference.session_file import DTYPES
    from ttt_e2e.model.checkpoint import model_digest

    for path in arguments.files:
        if not path.exists():
            raise UserError(f"{path} does not exist; check the path.")
    model, tokenizer = open_model(arguments)
    keep_freed_memory()
    dtype = arguments.dtype or "float32"
    skipped: list[str] = []
    report = evaluate_documents(
        model,
        tokenizer,
        documents(arguments.files, arguments.text_column, skipped),
        batch=arguments.batch,
        max_tokens=arguments.max_tokens,
        dtype=DTYPES[dtype],
        progress=not arguments.quiet,
    )
    if arguments.json:
        measured = {
            "model": model_digest(model),
            "max_tokens": arguments.max_tokens,
            "dtype": dtype,
            "machine": machine(model.embedding.device),
        }
        print_json(report.to_dict() | {"skipped": skipped, "measured": measured})
    else:
        print(format_report(report))
    for sentence in skipped:
        note(f"Skipped: {sentence}")
    return 0
