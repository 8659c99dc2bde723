"""What `ttt-e2e cost` looks like on the command line, and what it prints."""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ttt_e2e.cli import convert as convert_command
from ttt_e2e.config.parse import override
from ttt_e2e.config.presets import PRESETS, preset
from ttt_e2e.config.schema import ModelConfig, RunConfig
from ttt_e2e.convert.start import Start, full_attention, model_config
from ttt_e2e.errors import UserError
from ttt_e2e.model.cost import Cost, cost, hours, in_bytes, in_tokens, parameters, table, training_bytes
from ttt_e2e.units import rate, tokens

DESCRIPTION = """Count a model's parameters and, for texts of several lengths, what one of them leaves behind in it, and
the operations per token: reading (learning included), writing one token more, training, and training with
recompute=mini-batch. In brackets: as a multiple of full attention of that size. Operations are those of matrix
products, a product and its sum as two; attention by the pairs it needs.

MODEL is a preset, a model folder, or a pretrained Transformer that `convert from-hf` can convert: its folder, its
config.json, or its name on Hugging Face, of which only config.json is fetched. What would come of it is counted."""
EPILOG = """examples:
  ttt-e2e cost 3b
  ttt-e2e cost 3b --context 8K 128K 2M
  ttt-e2e cost tiny window=1024 mini_batch=128 --json
  ttt-e2e cost Qwen/Qwen3-8B --fast split --fast-rank 16 --train 1000M"""

_FLOPS = 400 * 10**12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options."""
    parser.add_argument("model", metavar="MODEL", help="a preset, see `ttt-e2e presets`, or a folder, file or name")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="change a setting of the model")
    parser.add_argument(
        "--context",
        nargs="+",
        type=tokens,
        metavar="TOKENS",
        help="lengths of the text, such as 8192, 128K or 2M (default: the preset's or the window, 4 and 16 times that)",
    )
    parser.add_argument("--train", type=tokens, metavar="TOKENS", help="say how long training on so many takes")
    parser.add_argument(
        "--flops",
        type=rate,
        default=_FLOPS,
        metavar="RATE",
        help="operations a second that the machine keeps up, such as 400T (the default; two fifths of what NVIDIA "
        "states for an H100 in bfloat16)",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    convert_command.learning_options(parser.add_argument_group("how a pretrained Transformer would be converted"))


def run(arguments: argparse.Namespace) -> int:
    """Count and print; returns 0. Raises UserError for a model that is none or cannot be converted."""
    name, config, full = _model(arguments)
    first = config.train.context
    contexts = arguments.context or [first, 4 * first, 16 * first]
    configs = {name: config} | ({} if full is None else {full[0]: full[1]})
    dtype, count = config.train.dtype, parameters(config.model)
    size = 2 if dtype == "bfloat16" else 4
    costs = {n: [cost(c.model, at, size, c.train.train_mode == "meta") for at in contexts] for n, c in configs.items()}
    if arguments.json:
        found: dict[str, Any] = {"dtype": dtype}
        found["bytes"] = {"float32": 4 * count, "bfloat16": 2 * count, "training": training_bytes(config.model)}
        found["costs"] = {n: [asdict(at) for at in row] for n, row in costs.items()}
        if arguments.train:
            found["training"] = {"tokens": arguments.train, "flops": arguments.flops}
            found["training"]["hours"] = [_hours(at, arguments) for at in costs[name]]
        print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
        return 0
    weights = f"{in_bytes(4 * count)} in float32, {in_bytes(2 * count)} in bfloat16"
    print(
        f"{name}: {count:,} parameters, {weights}; {in_bytes(training_bytes(config.model))} to train, and activations"
    )
    beside = f"; in brackets: as a multiple of {full[0]}" if full else ""
    print(f"State of one text (caches in {dtype}), and operations per token{beside}\n")
    print(table(*costs.values()))
    if arguments.train:
        speed = f"{arguments.flops / 1e12:g} T operations a second"
        print(f"\nHours to train on {arguments.train:,} tokens, at {speed}\n")
        print(f"{'context':<8}{'training':>18}{'recomputing':>18}")
        for at in costs[name]:
            cells = [f"{_in_hours(number):>18}" for number in _hours(at, arguments).values()]
            print(f"{in_tokens(at.context):<8}" + "".join(cells))
    return 0


def _model(arguments: argparse.Namespace) -> tuple[str, RunConfig, tuple[str, RunConfig] | None]:
    """Name and settings of what is to be counted, and of the same with full attention, if it is not that itself."""
    asked, start = arguments.model, convert_command.start(arguments)
    path = Path(asked).expanduser()
    if asked in PRESETS or not (path.exists() or "/" in asked):
        _no_start(start)
        config, full = override(preset(asked), arguments.settings), f"{asked.split('-')[0]}-full"
        return asked, config, None if asked == full else (full, PRESETS[full])
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file() and _is_ours(path / "config.json"):
        from ttt_e2e.model.checkpoint import load_config

        _no_start(start)
        return path.resolve().name, _run_config(load_config(path), arguments.settings), None
    from ttt_e2e.convert.hf_config import read_source
    from ttt_e2e.convert.hf_files import find_config
    from ttt_e2e.model.checkpoint import read_json

    file = find_config(asked)
    source = read_source(read_json(file), file)
    name = file.resolve().parent.name if path.exists() else asked.rsplit("/")[-1]
    config = _run_config(model_config(source, start), arguments.settings)
    return name, config, ("the original", _run_config(full_attention(source), []))


def _is_ours(path: Path) -> bool:
    from ttt_e2e.model.checkpoint import FORMAT, read_json

    return read_json(path).get("format") == FORMAT


def _run_config(model: ModelConfig, settings: list[str]) -> RunConfig:
    """As it would be trained in bfloat16, with its window as context."""
    train = replace(PRESETS["3b"].train, context=model.sliding_window)
    return override(RunConfig(model, train), settings)


def _no_start(start: Start) -> None:
    if start != Start():
        raise UserError(
            "--window, --suffix and the like are for a pretrained Transformer; of a preset or a model folder change "
            "settings, such as window=1024."
        )


def _hours(at: Cost, arguments: argparse.Namespace) -> dict[str, float]:
    operations = at.operations
    return {
        "training": hours(operations.training, arguments.train, arguments.flops),
        "training_recomputed": hours(operations.training_recomputed, arguments.train, arguments.flops),
    }


def _in_hours(number: float) -> str:
    return f"{number:,.1f}" if number >= 10 else f"{number:.2g}"
