"""What `ttt-e2e convert` looks like on the command line. PyTorch is imported only when there is work to do."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_e2e.errors import UserError

if TYPE_CHECKING:
    from ttt_e2e.convert.start import Start

DESCRIPTION = "Make a model folder of a model that another program wrote, or one for another program of ours."
EPILOG = """examples:
  ttt-e2e convert from-hf Qwen/Qwen2.5-0.5B model
  ttt-e2e convert from-standard run/model model --window 1024 --fast split
  ttt-e2e convert from-official checkpoints/pretrain-125m-e2e model --preset 125m --tokenizer NAME
  ttt-e2e convert to-hf model hf-model
  ttt-e2e convert ACTION --help"""

_FROM_HF = """Make a model that can learn while it reads of a pretrained Transformer: Llama, Mistral, Qwen 2, 2.5 or 3.
The last blocks get a fast MLP. Until its first update the predictions are the original's, within the window.
What comes out is to be trained further: ttt-e2e train PRESET --from OUT."""
_FROM_HF_EPILOG = """examples:
  ttt-e2e convert from-hf Qwen/Qwen2.5-0.5B model
  ttt-e2e convert from-hf checkpoints/llama model --window 4096 --fast split --fast-share 0.5"""

_FROM_STANDARD = """Make a model that can learn while it reads of a standard one that was trained here, such as
small-full or small-window. Where the window covers the text, its predictions are the original's until its first update.
What comes out is to be trained further: ttt-e2e train PRESET --from OUT."""
_FROM_STANDARD_EPILOG = """examples:
  ttt-e2e convert from-standard run/model model --window 1024 --fast split
  ttt-e2e train small --data tokens --out warm --from model"""

_FROM_OFFICIAL = """Make a model folder of a checkpoint that the trainer of the official JAX implementation wrote.
JAX is not needed, but tensorstore is: pip install "ttt-e2e[official]". The weights keep their values; the
optimiser's state is left alone.

Vocabulary, widths, layers, heads, suffix and output head are told by the checkpoint. What it does not say comes from a
preset, or is named: pattern, rope_theta, window and mini_batch. A model with full attention that was extended to
a longer context has another rope_theta than its preset."""
_FROM_OFFICIAL_EPILOG = """examples:
  ttt-e2e convert from-official checkpoints/pretrain-125m-e2e model --preset 125m --tokenizer NAME
  ttt-e2e convert from-official checkpoints/pretrain-125m-e2e/4800 model --preset 125m
  ttt-e2e convert from-official checkpoints/ext-125m-fa-32K model --preset 125m-full rope_theta=2e6
  ttt-e2e convert from-official checkpoints/mine model pattern=window rope_theta=5e5 window=512 mini_batch=64"""

_TO_HF = """Write a model folder for the transformers library: pip install "ttt-e2e[hf]". Where `ttt_e2e.hf` is
imported, AutoModelForCausalLM loads it; `generate`, pipelines and the Trainer work, and it learns while it reads."""
_TO_HF_EPILOG = """example:
  ttt-e2e convert to-hf run/model hf-model

