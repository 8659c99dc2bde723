"""`ttt-e2e info`: describe a model folder or a session file."""

import argparse
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_e2e.cli.common import add_options, print_json
from ttt_e2e.config.parse import flatten
from ttt_e2e.convert.named import find_model
from ttt_e2e.errors import UserError
from ttt_e2e.files import read_json

if TYPE_CHECKING:
    from ttt_e2e.model.transformer import Transformer

HELP = "describe a model folder or a session"
DESCRIPTION = "Describe what a model folder or a session file holds: sizes, parameters, digests."
EPILOG = """examples:
  ttt-e2e info                      the shipped model
  ttt-e2e info run/model
  ttt-e2e info book.session"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `info`."""
    parser.add_argument("path", nargs="?", type=Path, metavar="PATH", help="a model folder, smollm2, or a session file")
    add_options(parser, "json")


def run(arguments: argparse.Namespace) -> int:
    """Print the description; returns 0."""
    from ttt_e2e.inference.load import shipped_model
    from ttt_e2e.inference.session_file import session_facts
    from ttt_e2e.model.checkpoint import load_transformer, model_digest

    path = find_model(arguments.path) or shipped_model()
    if not path.exists():
        raise UserError(f"There is no model folder or session file {path}; check the path.")
    if path.is_file():
        facts = {"kind": "session", "path": str(path), "bytes": path.stat().st_size, **session_facts(path)}
        if "unfinished" in facts:
            unfinished = facts.pop("unfinished")
            facts["unfinished"] = f"after {unfinished['tokens']:,} tokens of {unfinished['name']}"
    else:
        model = load_transformer(path)
        facts = {
            "kind": "model",
            "path": str(path),
            "bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "fast_weights": sum(w.numel() for pair in model.initial_fast_weights(1) for w in pair),
            "digest": model_digest(model),
            **flatten(model.config),
            **_learned_rates(model),
            "notes": read_json(path / "config.json").get("notes", {}),
        }
    if arguments.json:
        print_json(facts)
        return 0
    width = max(map(len, facts)) + 2
    if rates := facts.get("learned_rates"):
        shown = {name: " / ".join(f"{rate:.3g}" for rate in some) for name, some in rates.items()}
        facts["learned_rates"] = ", ".join(f"{name} {some}" for name, some in shown.items())
    for key, value in facts.items():
        print(f"{key:<{width}}{f'{value:,}' if isinstance(value, int) and not isinstance(value, bool) else value}")
    return 0


def _learned_rates(model: "Transformer") -> dict[str, dict[str, list[float]]]:
    """The smallest, median and largest rate that each kind of fast matrix has, over the blocks; {} without any."""
    if not (model.suffix and model.config.inner_loop.learned_lr):
        return {}
    factors = zip(*(block.log_lr_scale.exp().tolist() for block in model.suffix), strict=True)
    names = [field.rpartition("_")[0] for field in model.fast_kind._fields]
    kinds = {name: [model.config.inner_loop.lr * x for x in some] for name, some in zip(names, factors, strict=True)}
    return {"learned_rates": {name: [min(x), statistics.median(x), max(x)] for name, x in kinds.items()}}
