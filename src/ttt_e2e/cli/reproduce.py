"""What `ttt-e2e reproduce` looks like on the command line. PyTorch is imported only when there is work to do."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ttt_e2e.errors import INTERRUPTED, UserError
from ttt_e2e.units import tokens

DESCRIPTION = """Repeat the paper's comparison of systems: for each the same tokens in the same order, as many
parameters and the same schedule, its learning rate chosen by a sweep; held-out books read at every context."""
EPILOG = """examples:
  ttt-e2e reproduce figure1 --scale tiny --out figure1 --dry-run     what it takes on this machine
  ttt-e2e reproduce figure1 --scale tiny --out figure1               Ctrl-C loses nothing: the same command goes on
  ttt-e2e reproduce ACTION --help"""

_COMPARISON = """Train every system for a short while at several learning rates, then from the start at the best of
them, and on from there for each context; read held-out books with what comes out."""
_WRITTEN = """Tables, pictures and all numbers are in OUT, renewed after each evaluation. Everything
that is done stays done, whatever interrupts it.

scales:
  tiny   any computer; hours on a few CPU cores
  small  one GPU with 80 GB of memory, and a billion tokens of long texts or more (--data)
  paper  the published 3B models: eight GPUs or more with 80 GB each, on which every training runs by torchrun, for
         months; --data must be 54.5 billion tokens of the Llama 3 vocabulary, --books long texts in the same tokens"""
_ABLATIONS = """Find TTT-E2E's learning rate by short trainings at several; train it and its variations with that
rate from the start, and on from there for each context. Read held-out books with what comes out."""
_WARM_START = """Train full attention, a sliding window and TTT-E2E, and go on for a tenth as long: each as it is, full
attention also with a window, and as TTT-E2E with fast MLPs that are new or split off; then for each context. Learning
rates are chosen by a sweep in both stages. Read held-out books with what comes out."""
_SYSTEMS = "full, window, hybrid, mamba2, gated-deltanet, ttt-kvb, titans, dynamic, ttt-e2e, full-prefix"


def add_actions(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Give `parser` the actions of `reproduce`; returns their parsers by name."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, short: str, description: str, epilog: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=short, description=description, epilog=epilog)

    sub = action(
        "figure1",
        "loss and time per token by context, of every system",
        f"{_COMPARISON} {_WRITTEN}",
        f"systems: {_SYSTEMS}\n(full-prefix only where it is named; full always, the others are compared with it)\n\n"
        """examples:
  ttt-e2e reproduce figure1 --scale tiny --data tokens --out figure1 --systems window,ttt-e2e --contexts 256,1K
  ttt-e2e reproduce figure1 --scale tiny --data tokens --out figure1 --seeds 0,1,2""",
    )
    _comparison_options(sub)
    sub = action(
        "ablations",
        "TTT-E2E with one choice made otherwise",
        f"{_ABLATIONS} {_WRITTEN}",
        """The rows: window k, mini-batch b, how many blocks are updated, no static MLP beside the fast one, no
meta-learning. They have as many parameters as TTT-E2E, which they are compared with. A plan of them:
  ttt-e2e reproduce ablations --scale tiny --out ablations --contexts 256,2K --dry-run""",
    )
    _comparison_options(sub)
    sub = action(
        "warmstart",
        "TTT-E2E that starts from a Transformer with full attention",
        f"{_WARM_START} {_WRITTEN}",
        """The rows: window-on, full-on, switch, switch-on, ttt-on, warm-new, warm-split; warm-new-3 and
