"""docs/reference/commands.md says what the parsers say; `python tests/docs/test_commands_reference.py` writes it."""

import argparse
from pathlib import Path

from ttt_e2e.cli.main import COMMANDS

PATH = Path(__file__).parents[2] / "docs/reference/commands.md"
BEGINNING = """# Commands

Exit codes: 0 for success, 1 for an error that is explained in one sentence, 2 for an invalid command line, 130 for
Ctrl-C. `ttt-e2e COMMAND --help` has examples.

What not everyone needs is an extra, installed by `pip install -e '.[serve]'` for instance: `serve`; `mcp`;
`embeddings` (search by meaning); `parquet` and `zarr` (data); `hf`, `gguf`, `official` and `harness` (other programs'
models, lm-eval); `tensorboard` and `wandb`; on a GPU `fla` and `mamba` (kernels); `dev` is what the tests and
benchmarks need.
"""


def reference() -> str:
    """The whole document, made from the parsers."""
    sections = [BEGINNING]
    for name, command in COMMANDS.items():
        parser = argparse.ArgumentParser(f"ttt-e2e {name}", description=command.DESCRIPTION)
        command.add_arguments(parser)
        sections += of_parser(parser)
    return "\n".join(sections)


def of_parser(parser: argparse.ArgumentParser) -> list[str]:
    """The sections of a command and of its actions."""
    arguments = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    actions = [action for action in arguments if isinstance(action, argparse._SubParsersAction)]
    positional = " ".join(words(action) for action in arguments if not action.option_strings and action not in actions)
    heading = f"## `{parser.prog} {positional}".rstrip() + "`\n"
    sections = [heading, (parser.description or "").strip() + "\n"]
    rows = [f"| `{words(a)}` | {explanation(a, parser)} |" for a in arguments if a.option_strings]
    if rows:
        sections.append("| option | |\n|---|---|\n" + "\n".join(rows) + "\n")
    for action in actions:
        for sub in action.choices.values():
            sections += of_parser(sub)
    return sections


def words(action: argparse.Action) -> str:
    """An argument as it is written: `--option VALUE`, `[FILE]`."""
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.choices is not None and action.metavar is None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    value = {"?": f"[{value}]", "*": f"[{value} ...]", "+": f"{value} [{value} ...]"}.get(str(action.nargs), value)
    return (
        f"{action.option_strings[-1]} {value if action.nargs != 0 else ''}".strip() if action.option_strings else value
    )


def explanation(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    return " ".join(text.split()).replace("|", "\\|")


def test_the_reference_of_the_commands_is_up_to_date() -> None:
    assert PATH.read_text() == reference(), f"run python {Path(__file__).relative_to(PATH.parents[2])}"


if __name__ == "__main__":
    PATH.write_text(reference())
