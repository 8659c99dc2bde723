"""What several commands share: options and what they name, JSON on standard output, notes on standard error."""

import argparse
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ttt_e2e.convert.learning import LearningOptions
from ttt_e2e.convert.named import find_model
from ttt_e2e.errors import UserError
from ttt_e2e.units import amount, part, whole

if TYPE_CHECKING:
    from ttt_e2e.data.tokenizer import Tokenizer
    from ttt_e2e.inference.session import Session
    from ttt_e2e.model.transformer import Transformer


# Options that several commands have, as the arguments of `add_argument`.
_OPTIONS: dict[str, dict[str, Any]] = {
    "model": dict(type=Path, metavar="DIR", help="a model folder, or smollm2 (default: the shipped model)"),
    "dtype": dict(choices=("float32", "bfloat16"), help="of the matrix products (default: float32, or the session's)"),
    "device": dict(default="auto", metavar="NAME", help="auto, cpu or cuda (default: a GPU if there is one)"),
    "threads": dict(type=whole(1, 1024), metavar="N", help="CPU threads (default: one per core)"),
    "compile": dict(
        action="store_true",
        help="compile with PyTorch's compiler: a minute or two at the start, faster after it, worth it from about a "
        "million tokens; needs a C++ compiler on a CPU, uses CUDA graphs on a GPU",
    ),
    "precision": dict(
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the saved fast weights; float32 is exact, the others take half the space (default: float32)",
    ),
    "embeddings": dict(
        type=Path, metavar="DIR", help="also search by meaning, with this model2vec embedding (extra `embeddings`)"
    ),
    "text-column": dict(default="text", metavar="NAME", help="the column that holds the text (default: text)"),
    "json": dict(action="store_true", help="print JSON"),
    "quiet": dict(action="store_true", help="show no progress bar"),
    "sink": dict(
        choices=("calibrate", "none"),
        default="calibrate",
        help="what takes the place of a text's first token when it has left the window: a sink for every layer, "
        "measured on a text (default), or nothing",
    ),
    "calibration-text": dict(
        type=Path, metavar="FILE", help="the text for --sink, longer than the window (default: one that comes along)"
    ),
    # How a converted model is to learn; see `learning_options`.
    "window": dict(
        type=whole(1, 2**30), metavar="K", help="tokens that attention sees (default: 8192, or all the original sees)"
    ),
    "suffix": dict(
        type=part,
        default=0.25,
        metavar="SHARE",
        help="share of the blocks that learn (default: 0.25)",
    ),
    "mini-batch": dict(
        type=whole(1, 2**30), metavar="B", help="tokens per update (default: 32, or the window if that is shorter)"
    ),
    "inner-lr": dict(type=amount, default=0.05, metavar="LR", help="learning rate of the updates (default: 0.05)"),
    "fast": dict(
        choices=("new", "split"),
        default="split",
        help="the fast MLP: a new one that adds nothing yet, or a part of the pretrained MLP (default: split)",
    ),
    "fast-share": dict(
        type=part,
        default=0.25,
        metavar="SHARE",
        help="width of the fast MLP, as a share of the pretrained MLP's (default: 0.25)",
    ),
    "fast-rank": dict(
        type=whole(1, 2**24),
        metavar="R",
        help="learn only a rank-R addition to the fast MLP, for smaller sessions (default: all of it)",
    ),
    "learned-lr": dict(
        action="store_true", help="let training learn the inner learning rate of every fast matrix (default: one rate)"
    ),
}
LEARNING = ("window", "suffix", "mini-batch", "inner-lr", "fast", "fast-share", "fast-rank", "learned-lr")


def add_options(parser: argparse._ActionsContainer, *names: str) -> None:
    """Add options that several commands have."""
    for name in names:
        parser.add_argument(f"--{name}", **_OPTIONS[name])


def learning_options(arguments: argparse.Namespace) -> LearningOptions:
    """The values of the options `LEARNING`."""
    return LearningOptions(
        sliding_window=arguments.window,
        suffix=arguments.suffix,
        mini_batch_size=arguments.mini_batch,
        inner_lr=arguments.inner_lr,
        fast=arguments.fast,
        fast_share=arguments.fast_share,
        fast_rank=arguments.fast_rank,
        sink=getattr(arguments, "sink", "calibrate"),
        learned_lr=arguments.learned_lr,
    )


def open_model(arguments: argparse.Namespace, dtype: str | None = None) -> "tuple[Transformer, Tokenizer]":
    """The model that --model names, on --device, and its tokenizer; for products in `dtype`, by default --dtype."""
    import torch

    from ttt_e2e.hardware import choose_device
    from ttt_e2e.inference.load import load_model
    from ttt_e2e.inference.session_file import DTYPES

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    folder = find_model(arguments.model, progress=not getattr(arguments, "quiet", False))
    return load_model(folder, choose_device(arguments.device), DTYPES[dtype or arguments.dtype or "float32"])


def open_session(arguments: argparse.Namespace, *, learn: bool = True, compile: bool = False) -> "Session":
    """The session that --session names, or a new one; its model is that of `open_model`.

    Raises UserError if --dtype differs from the dtype of the saved session.
    """
    from ttt_e2e.inference.session import Session
    from ttt_e2e.inference.session_file import DTYPES, session_facts

    if arguments.session is None:
        model, tokenizer = open_model(arguments)
        dtype = DTYPES[arguments.dtype or "float32"]
        return Session(model, tokenizer, learn=learn, dtype=dtype, compile=compile)
    saved = session_facts(arguments.session)["dtype"]
    if arguments.dtype not in (None, saved):
        raise UserError(f"The session {arguments.session} computes in {saved}; leave --dtype out.")
    model, tokenizer = open_model(arguments, saved)
    return Session.load(arguments.session, model, tokenizer, compile=compile)


def text(value: str) -> str:
    """The type of a text. Of bytes that the locale's encoding does not have, Python makes halves of surrogate pairs."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding()
        raise argparse.ArgumentTypeError(
            f"{value[:60]!a} is not valid {encoding}, the encoding of this locale"
        ) from error
    return value


def print_json(value: Any) -> None:
    """Print plain values as JSON on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def lock_saved(arguments: argparse.Namespace) -> AbstractContextManager[IO[str] | None]:
    """Keep other processes from writing the session `arguments.save` in the block, if one is named; yields the lock.

    Raises UserError if something else has its name, or if the lock is held.
    """
    from ttt_e2e.inference.session_file import check_session_target, lock_session

    if arguments.save is None:
        return nullcontext()
    check_session_target(arguments.save)
    return lock_session(arguments.save)


def check_output() -> None:
    """Flush standard output. Raises OSError if something could not be printed; see `process`."""
    sys.stdout.flush()
    if error := getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "error", None):
        raise error


def note(sentence: str) -> None:
    """Print a sentence for people on standard error."""
    print(sentence, file=sys.stderr)
