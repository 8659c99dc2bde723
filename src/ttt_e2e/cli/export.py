"""`ttt-e2e export`: what a session has learned, for other programs."""

import argparse
from pathlib import Path

from ttt_e2e.cli.common import add_options, open_session
from ttt_e2e.convert.named import find_model
from ttt_e2e.errors import UserError
from ttt_e2e.files import lock_beside, read_json
from ttt_e2e.units import whole

HELP = "write what a session has learned for other programs"
DESCRIPTION = "Write what a session has learned in the format of another program."
EPILOG = """example:
  ttt-e2e export lora book.session adapter --model model

See also: ttt-e2e export lora --help"""
_RANK = 64
# Families whose models are the same here and there but for the layout, so that an adapter fits the original.
_SAME = ("llama", "mistral", "qwen2", "qwen3")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `export`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    lora = actions.add_parser(
        "lora",
        help="a LoRA adapter",
        description="""\
Write what a session has learned as a LoRA adapter in the format of the library peft, which vLLM and
SGLang load as well, and llama.cpp through its convert_lora_to_gguf.py. The model must have been
converted with --fast split. The adapter is added to the original, or to what `ttt-e2e convert to-hf
--plain` makes of a model that was trained further.""",
        epilog="""examples:
  ttt-e2e export lora book.session adapter --model model
  ttt-e2e convert to-hf model plain --plain
  ttt-e2e export lora book.session adapter --model model --base plain --rank 16

and in Python:
  from peft import PeftModel
  from transformers import AutoModelForCausalLM
  model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("plain"), "adapter")""",
    )
    lora.add_argument("session", type=Path, metavar="SESSION", help="a session file")
    lora.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    add_options(lora, "model")
    lora.add_argument("--base", metavar="NAME", help="the base of the adapter (default: what the model was made of)")
    lora.add_argument(
        "--rank",
        type=_rank,
        default=_RANK,
        metavar="R",
        help=f"rank of the adapter, or full, which loses nothing (default: {_RANK})",
    )
    lora.set_defaults(dtype=None, device="cpu", threads=None)  # for `open_session`: nothing is computed with the model


def _rank(text: str) -> int | None:
    try:
        return None if text == "full" else whole(1, 2**24)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor full") from error


def run(arguments: argparse.Namespace) -> int:
    """Write the adapter and print what it keeps; returns 0."""
    from ttt_e2e.inference.load import shipped_model
    from ttt_e2e.inference.lora_adapter import check_split, export_lora
    from ttt_e2e.model.checkpoint import load_config

    folder, base = find_model(arguments.model, progress=True) or shipped_model(), arguments.base
    check_split(load_config(folder))
    if base is None:
        notes = read_json(folder / "config.json").get("notes", {})
        base = notes.get("source")
        if notes.get("source_family") not in _SAME or Path(str(base)).is_file():
            raise UserError(
                "An adapter for this model does not fit its original, as it was trained further or comes from a GGUF "
                "file or another family; write a base with `ttt-e2e convert to-hf MODEL PLAIN --plain`, and name it: "
                "--base PLAIN."
            )
    with lock_beside(arguments.out):
        done = export_lora(open_session(arguments), arguments.out, base, arguments.rank)
    print(
        f"{arguments.out}: {done.matrices} matrices of rank {done.rank}, {done.parameters:,} parameters, for {base}; "
        f"{done.error:.1%} of what was learned is left out"
    )
    return 0
