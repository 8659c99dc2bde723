"""`ttt-e2e convert`: models of other programs, in and out."""

import argparse
from pathlib import Path

from ttt_e2e.cli.common import LEARNING, add_options, learning_options
from ttt_e2e.convert.named import find_model
from ttt_e2e.errors import UserError
from ttt_e2e.files import expand_user, lock_beside
from ttt_e2e.units import natural

HELP = "convert models from and to other programs"
DESCRIPTION = (
    "Make a model folder of a model that another program wrote, or convert a model folder for another program."
)
EPILOG = """examples:
  ttt-e2e convert from-hf Qwen/Qwen2.5-0.5B model
  ttt-e2e convert from-gguf Qwen3-0.6B-Q8_0.gguf model
  ttt-e2e convert from-standard run/model model --window 1024
  ttt-e2e convert from-official checkpoints/pretrain-125m-e2e model --preset 125m --tokenizer NAME
  ttt-e2e convert to-hf model hf-model
  ttt-e2e convert ACTION --help"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `convert`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    from_hf = actions.add_parser(
        "from-hf",
        help="a pretrained Transformer from Hugging Face",
        description="""\
Turn a pretrained Transformer (Llama, Mistral, Ministral, Qwen 2, 2.5 or 3, Gemma 1, 2 or 3, Phi-3 or
4, SmolLM3, Granite 3, OLMo 2 or 3) into a model that can learn while it reads. The last blocks get a
fast MLP. Until the first update the predictions are those of the original, within the window. Train
the result further on tokens that were prepared with its tokenizer:
ttt-e2e train PRESET --from OUT --data DIR --out RUN""",
        epilog="""examples:
  ttt-e2e convert from-hf Qwen/Qwen2.5-0.5B model
  ttt-e2e convert from-hf checkpoints/llama model --window 4096 --fast-share 0.5""",
    )
    from_hf.add_argument(
        "source", metavar="PATH_OR_NAME", help="a checkpoint folder, a GGUF file, or a name on Hugging Face"
    )

    from_gguf = actions.add_parser(
        "from-gguf",
        help="a pretrained Transformer in a GGUF file of llama.cpp",
        description="""\
Turn the model in a GGUF file (Llama, Mistral, Qwen 2, 2.5 or 3, Gemma 1, 2 or 3) into one that can
learn while it reads, as from-hf does, with the tokenizer and the chat template of the file. Quantised
weights become floats again. This needs the library gguf: pip install "ttt-e2e[gguf]".""",
        epilog="""example:
  ttt-e2e convert from-gguf Qwen3-0.6B-Q8_0.gguf model --dtype bfloat16""",
    )
    from_gguf.add_argument("source", metavar="FILE", help="a GGUF file")
    dtype = "of the weights in the file (default: bfloat16 if the original's are and none is rounded, else float32)"
    for pretrained in (from_hf, from_gguf):
        pretrained.add_argument("out", type=Path, metavar="OUT", help="the model folder to write")
        add_options(pretrained, *LEARNING, "sink", "calibration-text")
        pretrained.add_argument("--dtype", choices=("float32", "bfloat16"), help=dtype)
        add_options(pretrained, "quiet")

    from_standard = actions.add_parser(
        "from-standard",
        help="a standard Transformer that was trained here",
        description="""\
Turn a standard Transformer that was trained here, such as small-full or small-window, into a model
that can learn while it reads. Where the window covers the text, the predictions are those of the
original until the first update. Train the result further:
ttt-e2e train PRESET --from OUT --data DIR --out RUN""",
        epilog="""examples:
  ttt-e2e convert from-standard run/model model --window 1024
  ttt-e2e train small --data tokens --out warm --from model""",
    )
    from_standard.add_argument("source", type=Path, metavar="MODEL", help="a model folder")
    from_standard.add_argument("out", type=Path, metavar="OUT", help="the model folder to write")
    add_options(from_standard, *LEARNING)

    from_official = actions.add_parser(
        "from-official",
        help="a checkpoint of the official JAX implementation",
        description="""\
Turn a checkpoint of the official JAX implementation's trainer into a model folder. This needs
tensorstore, not JAX: pip install "ttt-e2e[official]". The weights keep their values; the state of
the optimizer is ignored.

