"""`ttt-e2e presets`: list the models that can be trained."""

import argparse
from itertools import groupby

from ttt_e2e.cli.common import add_options, print_json
from ttt_e2e.config.parse import to_dict
from ttt_e2e.config.presets import PRESETS

HELP = "list the models that can be trained"
DESCRIPTION = """List the presets: the published sizes (125m to 3b), tiny for a laptop and small for a single GPU,
each with its baselines."""
EPILOG = """NAME is the method, NAME-full the same size with full attention, NAME-window with a sliding window.

example:
  ttt-e2e presets --json                  all their settings"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `presets`."""
    add_options(parser, "json")


def run(arguments: argparse.Namespace) -> int:
    """Print the presets; returns 0."""
    from ttt_e2e.model.cost import parameters

    counts = {name: parameters(config.model) for name, config in PRESETS.items()}
    if arguments.json:
        print_json({name: {"parameters": counts[name], **to_dict(config)} for name, config in PRESETS.items()})
        return 0
    columns = ("parameters", "vocabulary", "blocks", "suffix", "width", "window k", "b", "context", "steps")
    print(f"{'preset':<22}" + "".join(f"{column:>12}" for column in columns) + "  mixers")
    for name, config in PRESETS.items():
        model, train = config.model, config.train
        values = (
            f"{counts[name] / 1e6:,.1f} M",
            f"{model.vocab_size:,}",
            model.num_hidden_layers,
            model.suffix_layers or "-",
            model.hidden_size,
            model.sliding_window if set(model.mixers) - {"full"} else "all",
            model.mini_batch_size or "-",
            train.context,
            train.steps,
        )
        runs = [(mixer, len([*group])) for mixer, group in groupby(model.pattern)]
        mixers = ", ".join(mixer if n == 1 else f"{n} x {mixer}" for mixer, n in runs)
        print(("" if "-" in name else "\n") + f"{name:<22}" + "".join(f"{v!s:>12}" for v in values) + f"  {mixers}")
    print("\nTrain one with: ttt-e2e train PRESET --data DIR --out RUN [NAME=VALUE ...]")
    print("The tokens in DIR need its vocabulary: ttt-e2e prepare TEXTS --out DIR --vocab-size N, or --tokenizer NAME;")
    print("or set vocab_size=N.")
    return 0