and in Python:
  import ttt_e2e.hf
  from transformers import pipeline
  print(pipeline("text-generation", "hf-model")("Once more", max_new_tokens=50))"""


def add_actions(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Give `parser` the actions of `convert`; returns their parsers by name."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    sub = actions.add_parser(
        "from-hf", help="a pretrained Transformer from Hugging Face", description=_FROM_HF, epilog=_FROM_HF_EPILOG
    )
    sub.add_argument("source", metavar="PATH_OR_NAME", help="the folder of a checkpoint, or its name on Hugging Face")
    sub.add_argument("out", type=Path, metavar="OUT", help="the model folder to write")
    learning_options(sub)
    sub.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights in the file (default: as they are)"
    )
    _quiet_option(sub)

    sub = actions.add_parser(
        "from-standard",
        help="a standard Transformer that was trained here",
        description=_FROM_STANDARD,
        epilog=_FROM_STANDARD_EPILOG,
    )
    sub.add_argument("source", type=Path, metavar="MODEL", help="a model folder")
    sub.add_argument("out", type=Path, metavar="OUT", help="the model folder to write")
    learning_options(sub)

    sub = actions.add_parser(
        "from-official",
        help="a checkpoint of the official JAX implementation",
        description=_FROM_OFFICIAL,
        epilog=_FROM_OFFICIAL_EPILOG,
    )
    sub.add_argument(
        "source", type=Path, metavar="DIR", help="the folder of a step, or of steps: the last complete one"
    )
    sub.add_argument("out", type=Path, metavar="OUT", help="the model folder to write")
    sub.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="a setting of the model")
    sub.add_argument("--step", type=int, metavar="N", help="this step and not the last")
    sub.add_argument("--preset", metavar="PRESET", help="where all other settings come from; see `ttt-e2e presets`")
    sub.add_argument("--tokenizer", metavar="NAME", help="what made the training tokens; it is put into the folder")
    _quiet_option(sub)

    sub = actions.add_parser(
        "to-hf", help="a model folder for the transformers library", description=_TO_HF, epilog=_TO_HF_EPILOG
    )
    sub.add_argument("source", type=Path, metavar="MODEL", help="a model folder")
    sub.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    return dict(actions.choices)


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says, and say what was done; returns 0. Raises UserError as the conversions do."""
    if arguments.action == "from-hf":
        from ttt_e2e.convert.from_hf import convert_from_hf, describe

        model = convert_from_hf(
            arguments.source, arguments.out, start(arguments), dtype=arguments.dtype, progress=not arguments.quiet
        )
        print(f"{arguments.out}: {'; '.join(describe(model))}")
    elif arguments.action == "from-standard":
        from ttt_e2e.convert.from_standard import convert_from_standard

        config = convert_from_standard(arguments.source, arguments.out, start(arguments))
        print(
            f"{arguments.out}: {config.suffix_layers} of {config.num_hidden_layers} blocks learn; window {config.sliding_window}"
        )
    elif arguments.action == "from-official":
        from ttt_e2e.convert.from_official import convert_from_official

        done = convert_from_official(
            arguments.source,
            arguments.out,
            step=arguments.step,
            preset_name=arguments.preset,
            settings=arguments.settings,
            tokenizer=arguments.tokenizer,
            progress=not arguments.quiet,
        )
        print(f"{arguments.out}: step {done.step.name}, {done.parameters:,} parameters in {done.dtype}")
    else:
        try:
            from ttt_e2e.convert.to_hf import convert_to_hf
        except ImportError as error:
            raise UserError('Writing for transformers needs that library: pip install "ttt-e2e[hf]".') from error
        print(f"{arguments.out}: {convert_to_hf(arguments.source, arguments.out):,} parameters, for transformers")
    return 0


def start(arguments: argparse.Namespace) -> "Start":
    """What the options of `learning_options` say."""
    from ttt_e2e.convert.start import Start

    return Start(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Start)})


def learning_options(sub: argparse._ActionsContainer) -> None:
    """Give a parser or a group of one the options that say how a model is to learn; `start` reads them."""
    sub.add_argument(
        "--window", type=int, metavar="K", help="tokens attention sees (default: 8192, or as many as the original)"
    )
    sub.add_argument(
        "--suffix", type=float, default=0.25, metavar="SHARE", help="of the blocks that learn (default: 0.25)"
    )
    sub.add_argument(
        "--mini-batch", type=int, metavar="B", help="tokens per update (default: an eighth of the window, at most 1024)"
    )
    sub.add_argument(
        "--fast",
        choices=("new", "split"),
        default="new",
        help="the fast MLP: a new one that adds nothing yet, or a part of the pretrained one (default: new)",
    )
    sub.add_argument(
        "--fast-share",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="its width, by the pretrained MLP's (default: 0.25)",
    )
    sub.add_argument(
        "--fast-rank",
        type=int,
        metavar="R",
        help="learn an addition of rank R to it alone, for smaller sessions (default: all of it)",
    )


def _quiet_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
