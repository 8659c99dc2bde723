"""`ttt-e2e reproduce latency`: time per token of every system by context, as numbers, a table and a picture."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ttt_e2e.config.parse import to_dict
from ttt_e2e.errors import UserError
from ttt_e2e.files import atomic_path, write_text
from ttt_e2e.hardware import machine
from ttt_e2e.model.cost import in_tokens
from ttt_e2e.reproduce.scales import scale as scale_called
from ttt_e2e.reproduce.systems import SYSTEMS, System, default_rows, pretraining
from ttt_e2e.reproduce.timing import SEED, LatencyRow, measure
from ttt_e2e.training.parallelize import choose_device

LONG = {"paper": (2**21,)}  # contexts beyond the scale's own, for systems whose state does not grow


def run_latency(
    scale: str,
    out: Path,
    *,
    systems: Sequence[str] | None = None,
    contexts: Sequence[int] | None = None,
    device: str = "auto",
    threads: int | None = None,
    seconds: float | None = None,
    progress: bool = True,
) -> list[LatencyRow]:
    """Time the systems of figure 1 at `scale`; writes latency.json, latency.md and latency.png into the folder `out`.

    systems, contexts, seconds: None for the scale's own; at the paper's scale systems whose state does not grow are
    also timed at two million tokens. Dynamic evaluation is given the training time of the sliding window, whose weights
    it takes. On a GPU matrix products are in bfloat16, on a CPU in float32. The files are
    written anew after every context. Raises UserError for unknown names and as `measure` does.
    """
    figures = scale_called(scale)
    known = {system.name: system for system in SYSTEMS}
    names = default_rows("figure1", figures) if systems is None else tuple(systems)
    for name in names:
        if name not in known:
            raise UserError(f"There is no system {name!r}; there are: {', '.join(known)}.")
    configs = {name: pretraining(figures, known[name], 0).model for name in names}
    kind = choose_device(device).type
    long = LONG.get(scale, ()) if contexts is None else ()
    facts: dict[str, Any] = {
        "scale": scale,
        "seed": SEED,
        "batch": 1,
        "dtype": "bfloat16" if kind == "cuda" else "float32",
        "seconds": figures.latency_seconds if seconds is None else seconds,
        "machine": machine(choose_device(device)),
        "configs": {name: to_dict(config) for name, config in configs.items()},
    }
    rows: list[LatencyRow] = []
    for context in (*(figures.latency_contexts if contexts is None else contexts), *long):
        chosen = {n: c for n, c in configs.items() if context not in long or "full" not in c.mixers}
        rows += measure(
            chosen,
            [context],
            seconds=facts["seconds"],
            threads=threads,
            device=device,
            dtype=facts["dtype"],
            train=context not in long,
            progress=progress,
        )
        rows = [_as_trained(row, rows, known) for row in rows]
        facts["machine"] |= {"threads": threads or torch.get_num_threads()}
        write_text(Path(out) / "latency.json", json.dumps({**facts, "rows": [r._asdict() for r in rows]}, indent=1))
        write_text(Path(out) / "latency.md", latency_table(rows, facts))
        latency_picture(rows, Path(out) / "latency.png")
    return rows


def _as_trained(row: LatencyRow, rows: list[LatencyRow], known: dict[str, System]) -> LatencyRow:
    """The row with the training time of the system whose weights it takes, if it is such a one."""
    other = known[row.system].trained_as
    if other is None:
        return row
    times = [r.train_us for r in rows if r.system == other and r.context == row.context]
    return row._replace(train_us=times[0] if times else None)


_PANELS = {"prefill": "prefill_us", "decode": "decode_us", "train": "train_us"}
_TITLES = {"prefill": "taking in a text", "decode": "writing one token after it", "train": "training on it"}


def latency_table(rows: Iterable[LatencyRow], facts: dict[str, Any]) -> str:
    """Markdown: microseconds per token, a table for each kind of work, a line for each system."""
    rows = list(rows)
    contexts = sorted({row.context for row in rows})
    systems = list(dict.fromkeys(row.system for row in rows))
    at = {(row.system, row.context): row for row in rows}
    host = ", ".join(f"{key} {value}" for key, value in facts["machine"].items())
    lines = [
        f"# Time per token at scale {facts['scale']}",
        "",
        f"One sequence, {facts['dtype']}, random weights and tokens. {host}.",
        "",
        "Figures are medians, in microseconds per token. ~ is interpolated from stretches of the text; - does not fit.",
    ]
    for what, field in _PANELS.items():
        if all(getattr(row, field) is None for row in rows):
            continue
        lines += ["", f"## {_TITLES[what].capitalize()}", "", f"| system | {' | '.join(map(in_tokens, contexts))} |"]
        lines.append("|---|" + "---:|" * len(contexts))
        for system in systems:
            cells = []
            for context in contexts:
                row = at.get((system, context))
                value = None if row is None else getattr(row, field)
                mark = "~" if row is not None and what == "prefill" and not row.whole else ""
                cells.append("-" if value is None else f"{mark}{value:,.1f}")
            lines.append(f"| {_label(system)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def latency_picture(rows: Iterable[LatencyRow], path: Path) -> None:
    """Draw time per token by context, a line for each system and a panel for each kind of work."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    rows = list(rows)
    shown = [what for what, field in _PANELS.items() if any(getattr(row, field) is not None for row in rows)]
    figure = Figure(figsize=(4.6 * max(1, len(shown)), 4.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, max(1, len(shown)), squeeze=False)[0]
    contexts = sorted({row.context for row in rows})
    colours = {system.name: system.colour for system in SYSTEMS}
    for axes, what in zip(panels, shown, strict=False):
        for system in dict.fromkeys(row.system for row in rows):
            points = [(r.context, getattr(r, _PANELS[what])) for r in rows if r.system == system]
            points = [(context, value) for context, value in points if value is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", ms=3, color=colours.get(system), label=_label(system))
        axes.set(xscale="log", yscale="log", xlabel="context (tokens)", title=_TITLES[what])
        axes.set_xticks(contexts, [in_tokens(context) for context in contexts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(color="#e4e7ec", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("microseconds per token")
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    with atomic_path(path) as part:
        figure.savefig(part, format="png")


def _label(system: str) -> str:
    return next((known.label for known in SYSTEMS if known.name == system), system)
