"""`ttt-e2e cost`: count what a model costs, without running it."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttt_e2e.cli.common import LEARNING, add_options, learning_options, print_json
from ttt_e2e.config.parse import override
from ttt_e2e.config.presets import PRESETS, preset
from ttt_e2e.config.schema import ModelConfig, RunConfig
from ttt_e2e.convert.learning import LearningOptions, config_from_source, full_attention_config
from ttt_e2e.errors import UserError
from ttt_e2e.files import read_json
from ttt_e2e.units import rate, tokens

if TYPE_CHECKING:
    from ttt_e2e.model.cost import Cost

HELP = "count what a model costs, without running it"
DESCRIPTION = """Count a model's parameters and, for texts of several lengths, the size of its state after the text
and the operations per token: for reading (learning included), for generating one more token, for
training, and for training with activation_checkpointing=mini-batch. In brackets: as a multiple of
full attention of the same size. Operations are those of matrix products, a multiplication and an
addition counting as two; attention is counted by the pairs of tokens it needs.

MODEL is a preset, a model folder, or a pretrained Transformer that `convert from-hf` can convert:
its folder, its config.json, or its name on Hugging Face, from which only config.json is fetched.
The converted model is counted."""
EPILOG = """examples:
  ttt-e2e cost 3b
  ttt-e2e cost 3b --context 8K 128K 2M
  ttt-e2e cost tiny sliding_window=1024 mini_batch_size=128 --json
  ttt-e2e cost Qwen/Qwen3-8B --fast split --fast-rank 16 --train 1000M"""

_FLOPS = 400 * 10**12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cost`."""
    parser.add_argument("model", metavar="MODEL", help="a preset, see `ttt-e2e presets`, or a folder, file or name")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="change a setting of the model")
    parser.add_argument(
        "--context",
        nargs="+",
        type=tokens,
        metavar="TOKENS",
        help="lengths of the text, such as 8192, 128K or 2M (default: the context of the preset or else the window, "
        "and 4 and 16 times that)",
    )
    parser.add_argument(
        "--train", type=tokens, metavar="TOKENS", help="also print how long training on TOKENS tokens takes"
    )
    parser.add_argument(
        "--flops",
        type=rate,
        default=_FLOPS,
        metavar="RATE",
        help="operations a second that the machine sustains, such as 400T (the default: two fifths of what NVIDIA "
        "states for an H100 in bfloat16)",
    )
    add_options(parser, "json")
    add_options(parser.add_argument_group("how a pretrained Transformer would be converted"), *LEARNING)


def run(arguments: argparse.Namespace) -> int:
    """Count and print; returns 0. Raises UserError for a model that does not exist or cannot be converted."""
    from ttt_e2e.model.cost import cost, parameters, training_bytes

    name, config, reference = _find_model(arguments)
    first = config.train.context
    contexts = arguments.context or [first, 4 * first, 16 * first]
    dtype = config.train.dtype
    dtype_bytes = 2 if dtype == "bfloat16" else 4

    def costs_of(config: RunConfig) -> "list[Cost]":
        return [cost(config.model, context, dtype_bytes, config.train.train_mode) for context in contexts]

    costs = {name: costs_of(config)}
    if reference is not None:
        costs[reference[0]] = costs_of(reference[1])
    count, train_bytes = parameters(config.model), training_bytes(config.model)
    if not arguments.json:
        _print_tables(costs, count, train_bytes, dtype, arguments)
        return 0
    report: dict[str, Any] = {
        "dtype": dtype,
        "bytes": {"float32": 4 * count, "bfloat16": 2 * count, "training": train_bytes},
        "costs": {name: [asdict(cost) for cost in row] for name, row in costs.items()},
    }
    if arguments.train:
        times = [_training_hours(cost, arguments) for cost in costs[name]]
        report["training"] = {"tokens": arguments.train, "flops": arguments.flops, "hours": times}
    print_json(report)
    return 0


def _print_tables(
    costs: "dict[str, list[Cost]]", count: int, train_bytes: int, dtype: str, arguments: argparse.Namespace
) -> None:
    from ttt_e2e.model.cost import in_bytes, in_tokens, table

    name, *reference = costs
    weights = f"{in_bytes(4 * count)} in float32, {in_bytes(2 * count)} in bfloat16"
    print(f"{name}: {count:,} parameters, {weights}; {in_bytes(train_bytes)} to train, plus activations")
    brackets = f"; in brackets: as a multiple of {reference[0]}" if reference else ""
    print(f"State of one text (caches in {dtype}), and operations per token{brackets}\n")
    print(table(*costs.values()))
    if arguments.train:
        speed = f"{arguments.flops / 1e12:g} T operations a second"
        print(f"\nHours to train on {arguments.train:,} tokens, at {speed}\n")
        print(f"{'context':<8}{'training':>18}{'recomputing':>18}")
        for cost in costs[name]:
            hours = _training_hours(cost, arguments).values()
            cells = (f"{h:,.1f}" if h >= 10 else f"{h:.2g}" for h in hours)
            print(f"{in_tokens(cost.context):<8}" + "".join(f"{cell:>18}" for cell in cells))


def _find_model(arguments: argparse.Namespace) -> tuple[str, RunConfig, tuple[str, RunConfig] | None]:
    """Name and settings of the model to count, and of the same model with full attention, if it is another one."""
    model, options = arguments.model, learning_options(arguments)
    path = Path(model).expanduser()
    if model in PRESETS or not (path.exists() or "/" in model):
        _reject_learning_options(options)
        config, full = override(preset(model), arguments.settings), f"{model.split('-')[0]}-full"
        return model, config, None if model == full else (full, PRESETS[full])
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file() and _is_ours(path / "config.json"):
        from ttt_e2e.model.checkpoint import load_config

        _reject_learning_options(options)
        return path.resolve().name, _run_config(load_config(path), arguments.settings), None
    from ttt_e2e.convert.hf_config import read_source
    from ttt_e2e.convert.hf_files import find_config

    file = find_config(model)
    source = read_source(read_json(file), file)
    name = file.resolve().parent.name if path.exists() else model.rsplit("/")[-1]
    config = _run_config(config_from_source(source, options), arguments.settings)
    return name, config, ("the original", _run_config(full_attention_config(source), []))


def _is_ours(path: Path) -> bool:
    from ttt_e2e.model.checkpoint import FORMAT

    return read_json(path).get("format") == FORMAT


def _run_config(model: ModelConfig, settings: list[str]) -> RunConfig:
    """Training of `model` in bfloat16, with its window as context."""
    train = replace(PRESETS["3b"].train, context=model.sliding_window)
    return override(RunConfig(model, train), settings)


def _reject_learning_options(options: LearningOptions) -> None:
    if options != LearningOptions():
        raise UserError(
            "--window, --suffix and the like are for a pretrained Transformer; of a preset or a model folder change "
            "settings, such as sliding_window=1024."
        )


def _training_hours(cost: "Cost", arguments: argparse.Namespace) -> dict[str, float]:
    from ttt_e2e.model.cost import hours

    operations = cost.operations
    return {
        "training": hours(operations.training, arguments.train, arguments.flops),
        "training_recomputed": hours(operations.training_recomputed, arguments.train, arguments.flops),
    }