warm-split-3 with an inner rate of 3. All have read the same number of tokens; `switch` is full-on with a window that it
was not trained with. A plan of them:
  ttt-e2e reproduce warmstart --scale tiny --out warmstart --contexts 512,2K --dry-run""",
    )
    _comparison_options(sub)

    sub = action(
        "latency",
        "time per token of every system, with random weights",
        "Time reading, writing and training by context, all systems in turns; nothing is trained.",
        """example:
  ttt-e2e reproduce latency --scale tiny --out latency --contexts 1K,8K,64K""",
    )
    sub.add_argument("--scale", default="tiny", metavar="NAME", help="tiny, small or paper (default: tiny)")
    sub.add_argument("--out", type=Path, required=True, metavar="OUT", help="the folder to write")
    sub.add_argument("--systems", type=_words, metavar="A,B", help="only these (default: all but full-prefix)")
    sub.add_argument("--contexts", type=_list(tokens), metavar="N,M", help="such as 512,2K (default: the scale's)")
    sub.add_argument("--seconds", type=float, metavar="S", help="time for each figure (default: the scale's)")
    sub.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as many as cores)")
    _common_options(sub)

    sub = action(
        "needles",
        "find one sentence in a long text, by depth and context",
        "Ask models for what one sentence of a long text said (RULER's single-needle tasks 1 to 3, arXiv 2404.06654).",
        """examples:
  ttt-e2e reproduce needles --comparison figure1 --out needles
  ttt-e2e reproduce needles --models mine=run/model --out needles --tasks 1 --contexts 1K,4K""",
    )
    sub.add_argument("--models", nargs="+", default=[], type=_named, metavar="NAME=DIR", help="model folders")
    sub.add_argument("--comparison", type=Path, metavar="OUT", help="all models of a figure1, for its longest context")
    sub.add_argument("--out", type=Path, required=True, metavar="OUT", help="the folder to write")
    sub.add_argument("--tasks", type=_list(int), default=[1, 2, 3], metavar="N,M", help="default: 1,2,3")
    sub.add_argument(
        "--contexts", type=_list(tokens), default=[1024, 2048, 4096], metavar="N,M", help="default: 1K,2K,4K"
    )
    sub.add_argument("--depths", type=_list(int), default=[0, 25, 50, 75, 100], metavar="N,M", help="in percent")
    sub.add_argument("--samples", type=int, default=5, metavar="N", help="examples of each kind (default: 5)")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the examples (default: 0)")
    sub.add_argument(
        "--haystack", type=Path, metavar="FILE", help="the text of tasks 2 and 3 (default: Python's library)"
    )
    _common_options(sub)
    return dict(actions.choices)


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code."""
    if arguments.action in ("figure1", "ablations", "warmstart"):
        from ttt_e2e.reproduce.run import reproduce
        from ttt_e2e.reproduce.scales import scale

        outcome = reproduce(
            arguments.action,
            scale(arguments.scale),
            arguments.out,
            data=arguments.data,
            books=arguments.books,
            systems=arguments.systems,
            seeds=arguments.seeds,
            contexts=arguments.contexts,
            worker_count=arguments.workers,
            compile=arguments.compile,
            device=arguments.device,
            dry_run=arguments.dry_run,
            progress=not arguments.quiet,
        )
        return INTERRUPTED if outcome.interrupted else 0
    common = {"contexts": arguments.contexts, "device": arguments.device, "progress": not arguments.quiet}
    if arguments.action == "latency":
        from ttt_e2e.reproduce.latency import run_latency

        run_latency(
            arguments.scale,
            arguments.out,
            systems=arguments.systems,
            threads=arguments.threads,
            seconds=arguments.seconds,
            **common,
        )
        return 0
    from ttt_e2e.reproduce.needles import run_needles

    models = dict(arguments.models) | ({} if arguments.comparison is None else _models_of(arguments.comparison))
    if not models:
        raise UserError("There is no model to ask; name some with --models or --comparison.")
    run_needles(
        arguments.out,
        models=models,
        tasks=arguments.tasks,
        depths=arguments.depths,
        samples=arguments.samples,
        seed=arguments.seed,
        haystack=arguments.haystack,
        **common,
    )
    return 0


def _models_of(comparison: Path) -> dict[str, Path]:
    """The models of a comparison's first seed, for its longest context."""
    from ttt_e2e.model.checkpoint import read_json

    plan = read_json(comparison / "plan.json")
    named = plan["comparisons"].get("figure1", {})
    folders = {name: comparison / "runs" / name / f"seed{named['seeds'][0]}" for name in named.get("systems", [])}
    # Contexts up to that of the pretraining have no stage of their own.
    longest = max(named.get("contexts", [0]))
    stage = f"extend-{longest}" if longest > plan["scale"]["pretrain_context"] else "pretrain"
    found = {name: folder / stage / "run" / "model" for name, folder in folders.items()}
    found = {name: folder for name, folder in found.items() if folder.is_dir()}
    if not found:
        raise UserError(
            f"{comparison} has no model for its longest context yet; finish `ttt-e2e reproduce` there first."
        )
    return found


def _comparison_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", default="tiny", metavar="NAME", help="tiny, small or paper (default: tiny)")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="what `prepare` has written (default: Python's library, in OUT/tokens)"
    )
    parser.add_argument(
        "--books",
        type=Path,
        metavar="DIR",
        help="tokens to train on for longer contexts and evaluate on (default: --data)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="the folder of the comparison")
    parser.add_argument("--systems", type=_words, metavar="A,B", help="only these rows (default: all)")
    parser.add_argument("--seeds", type=_list(int), metavar="N,M", help="train once with each (default: 0)")
    parser.add_argument(
        "--contexts", type=_list(tokens), metavar="N,M", help="only these, such as 512,2K (default: all)"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="jobs at a time (default: one a CPU core, one on a GPU)"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="train compiled: faster after a minute or two for each system and stage (the estimate is without)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done and what it takes; train nothing"
    )
    _common_options(parser)


def _common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: a GPU if there is one)"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _list(kind: Callable[[str], int]) -> Callable[[str], list[int]]:
    def numbers(text: str) -> list[int]:
        try:
            return [kind(word) for word in _words(text)]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers; write one such as 0,1,2") from error

    return numbers


def _named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} names no model; write NAME=DIR")
    return name, Path(folder)
