"""`ttt-e2e notebook`: search the exact text that a session has read."""

import argparse
from pathlib import Path

from ttt_e2e.cli.common import add_options, note, print_json, text
from ttt_e2e.units import count

HELP = "search what a session has read"
DESCRIPTION = """Search the notebook of a session: its exact text, in passages, which `ttt-e2e read --notebook`
recorded while the session was learning from it."""
EPILOG = """examples:
  ttt-e2e read BOOK.txt --save book.session --notebook
  ttt-e2e notebook search book.session the white whale
  ttt-e2e generate --session book.session "The white whale" --notebook
  ttt-e2e notebook search --help"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `notebook`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    search = actions.add_parser(
        "search",
        help="find passages by their words",
        description="""Print the passages that match the words best (BM25), the best first, each with the file that it
is from and its position there, in characters. Case and accents do not matter; Chinese, Japanese, Korean, Thai,
Lao, Khmer and Burmese words are found inside a sentence. A text can be searched while it is being recorded.""",
        epilog="""examples:
  ttt-e2e notebook search book.session the white whale
  ttt-e2e notebook search book.session.notebook captain --count 10 --json""",
    )
    search.add_argument("session", type=Path, metavar="SESSION", help="a session file, or its notebook")
    search.add_argument("words", nargs="+", type=text, metavar="WORDS", help="what to search for")
    search.add_argument("--count", type=count, default=3, metavar="N", help="print at most N passages (default: 3)")
    add_options(search, "embeddings", "json")


def run(arguments: argparse.Namespace) -> int:
    """Search and print; returns 0."""
    from ttt_e2e.retrieval.notebook import Notebook, notebook_folder
    from ttt_e2e.retrieval.passages import format_passages
    from ttt_e2e.retrieval.search_index import load_embed

    folder = arguments.session if arguments.session.is_dir() else notebook_folder(arguments.session)
    embed = load_embed(arguments.embeddings) if arguments.embeddings else None
    with Notebook(folder, embed=embed, create=False) as notebook:
        found = notebook.search(" ".join(arguments.words), arguments.count)
    if arguments.json:
        print_json([passage._asdict() for passage in found])
    elif found:
        print(format_passages(found))
    else:
        note("No passage contains any of these words.")
    return 0
