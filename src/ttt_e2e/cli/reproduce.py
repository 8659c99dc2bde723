"""`ttt-e2e reproduce`: the paper's comparisons, latency, and needles in a haystack."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ttt_e2e.cli.common import add_options
from ttt_e2e.convert.named import find_model
from ttt_e2e.errors import INTERRUPTED, UserError
from ttt_e2e.units import count, natural, number, tokens, whole

HELP = "repeat the paper's comparison with other systems"
DESCRIPTION = """Repeat the paper's comparison of systems. All have as many parameters and read the same tokens in
the same order; a sweep chooses each one's learning rate; held-out books are read at every context."""
EPILOG = """examples:
  ttt-e2e reproduce figure1 --scale tiny --out figure1 --dry-run    print the plan
  ttt-e2e reproduce figure1 --scale tiny --out figure1              the same after Ctrl-C: it continues
  ttt-e2e reproduce ACTION --help"""

_JOBS = """
All are compared with the n-gram floor too: trigrams of the same tokens with a cache of the text.
Tables, pictures and all numbers are in OUT, and are updated after every evaluation. A job that is
done is never done again; an interrupted one continues."""
_SCALES = """
scales:
  tiny   any computer; hours on a few CPU cores
  small  one GPU with 80 GB of memory; --data: a billion tokens of long texts or more
  paper  the published 3B models: eight GPUs or more with 80 GB each, on which every training runs
         by torchrun, for months; --data: 54.5 billion tokens of the Llama 3 vocabulary, --books:
         long texts in the same tokens

"""

_FIGURE1 = """Train every system for a short while at several outer learning rates, then from the start at the
best of them, and from there further for each context. Read held-out books with the models."""
_FIGURE1_EPILOG = f"""systems:
  full (the baseline, always compared), window, hybrid, mamba2, gated-deltanet, ttt-kvb, titans,
  dynamic, ttt-e2e, full-prefix (only if you name it)
{_SCALES}examples:
  ttt-e2e reproduce figure1 --scale tiny --data tokens --out figure1 --systems window,ttt-e2e
  ttt-e2e reproduce figure1 --scale tiny --data tokens --out figure1 --seeds 0,1,2"""

_ABLATIONS = """Find TTT-E2E's outer learning rate in short trainings. Train TTT-E2E, and its variations at the
same rate, from the start, and from there further for each context. Read held-out books with the
models."""
_ABLATIONS_EPILOG = f"""systems (--dry-run prints their names):
  ttt-e2e (the baseline), and as many parameters with another window k, another mini-batch b,
  another number of updated blocks, no static MLP beside the fast one, or no meta-learning
{_SCALES}example:
  ttt-e2e reproduce ablations --scale tiny --out ablations --contexts 256,2K --dry-run"""

_WARMSTART = """Train full attention, a sliding window and TTT-E2E in a first stage. In a second stage of a tenth of
its length continue each, and train the full-attention model with a window, and as TTT-E2E with new
or split fast MLPs. From there train further for each context. A sweep chooses the outer learning
rate of both stages. Read held-out books with the models."""
_WARMSTART_EPILOG = f"""systems:
  window-on (the baseline), full-on, ttt-on: continued as they are
  switch: full-on with a window that it was not trained with; switch-on: trained with it
  warm-new, warm-split: from full attention to TTT-E2E; -3: with an inner learning rate of 3
{_SCALES}example:
  ttt-e2e reproduce warmstart --scale tiny --out warmstart --contexts 512,2K --dry-run"""

_PRETRAINED = """Start every system from one pretrained model, and train its last blocks, those that learn; the
outputs of the blocks below are computed once. Each outer learning rate is the best of three. Read
held-out texts by position, those of each folder that they were prepared from apart."""
_PRETRAINED_EPILOG = """systems:
  full, window (the baseline, always compared), hybrid, gated-deltanet, ttt-kvb (beside the window),
  dynamic, ttt-e2e

runs/pretrained.sh downloads the texts and runs the whole comparison for SmolLM2-135M. The model
smollm2 is no start for it: it has been trained already.

example:
  ttt-e2e convert from-gguf Qwen3-0.6B-Q8_0.gguf start --window 512
  ttt-e2e prepare train/ --val val/ --tokenizer start/tokenizer.json --out tokens
  ttt-e2e reproduce pretrained --from start --data tokens --out pretrained --systems full,ttt-e2e --tokens 500K"""

