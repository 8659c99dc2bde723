"""`ttt-e2e generate`: continue a prompt, or the text that a session has read."""

import argparse
from pathlib import Path
from typing import Any

from ttt_e2e.cli.common import add_options, check_output, lock_saved, note, open_session, print_json, text
from ttt_e2e.errors import UserError
from ttt_e2e.units import amount, count, natural, part, share

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `generate`."""
    add = parser.add_argument
    add("prompt", nargs="?", type=text, default="", metavar="PROMPT", help="the text to continue")
    add_options(parser, "model", "dtype", "device", "threads")
    add("--session", type=Path, metavar="SESSION", help="what the model has read before")
    add("--max-tokens", type=natural, default=200, metavar="N", help="generate at most N tokens (default: 200)")
    add("--temperature", type=amount, default=0.8, metavar="T", help="0: always the most likely token (default: 0.8)")
    add("--top-p", type=part, default=0.95, metavar="P", help="nucleus sampling, probability kept (default: 0.95)")
    add("--top-k", type=natural, default=0, metavar="K", help="keep the K most likely tokens; 0: all (default: 0)")
    add("--min-p", type=share, default=0, metavar="P", help="smallest probability relative to the largest (default: 0)")
    add("--stop", type=text, action="append", default=[], metavar="TEXT", help="stop before TEXT; may be repeated")
    add("--seed", type=natural, default=0, metavar="N", help="random seed (default: 0)")
    add("--learn", action="store_true", help="learn from the prompt and from the generated text")
    add("--save", type=Path, metavar="SESSION", help="with --learn: save what was learned")
    add_options(parser, "precision")
    add("--notebook", action="store_true", help="put matching passages of the session's notebook into the window")
    add("--passages", type=count, metavar="N", help="with --notebook: at most N passages (default: 3)")
    add_options(parser, "embeddings", "json")


def run(arguments: argparse.Namespace) -> int:
    """Generate and print; returns 0."""
    if arguments.save and not arguments.learn:
        raise UserError("Without --learn there is nothing new to --save; add --learn, or leave --save out.")
    if not arguments.notebook:
        for option, value in (("--passages", arguments.passages), ("--embeddings", arguments.embeddings)):
            if value is not None:
                raise UserError(f"{option} needs a notebook; add --notebook, or leave it out.")
    elif arguments.session is None:
        raise UserError("A notebook belongs to a session; name it with --session, or leave --notebook out.")
    elif not arguments.prompt.strip():
        raise UserError("The notebook is searched for the words of the prompt; give one, or leave --notebook out.")
    with lock_saved(arguments):
        return _generate(arguments)


def _generate(arguments: argparse.Namespace) -> int:
    from ttt_e2e.reading.recording import forget_unread
    from ttt_e2e.retrieval.generate import generate_with_notebook
    from ttt_e2e.retrieval.notebook import Notebook, notebook_folder
    from ttt_e2e.retrieval.passages import format_passages
    from ttt_e2e.retrieval.search_index import load_embed

    session = open_session(arguments)
    if arguments.learn and not session.learn:
        note("This session, or its model, does not learn; the generated text still becomes part of the session.")
    names = ("max_tokens", "stop", "temperature", "top_k", "top_p", "min_p", "seed")
    options = {name: getattr(arguments, name) for name in names} | {"learn_from_writing": arguments.learn}
    sources = None
    if arguments.notebook:
        if arguments.passages is not None:
            options["count"] = arguments.passages
        embed = load_embed(arguments.embeddings) if arguments.embeddings else None
        with Notebook(notebook_folder(arguments.session), embed=embed, create=False) as notebook:
            chunks, sources = generate_with_notebook(
                session, notebook, arguments.prompt, learn=arguments.learn, **options
            )
    else:
        chunks = session.generate(arguments.prompt, **options)
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
            if not arguments.save:
                check_output()
        print(flush=True)
        if sources is not None:
            note(f"\npassages of the notebook:\n\n{format_passages(sources) or 'none fits the prompt and the window'}")
    if arguments.save:
        forget_unread(arguments.save)
        session.save(arguments.save, arguments.precision)
        note(f"session: {arguments.save}")
        if arguments.notebook and not (target := notebook_folder(arguments.save)).exists():
            source = notebook_folder(arguments.session)
            note(f"{arguments.save} has no notebook yet; copy {source} to {target} to give it one.")
    return 0
