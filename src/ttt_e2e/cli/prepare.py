"""`ttt-e2e prepare`: turn texts into tokens to train on."""

import argparse
import shlex
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_e2e.cli.common import add_options, print_json
from ttt_e2e.config.presets import preset
from ttt_e2e.convert.named import SMOLLM2, find_model
from ttt_e2e.files import lock_beside
from ttt_e2e.units import natural, share, whole

if TYPE_CHECKING:
    from ttt_e2e.data.prepare import Prepared

HELP = "turn texts into tokens to train on"
DESCRIPTION = """Tokenize texts into a folder to train on. A tokenizer is trained on them unless one is named. Text
files are one document each; JSONL, JSON arrays and parquet one per row; each may be compressed, and
folders are searched. Some of the documents are held out for validation or, where they are few, the
end of the longest. If interrupted, run the same command again to continue."""
EPILOG = """examples:
  ttt-e2e prepare --out tokens                          Python's own library, a small corpus that everyone has
  ttt-e2e prepare books/ more.jsonl --out tokens --vocab-size 8192
  ttt-e2e prepare c4.parquet --out tokens --tokenizer gpt2 --text-column content"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `prepare`."""
    add = parser.add_argument
    add("sources", nargs="*", type=Path, metavar="SOURCE", help="files and folders (default: Python's library)")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    add("--tokenizer", metavar="NAME", help="tokenizer.json, its folder, smollm2, or a name on Hugging Face")
    add(
        "--vocab-size",
        type=whole(257, 2**20),
        default=4096,
        metavar="N",
        help="of the tokenizer to train (default: 4096)",
    )
    add_options(parser, "text-column")
    add("--val", type=Path, nargs="+", metavar="SOURCE", help="documents to hold out (default: a share)")
    add("--val-share", type=share, default=0.02, metavar="SHARE", help="share to hold out (default: 0.02)")
    add("--seed", type=natural, default=0, metavar="N", help="random seed of that choice (default: 0)")
    add_options(parser, "json", "quiet")


def run(arguments: argparse.Namespace) -> int:
    """Prepare the tokens and print what they are; returns 0."""
    from ttt_e2e.data.prepare import prepare

    tokenizer = arguments.tokenizer
    if tokenizer == SMOLLM2:
        tokenizer = str(find_model(Path(tokenizer), progress=not arguments.quiet))
    with lock_beside(arguments.out, f"{arguments.out} is being prepared by another process; wait until it has ended."):
        prepared = prepare(
            arguments.sources or None,
            arguments.out,
            tokenizer=tokenizer,
            vocab_size=arguments.vocab_size,
            text_column=arguments.text_column,
            val=arguments.val,
            val_share=arguments.val_share,
            seed=arguments.seed,
            progress=not arguments.quiet,
        )
    if arguments.json:
        print_json(asdict(prepared) | {"folder": str(prepared.folder)})
        return 0
    for split, documents in prepared.documents.items():
        print(f"{split}: {documents:,} documents, {prepared.tokens[split]:,} tokens")
    print(f"vocabulary: {prepared.vocab_size:,} tokens")
    if prepared.divided:
        print(f"held out: the end of {prepared.divided}, since there are few documents")
    if prepared.skipped:
        print(f"skipped: {len(prepared.skipped)}, the first: {prepared.skipped[0]}")
    print(f"Train on it with: {_train_command(prepared)}")
    return 0


def _train_command(prepared: "Prepared") -> str:
    """A command that trains `tiny` on what was prepared, with the settings that differ for these tokens."""
    tiny = preset("tiny")
    run = next(name for i in count(1) if not Path(name := f"run-{i}" if i > 1 else "run").exists())
    words = ["ttt-e2e", "train", "tiny", "--data", str(prepared.folder), "--out", run]
    if prepared.vocab_size != tiny.model.vocab_size:
        words.append(f"vocab_size={prepared.vocab_size}")
    if prepared.tokens["train"] <= tiny.train.context:
        words.append(f"context={1 << ((prepared.tokens['train'] - 1).bit_length() - 1)}")
    if not prepared.tokens["val"]:
        words.append("eval_every=0")
    return shlex.join(words)
