"""The pictures of `ttt-e2e reproduce`, drawn without a display."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from ttt_e2e.files import atomic_path
from ttt_e2e.model.cost import in_tokens
from ttt_e2e.reproduce.tables import TIMES

_GREY = "#667085"


def plot_comparison(report: dict[str, Any], path: Path) -> None:
    """Each system's loss minus the baseline's by context; in figure 1 also, right, the time to read a token."""
    has_latency = report["name"] == "figure1"
    figure, axes = _figure(1 + has_latency)
    systems = report["systems"]
    for name in systems:
        rows = [r for r in report["comparison"] if r["system"] == name and r["difference"] is not None]
        if rows:
            contexts, y, errors = _points([row["context"] for row in rows], [row["difference"] for row in rows])
            axes[0].errorbar(contexts, y, errors, **_style(systems, name), capsize=2, elinewidth=0.8)
    axes[0].set_ylabel(f"loss minus that of {systems[report['baseline']]['label']} (nats per token)")
    _token_axis(axes[0], [row["context"] for row in report["comparison"]], "context (tokens)")
    if has_latency:
        axes[1].set_ylabel("time to read a token (microseconds)")
        if report["latency"]:
            _draw_times(axes[1], report["latency"], "prefill_us", systems)
        else:
            axes[1].text(0.5, 0.5, "not measured yet", ha="center", transform=axes[1].transAxes, color=_GREY)
    axes[0].set_title(f"{report['name']}, scale {report['plan']['scale']['name']}", loc="left", fontsize=11)
    _save(figure, path)


def plot_by_position(report: dict[str, Any], positions: dict[str, Any], path: Path, what: str = "Loss") -> None:
    """The loss by position in the sequence; right: minus the baseline's, with its error. `what`: begins the title."""
    figure, axes = _figure(2)
    systems, edges = report["systems"], positions["position_edges"]
    middles = [(max(start, 1) * stop) ** 0.5 for start, stop in pairwise(edges)]
    for row in positions["rows"]:
        for axis, key in zip(axes, ("loss", "difference"), strict=True):
            x, y, errors = _points(middles, [b[key] for b in row["bins"]])
            axis.plot(x, y, **_style(systems, row["system"]))
            if key == "difference":
                colour = systems[row["system"]]["colour"]
                axis.fill_between(x, y - errors, y + errors, color=colour, alpha=0.12, lw=0)
    axes[0].set_ylabel("loss (nats per token)")
    axes[1].set_ylabel(f"minus that of {systems[report['baseline']]['label']}")
    for axis in axes:
        _token_axis(axis, [edge for edge in edges[1:] if edge & (edge - 1) == 0], "position in the sequence (token)")
    context = in_tokens(positions["context"])
    axes[0].set_title(f"{what} by position in a context of {context}", loc="left", fontsize=11)
    _save(figure, path)


def plot_times(rows: Sequence[Mapping[str, Any]], systems: Mapping[str, Mapping[str, str]], path: Path) -> None:
    """Time per token by context, a panel for each kind of work; `systems` have "label" and "colour"."""
    panels = [key for key in TIMES if key == "prefill_us" or any(row[key] is not None for row in rows)]
    figure, axes = _figure(len(panels))
    for axis, key in zip(axes, panels, strict=True):
        _draw_times(axis, rows, key, systems)
        axis.set_title(TIMES[key], loc="left", fontsize=11)
    axes[0].set_ylabel("microseconds per token")
    _save(figure, path)


def plot_needles(cells: Mapping[tuple[str, int, int, float], tuple[float, str]], path: Path) -> None:
    """Heat maps by context and depth, a column for each model and a row for each task.

    cells: by model, task, context and depth, the percentage found and the text of the cell.
    """
    models = list(dict.fromkeys(key[0] for key in cells))
    tasks, contexts = sorted({key[1] for key in cells}), sorted({key[2] for key in cells})
    depths = sorted({key[3] for key in cells})
    size = (2.0 + (1.0 + 0.75 * len(contexts)) * len(models), 0.8 + (0.9 + 0.42 * len(depths)) * len(tasks))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(len(tasks), len(models), squeeze=False)
    for row, task in enumerate(tasks):
        for column, model in enumerate(models):
            axes = panels[row, column]
            grid = np.full((len(depths), len(contexts)), np.nan)
            for i, j in np.ndindex(grid.shape):
                grid[i, j], text = cells.get((model, task, contexts[j], depths[i]), (np.nan, ""))
                axes.text(j, i, text, ha="center", va="center", fontsize=6, color="w" if grid[i, j] > 60 else "k")
            image = axes.imshow(grid, cmap="Blues", vmin=0, vmax=100, aspect="auto")
            axes.set_xticks(range(len(contexts)), [in_tokens(context) for context in contexts], fontsize=7)
            axes.set_yticks(range(len(depths)), [f"{depth:g} %" for depth in depths], fontsize=7)
            if row == 0:
                axes.set_title(model, fontsize=10, parse_math=False)
            if column == 0:
                axes.set_ylabel(f"task {task}\ndepth", fontsize=8)
    bar = figure.colorbar(image, ax=panels, shrink=0.8)
    bar.set_label("found (percent); below it the loss of the value", fontsize=8)
    figure.supxlabel("context (tokens)", fontsize=9)
    _save(figure, path)


def _draw_times(
    axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, systems: Mapping[str, Mapping[str, str]]
) -> None:
    """A line for each system; interpolated points have a white middle."""
    for name in dict.fromkeys(row["system"] for row in rows):
        some = [row for row in rows if row["system"] == name and row[key] is not None]
        if some:
            style = _style(systems, name)
            axes.plot([row["context"] for row in some], [row[key] for row in some], **style)
            hollow = [(row["context"], row[key]) for row in some if key == "prefill_us" and not row["whole"]]
            style |= dict(linestyle="", markerfacecolor="white", label="_")
            axes.plot(*np.array(hollow).reshape(-1, 2).T, **style)
    _token_axis(axes, [row["context"] for row in rows], "context (tokens)")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _points(x: Sequence[float], values: Sequence[dict[str, Any] | None]) -> np.ndarray:
    """Positions, means and errors over books, of the values that there are; [3, number of them]."""
    known = [(a, v["mean"], v["books_error"] or 0.0) for a, v in zip(x, values, strict=True) if v is not None]
    return np.array(known).reshape(-1, 3).T


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.5 * columns if columns > 1 else 8, 4.8), dpi=150, layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.grid(axis="y", color="#e4e7ec", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(systems: Mapping[str, Mapping[str, str]], name: str) -> dict[str, Any]:
    emphasis = dict(linewidth=2.2, zorder=3) if name == "ttt-e2e" else dict(linewidth=1.4, zorder=2)
    style = dict(label=systems[name]["label"], color=systems[name]["colour"], marker="o", markersize=4) | emphasis
    return style | dict(linestyle="--" if name.startswith("ngram") else "-")


def _token_axis(axis: Axes, ticks: Sequence[int], label: str) -> None:
    axis.set_xlabel(label)
    if ticks:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(sorted(set(ticks))))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_tokens(int(value))))


def _save(figure: Figure, path: Path) -> None:
    """Write the picture, with all labels below the panels, in as many columns as fit the longest one."""
    lines, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        columns = int(figure.get_figwidth() / (0.6 + 0.07 * max(map(len, labels))))  # inches, at this font size
        columns = max(1, min(4, columns))
        figure.legend(lines, labels, frameon=False, loc="outside lower center", ncols=columns, fontsize=9)
    with atomic_path(path) as part:
        figure.savefig(part, format="png")