_LATENCY = "Time reading, writing and training by context, with random weights. The systems take turns."
_LATENCY_EPILOG = """example:
  ttt-e2e reproduce latency --scale tiny --out latency --contexts 1K,8K,64K"""

_NEEDLES = (
    "Ask models for what one sentence of a long text said (RULER's single-needle tasks 1 to 3, arXiv 2404.06654)."
)
_NEEDLES_EPILOG = """examples:
  ttt-e2e reproduce needles --comparison figure1 --out needles
  ttt-e2e reproduce needles --models mine=run/model --out needles --tasks 1 --contexts 1K,4K"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `reproduce`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, help, description, epilog in (
        ("figure1", "loss and time per token by context, of every system", _FIGURE1 + _JOBS, _FIGURE1_EPILOG),
        ("ablations", "TTT-E2E with one choice changed", _ABLATIONS + _JOBS, _ABLATIONS_EPILOG),
        ("warmstart", "TTT-E2E that starts from full attention", _WARMSTART + _JOBS, _WARMSTART_EPILOG),
        ("pretrained", "TTT-E2E that starts from a pretrained model", _PRETRAINED + _JOBS, _PRETRAINED_EPILOG),
        ("latency", "time per token by context, of every system", _LATENCY, _LATENCY_EPILOG),
        ("needles", "find one sentence in a long text", _NEEDLES, _NEEDLES_EPILOG),
    ):
        sub = actions.add_parser(name, help=help, description=description, epilog=epilog)
        own = {"latency": _add_latency_options, "needles": _add_needle_options, "pretrained": _add_pretrained_options}
        add_own = own.get(name, _add_comparison_options)
        add_own(sub.add_argument)
        add_options(sub, "device", *(["threads"] if name == "latency" else []), "quiet")


def run(arguments: argparse.Namespace) -> int:
    """Run `ttt-e2e reproduce`; returns the exit code."""

    def options(*names: str) -> dict[str, Any]:
        return {name: getattr(arguments, name) for name in (*names, "contexts", "device")}

    progress = not arguments.quiet
    if arguments.action == "latency":
        from ttt_e2e.reproduce.latency import run_latency

        run_latency(arguments.scale, arguments.out, progress=progress, **options("systems", "threads", "seconds"))
        return 0
    if arguments.action == "needles":
        from ttt_e2e.reproduce.needles import run_needles

        models = dict(arguments.models)
        if arguments.comparison is not None:
            models |= _models_of(arguments.comparison)
        if not models:
            raise UserError("There is no model to ask; name some with --models or --comparison.")
        chosen = options("tasks", "depths", "samples", "seed", "haystack")
        run_needles(arguments.out, models=models, progress=progress, **chosen)
        return 0
    from ttt_e2e.reproduce.run import reproduce
    from ttt_e2e.reproduce.scales import find_scale, pretrained_scale

    if arguments.action == "pretrained":
        start_from = find_model(arguments.start_from, progress)
        assert start_from is not None, "--from is required"
        scale = pretrained_scale(start_from, arguments.tokens)
    else:
        scale = find_scale(arguments.scale)
    outcome = reproduce(
        arguments.action,
        scale,
        arguments.out,
        num_workers=arguments.workers,
        progress=progress,
        **options("data", "books", "systems", "seeds", "compile", "dry_run"),
    )
    return INTERRUPTED if outcome.interrupted else 0


def _models_of(comparison: Path) -> dict[str, Path]:
    """The models of a figure 1 for its longest context, of the first seed."""
    from ttt_e2e.reproduce.plan import read_plan

    plan = read_plan(comparison)
    named = plan["comparisons"].get("figure1", {"systems": [], "seeds": [0], "contexts": [0]})
    longest = max(named["contexts"])
    # Contexts up to that of the pre-training have no stage of their own.
    stage = f"extend-{longest}" if longest > plan["scale"]["pretrain_context"] else "pretrain"
    runs = {name: comparison / "runs" / name / f"seed{named['seeds'][0]}" / stage / "run" for name in named["systems"]}
    found = {name: folder / "model" for name, folder in runs.items() if (folder / "model").is_dir()}
    if not found:
        missing = f"{comparison} has no model for its longest context yet"
        raise UserError(f"{missing}; finish `ttt-e2e reproduce figure1` there first.")
    return found


def _add_pretrained_options(add: Callable[..., argparse.Action]) -> None:
    model = "the model that all start from, such as `ttt-e2e convert from-gguf` makes of a pretrained one"
    add("--from", dest="start_from", type=Path, required=True, metavar="MODEL", help=model)
    add("--data", type=Path, required=True, metavar="DIR", help="tokens from `ttt-e2e prepare --tokenizer MODEL`")
    add("--tokens", type=tokens, metavar="N", help="that each system is trained on, such as 5M (default: 2M)")
    _add_job_options(add)


def _add_comparison_options(add: Callable[..., argparse.Action]) -> None:
    add("--scale", default="tiny", metavar="NAME", help="tiny, small or paper (default: tiny)")
    data = "tokens from `ttt-e2e prepare` (default: Python's library, prepared in OUT/tokens)"
    add("--data", type=Path, metavar="DIR", help=data)
    _add_job_options(add)


def _add_job_options(add: Callable[..., argparse.Action]) -> None:
    books = "tokens to train on for longer contexts and to evaluate on (default: --data)"
    add("--books", type=Path, metavar="DIR", help=books)
    add("--out", type=Path, required=True, metavar="OUT", help="the folder of the comparison")
    add("--systems", type=_names, metavar="A,B", help="only these and the baseline (default: all)")
    add("--seeds", type=_list(natural), metavar="N,M", help="train once with each (default: 0)")
    add("--contexts", type=_list(tokens), metavar="N,M", help="only these, such as 512,2K (default: all)")
    add(
        "--workers",
        type=whole(0, 1024),
        metavar="N",
        help="jobs at a time (default: one per CPU core, or one on a GPU)",
    )
    compiled = "train compiled: faster, after a minute or two for every system and stage"
    add("--compile", action="store_true", help=compiled)
    add("--dry-run", action="store_true", help="print the plan, and train nothing")


def _add_latency_options(add: Callable[..., argparse.Action]) -> None:
    add("--scale", default="tiny", metavar="NAME", help="tiny, small or paper (default: tiny)")
    add("--out", type=Path, required=True, metavar="OUT", help="the folder to write")
    add("--systems", type=_names, metavar="A,B", help="only these (default: all but full-prefix)")
    add("--contexts", type=_list(tokens), metavar="N,M", help="such as 512,2K (default: the scale's)")
    add("--seconds", type=number(0, 1e6, above=True), metavar="S", help="time for each figure (default: the scale's)")


def _add_needle_options(add: Callable[..., argparse.Action]) -> None:
    add("--models", nargs="+", default=[], type=_model, metavar="NAME=DIR", help="model folders")
    add("--comparison", type=Path, metavar="OUT", help="the models of a figure1 for its longest context")
    add("--out", type=Path, required=True, metavar="OUT", help="the folder to write")
    add("--tasks", type=_list(count), default="1,2,3", metavar="N,M", help="of RULER (default: 1,2,3)")
    add("--contexts", type=_list(tokens), default="1K,2K,4K", metavar="N,M", help="in tokens (default: 1K,2K,4K)")
    depths = "where the sentence is, in percent of the text (default: 0,25,50,75,100)"
    add("--depths", type=_list(whole(0, 100)), default="0,25,50,75,100", metavar="N,M", help=depths)
    add("--samples", type=count, default=5, metavar="N", help="questions of each kind (default: 5)")
    add("--seed", type=natural, default=0, metavar="N", help="seed of the questions (default: 0)")
    add("--haystack", type=Path, metavar="FILE", help="the text of tasks 2 and 3 (default: Python's library)")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _list(kind: Callable[[str], int]) -> Callable[[str], list[int]]:
    return lambda text: [kind(number) for number in _names(text)]


def _model(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} does not name a model; write NAME=DIR")
    return name, Path(folder)