Vocabulary, sizes, layers, heads, suffix and output head are read from the checkpoint. The other
settings come from a preset, or are named: pattern, rope_theta, sliding_window and mini_batch_size.
A model with full attention that was extended to a longer context has another rope_theta than its
preset.""",
        epilog="""examples:
  ttt-e2e convert from-official checkpoints/pretrain-125m-e2e model --preset 125m --tokenizer NAME
  ttt-e2e convert from-official checkpoints/pretrain-125m-e2e/4800 model --preset 125m
  ttt-e2e convert from-official checkpoints/ext-125m-fa-32K model --preset 125m-full rope_theta=2e6
  ttt-e2e convert from-official checkpoints/mine model pattern=window rope_theta=5e5 sliding_window=512 \\
      mini_batch_size=64""",
    )
    add = from_official.add_argument
    add("source", type=Path, metavar="DIR", help="the folder of a step, or of steps: then the last complete one")
    add("out", type=Path, metavar="OUT", help="the model folder to write")
    add("settings", nargs="*", metavar="NAME=VALUE", help="a setting of the model")
    add("--step", type=natural, metavar="N", help="convert step N instead of the last one")
    add("--preset", metavar="PRESET", help="the source of all other settings; see `ttt-e2e presets`")
    add("--tokenizer", metavar="NAME", help="the tokenizer of the training tokens, to be copied")
    add_options(from_official, "quiet")

    to_hf = actions.add_parser(
        "to-hf",
        help="a model folder for the transformers library",
        description="""\
Write a model folder for the transformers library: pip install "ttt-e2e[hf]". Once `ttt_e2e.hf` is
imported, AutoModelForCausalLM loads it; `generate`, pipelines and the Trainer work, and it learns
while it reads. With --plain it is a Llama, Qwen 2 or Qwen 3 that any program loads, which learns
nothing and has no window: it predicts the same within the window of the model. What a session has
learned is added to it by `ttt-e2e export lora`.""",
        epilog="""example:
  ttt-e2e convert to-hf run/model hf-model

and in Python:
  import ttt_e2e.hf
  from transformers import pipeline
  print(pipeline("text-generation", "hf-model")("Once more", max_new_tokens=50))""",
    )
    to_hf.add_argument("source", type=Path, metavar="MODEL", help="a model folder")
    to_hf.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    to_hf.add_argument("--plain", action="store_true", help="as a model of transformers' own, which learns nothing")


def run(arguments: argparse.Namespace) -> int:
    """Convert and print what came out; returns 0."""
    with lock_beside(arguments.out):
        _convert(arguments)
    return 0


def _convert(arguments: argparse.Namespace) -> None:
    source, out = arguments.source, arguments.out
    if arguments.action in ("from-hf", "from-gguf"):
        from ttt_e2e.convert.from_hf import convert_from_hf, describe
        from ttt_e2e.convert.gguf_files import require_gguf

        if arguments.action == "from-gguf":
            require_gguf(expand_user(source))
        options = learning_options(arguments)
        converted = convert_from_hf(
            source,
            out,
            options,
            calibration_text=arguments.calibration_text,
            dtype=arguments.dtype,
            progress=not arguments.quiet,
        )
        print(f"{out}: {'; '.join(describe(converted))}")
    elif arguments.action == "from-standard":
        from ttt_e2e.convert.from_standard import convert_from_standard

        config = convert_from_standard(source, out, learning_options(arguments))
        blocks = f"{config.suffix_layers} of {config.num_hidden_layers} blocks"
        print(f"{out}: {blocks} learn; window {config.sliding_window}")
    elif arguments.action == "from-official":
        from ttt_e2e.convert.from_official import convert_from_official

        done = convert_from_official(
            source,
            out,
            step=arguments.step,
            preset_name=arguments.preset,
            settings=arguments.settings,
            tokenizer=arguments.tokenizer,
            progress=not arguments.quiet,
        )
        print(f"{out}: step {done.step.name}, {done.parameters:,} parameters in {done.dtype}")
    else:
        try:
            from ttt_e2e.hf.export import convert_to_hf
        except ImportError as error:
            raise UserError('Writing for transformers needs that library: pip install "ttt-e2e[hf]".') from error
        folder = find_model(source) or source
        count = convert_to_hf(folder, out, plain=arguments.plain)
        print(f"{out}: {count:,} parameters, for transformers")
