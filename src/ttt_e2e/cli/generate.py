"""`ttt-e2e generate`: continue a prompt, or the text that a session has read."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttt_e2e.cli.common import add_options, load_embedding, note, open_session, print_json
from ttt_e2e.errors import UserError

if TYPE_CHECKING:
    from ttt_e2e.inference.session import Session
    from ttt_e2e.retrieval.passages import Passage

HELP = "continue a prompt, or what a session has read"
DESCRIPTION = """Generate text. With --session the model has read a text and learned from it (`ttt-e2e read --save`);
the session file is not changed. Without, it continues the prompt alone. With --learn the model
learns from the prompt and from what it writes, as from a text that it reads."""
EPILOG = """examples:
  ttt-e2e generate "def main("
  ttt-e2e generate --session book.session "The next morning" --max-tokens 400
  ttt-e2e generate --session book.session --temperature 0
  ttt-e2e generate --session book.session "Chapter 2" --learn --save book.session
  ttt-e2e generate --session book.session "The white whale" --notebook"""

_PASSAGES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `generate`."""
    parser.add_argument("prompt", nargs="?", default="", metavar="PROMPT", help="the text to continue")
    add_options(parser, "model", "dtype", "device", "threads")
    parser.add_argument("--session", type=Path, metavar="SESSION", help="what the model has read before")
    parser.add_argument(
        "--max-tokens", type=int, default=200, metavar="N", help="generate at most N tokens (default: 200)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0: always the most likely token (default: 0.8)"
    )
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="nucleus sampling, probability kept (default: 0.95)"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="keep the K most likely tokens; 0: all (default: 0)"
    )
    parser.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="smallest probability relative to the largest (default: 0)",
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop before TEXT; may be repeated")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    parser.add_argument("--learn", action="store_true", help="learn from the prompt and from the generated text")
    parser.add_argument("--save", type=Path, metavar="SESSION", help="with --learn: save what was learned")
    add_options(parser, "precision")
    parser.add_argument(
        "--notebook", action="store_true", help="put matching passages of the session's notebook into the window"
    )
    parser.add_argument(
        "--passages", type=int, metavar="N", help=f"with --notebook: at most N passages (default: {_PASSAGES})"
    )
    add_options(parser, "embeddings", "json")


def run(arguments: argparse.Namespace) -> int:
    """Generate and print; returns 0."""
    if arguments.save and not arguments.learn:
        raise UserError("Without --learn there is nothing new to --save; add --learn, or leave --save out.")
    _check_notebook_options(arguments)
    from ttt_e2e.inference.session_file import check_session_target

    if arguments.save:
        check_session_target(arguments.save)
    session = open_session(arguments)
    if arguments.learn and not session.learn:
        note("This session, or its model, does not learn; the generated text still becomes part of the session.")
    chunks, sources = _generate(session, arguments)
    if arguments.json:
        result: dict[str, Any] = {"prompt": arguments.prompt, "text": "".join(chunks)}
        if sources is not None:
            result["sources"] = [passage._asdict() for passage in sources]
        print_json(result)
    else:
        first = next(chunks, "")  # errors come before anything is printed
        print(arguments.prompt + first, end="", flush=True)
        for chunk in chunks:
            print(chunk, end="", flush=True)
        print(flush=True)
        if sources is not None:
            from ttt_e2e.retrieval.passages import format_passages

            note(f"\npassages of the notebook:\n\n{format_passages(sources) or 'none fits the prompt and the window'}")
    if arguments.save:
        from ttt_e2e.reading.recording import forget_unread

        forget_unread(arguments.save)
        session.save(arguments.save, arguments.precision)
        note(f"session: {arguments.save}")
        if arguments.notebook:
            _note_notebook_to_copy(arguments.session, arguments.save)
    return 0


def _check_notebook_options(arguments: argparse.Namespace) -> None:
    if not arguments.notebook:
        for option, value in (("--passages", arguments.passages), ("--embeddings", arguments.embeddings)):
            if value is not None:
                raise UserError(f"{option} needs a notebook; add --notebook, or leave it out.")
    elif arguments.session is None:
        raise UserError("A notebook belongs to a session; name it with --session, or leave --notebook out.")
    elif not arguments.prompt.strip():
        raise UserError("The notebook is searched for the words of the prompt; give one, or leave --notebook out.")


def _generate(session: "Session", arguments: argparse.Namespace) -> "tuple[Iterator[str], list[Passage] | None]":
    """The text in chunks, and the passages that were put into the window; None without --notebook."""
    names = ("max_tokens", "stop", "temperature", "top_k", "top_p", "min_p", "seed")
    options = {name: getattr(arguments, name) for name in names} | {"learn_from_writing": arguments.learn}
    if not arguments.notebook:
        return session.generate(arguments.prompt, **options), None
    from ttt_e2e.retrieval.generate import generate_with_notebook
    from ttt_e2e.retrieval.notebook import Notebook, notebook_folder

    count = _PASSAGES if arguments.passages is None else arguments.passages
    folder, embed = notebook_folder(arguments.session), load_embedding(arguments.embeddings)
    with Notebook(folder, embed=embed, create=False) as notebook:
        return generate_with_notebook(
            session, notebook, arguments.prompt, count=count, learn=arguments.learn, **options
        )


def _note_notebook_to_copy(session: Path, save: Path) -> None:
    """Say how the session that was saved without a notebook gets one."""
    from ttt_e2e.retrieval.notebook import notebook_folder

    source, target = notebook_folder(session), notebook_folder(save)
    if not target.exists():
        note(f"{save} has no notebook yet; copy {source} to {target} to give it one.")
