"""What a notebook looks like on the command line: options of `read` and `generate`, and `ttt-e2e notebook search`."""

import argparse
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttt_e2e.errors import UserError

if TYPE_CHECKING:
    from ttt_e2e.inference.session import Session
    from ttt_e2e.reading.recording import Noting
    from ttt_e2e.retrieval.passages import Passage

DESCRIPTION = """Look into the notebook of a session: its exact text, in passages, noted by `ttt-e2e read --notebook`
while the session was learning from it."""
EPILOG = """examples:
  ttt-e2e read BOOK.txt --save book.session --notebook
  ttt-e2e notebook search book.session the white whale
  ttt-e2e generate --session book.session "The white whale" --notebook
  ttt-e2e notebook search --help"""

_COUNT = 3


def add_actions(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Give `parser` the actions of `notebook`; returns their parsers by name."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    sub = actions.add_parser(
        "search",
        help="find passages by their words",
        description="""Print the passages that fit the words best (BM25), the best first, each with its place in the
noted text, in characters. It needs the extra `notebook`. One process has a notebook at a time.""",
        epilog="""examples:
  ttt-e2e notebook search book.session the white whale
  ttt-e2e notebook search book.session.notebook captain --count 10 --json""",
    )
    sub.add_argument("session", type=Path, metavar="SESSION", help="a session file, or its notebook")
    sub.add_argument("words", nargs="+", metavar="WORDS", help="what to look for")
    sub.add_argument("--count", type=int, default=_COUNT, metavar="N", help=f"at most so many (default: {_COUNT})")
    _embeddings_option(sub)
    sub.add_argument("--json", action="store_true", help="print them as JSON")
    return dict(actions.choices)


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Give `read` its option of a notebook."""
    parser.add_argument(
        "--notebook", action="store_true", help="with --save: note the exact text, too, in SESSION.notebook"
    )


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    """Give `generate` its options of a notebook."""
    parser.add_argument(
        "--notebook", action="store_true", help="show noted passages that fit the prompt to the model, and list them"
    )
    parser.add_argument(
        "--passages", type=int, metavar="N", help=f"with --notebook: at most so many (default: {_COUNT})"
    )
    _embeddings_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do what `ttt-e2e notebook` was asked for; returns the exit code."""
    from ttt_e2e.retrieval.notebook import Notebook, listing, notebook_folder

    path: Path = arguments.session
    folder = path if path.is_dir() else notebook_folder(path)
    with Notebook(folder, embed=_embed(arguments.embeddings), create=False) as notebook:
        found = notebook.search(" ".join(arguments.words), arguments.count)
    if arguments.json:
        import json

        print(json.dumps(as_json(found), indent=2, ensure_ascii=False))
    elif found:
        print(listing(found))
    else:
        print("No passage has a word of these.", file=sys.stderr)
    return 0


# -- read --------------------------------------------------------------------------------------------------------------


def check_reading(arguments: argparse.Namespace) -> None:
    """Raise UserError if `read` cannot note what it reads as its options say."""
    if arguments.notebook and not arguments.save:
        raise UserError("A notebook lies beside the session that is kept; add --save SESSION, or leave --notebook out.")


def noted_pieces(
    arguments: argparse.Namespace, pieces: Iterator[str], window: int
) -> "tuple[Iterator[str], Noting | None]":
    """The text to read, noted while it passes if `read` was asked for that, and how. window: of the model, in tokens.

    Raises UserError as `plan_noting` and `noted` do.
    """
    if arguments.notebook:
        from ttt_e2e.reading.recording import noted, plan_noting
        from ttt_e2e.retrieval.notebook import passage_size

        size = passage_size(window)
        noting = plan_noting(arguments.save, arguments.session, size)
        first = next(pieces, "")  # a stream that is no text is refused before anything is written
        for remark in noting.remarks:
            print(remark, file=sys.stderr)
        return noted(chain([first], pieces), noting, size), noting
    if arguments.save:
        from ttt_e2e.retrieval.notebook import notebook_folder

        forget_unread(arguments.save)
        folders = [notebook_folder(path) for path in (arguments.save, arguments.session) if path]
        if without := next((folder for folder in folders if folder.exists()), None):
            print(f"The notebook {without} will not have this text; --notebook notes it.", file=sys.stderr)
    return pieces, None


# -- generate ----------------------------------------------------------------------------------------------------------


def check_writing(arguments: argparse.Namespace) -> None:
    """Raise UserError if the options of `generate` ask for a notebook that cannot be."""
    if not arguments.notebook:
        for option, given in (("--passages", arguments.passages), ("--embeddings", arguments.embeddings)):
            if given is not None:
                raise UserError(f"{option} is for what a notebook is asked for; add --notebook, or leave it out.")
        return
    if arguments.session is None:
        raise UserError("A notebook belongs to a session; name that with --session, or leave --notebook out.")
    if not arguments.prompt.strip():
        raise UserError("The notebook is searched for the words of the prompt; give one, or leave --notebook out.")


def write_with_notebook(
    session: "Session", arguments: argparse.Namespace, options: dict[str, Any]
) -> "tuple[Iterator[str], list[Passage]]":
    """The text that `session` writes with passages of its notebook in the window, in pieces; and those passages.

    options: as for `Session.generate`. Raises UserError as `generate_with_notebook` does.
    """
    from ttt_e2e.retrieval.notebook import Notebook, generate_with_notebook, notebook_folder

    count = _COUNT if arguments.passages is None else arguments.passages
    folder = notebook_folder(arguments.session)
    with Notebook(folder, embed=_embed(arguments.embeddings), create=False) as notebook:
        return generate_with_notebook(
            session,
            notebook,
            arguments.prompt,
            count=count,
            learn=arguments.learn,
            learn_from_writing=arguments.learn,
            **options,
        )


def print_sources(sources: "list[Passage]") -> None:
    """Say on standard error what was shown to the model."""
    from ttt_e2e.retrieval.notebook import listing

    shown = listing(sources) or "none fits the prompt and the window"
    print(f"\npassages of the notebook:\n\n{shown}", file=sys.stderr)


def forget_unread(save: Path) -> None:
    """Before the session file `save` is written anew, without its notebook: see `noting.forget_unread`."""
    if save.exists():
        from ttt_e2e.reading import recording as noting

        noting.forget_unread(save)


def say_where_it_lies(arguments: argparse.Namespace) -> None:
    """Say, where `generate` saved a session without a notebook, how it gets one."""
    from ttt_e2e.retrieval.notebook import notebook_folder

    theirs, own = notebook_folder(arguments.session), notebook_folder(arguments.save)
    if not own.exists():
        print(f"{arguments.save} has no notebook yet; copy {theirs} to {own} to give it one.", file=sys.stderr)


# -- what several of them need -----------------------------------------------------------------------------------------


def as_json(passages: "list[Passage]") -> list[dict[str, Any]]:
    """Passages as plain values."""
    return [passage._asdict() for passage in passages]


def _embed(folder: Path | None) -> Any:
    if folder is None:
        return None
    from ttt_e2e.retrieval.search_index import load_embed

    return load_embed(folder)


def _embeddings_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--embeddings",
        type=Path,
        metavar="DIR",
        help="find passages by meaning, too, with this model2vec folder; needs the extra `embeddings`",
    )
