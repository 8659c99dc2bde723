"""`ttt-e2e train`: train a model that learns well while it reads."""

import argparse
from pathlib import Path

from ttt_e2e.cli.common import add_options
from ttt_e2e.config.parse import override
from ttt_e2e.config.presets import extend_model, extend_training, preset
from ttt_e2e.config.schema import RunConfig
from ttt_e2e.convert.named import find_model
from ttt_e2e.errors import INTERRUPTED, UserError
from ttt_e2e.units import count

HELP = "train a model to learn well while it reads"
DESCRIPTION = """Train a preset on prepared tokens, through the inner updates, so that learning while reading helps.
Change settings with NAME=VALUE, such as train.steps=500 or sliding_window=512. Ctrl-C writes a
checkpoint; the same command with --resume continues from the last one as if nothing had happened."""
EPILOG = """examples:
  ttt-e2e train tiny --data tokens --out run
  ttt-e2e train tiny --data tokens --out run --resume
  ttt-e2e train tiny --data tokens --out mine sliding_window=256 mini_batch_size=32 inner_loop.lr=3
  ttt-e2e train tiny-window --data tokens --out window train.steps=2000
  ttt-e2e train tiny --data tokens --out long --from run/model --extend 8192
  ttt-e2e train tiny --data tokens --out further --from run/model trainable=suffix
  torchrun --nproc-per-node 8 -m ttt_e2e train 125m --data tokens --out run

The tokens must have the vocabulary of the preset: 4,096 for tiny, which is what `prepare` makes,
8,192 for small, and that of Llama 3's tokenizer for the published sizes; or set vocab_size.
`ttt-e2e presets --json` lists all settings; ttt_e2e/config/schema.py explains them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `train`."""
    add = parser.add_argument
    add("preset", metavar="PRESET", help="see `ttt-e2e presets`")
    add("settings", nargs="*", metavar="NAME=VALUE", help="change a setting of the preset")
    add("--data", type=Path, required=True, metavar="DIR", help="tokens from `prepare`, or the official zarr arrays")
    add("--tokenizer", metavar="NAME", help="the tokenizer of the zarr arrays")
    add("--out", type=Path, required=True, metavar="RUN", help="the folder of the run")
    add("--resume", action="store_true", help="continue from the last checkpoint of the run")
    add("--from", dest="start_from", type=Path, metavar="MODEL", help="start from this model or checkpoint, or smollm2")
    add(
        "--extend",
        type=count,
        metavar="TOKENS",
        help="with --from: continue at this longer context, by the published recipe",
    )
    add(
        "--cache",
        type=Path,
        metavar="DIR",
        help="with cache_prefix=true: the folder for the outputs of the frozen prefix (default: RUN/prefix)",
    )
    add_options(parser, "device", "threads", "compile")
    add("--tensorboard", action="store_true", help="log for TensorBoard, in RUN/tensorboard")
    add("--wandb", action="store_true", help="log to Weights & Biases")
    add_options(parser, "quiet")


def run(arguments: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    config = preset(arguments.preset)
    if arguments.extend is not None and arguments.start_from is None:
        raise UserError("--extend trains a model further; name the model with --from.")
    start_from = find_model(arguments.start_from, progress=not arguments.quiet)
    if start_from is not None:
        from ttt_e2e.model.checkpoint import load_config

        config = RunConfig(load_config(start_from), config.train)
    if arguments.extend is not None:
        longer = extend_training(config.train, arguments.extend, config.train.steps)
        config = RunConfig(extend_model(config.model, arguments.extend), longer)
    config = override(config, arguments.settings)
    from ttt_e2e.hardware import keep_freed_memory
    from ttt_e2e.training.trainer import train

    keep_freed_memory()
    result = train(
        config,
        arguments.data,
        arguments.out,
        resume=arguments.resume,
        start_from=start_from,
        cache=arguments.cache,
        tokenizer=arguments.tokenizer,
        device=arguments.device,
        tensorboard=arguments.tensorboard,
        wandb=arguments.wandb,
        progress=not arguments.quiet,
        threads=arguments.threads,
        compile=arguments.compile,
    )
    return INTERRUPTED if result.interrupted else 0
