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
            axes[0].errorbar(
                [row["context"] for row in rows],
                [row["difference"]["mean"] for row in rows],
                [row["difference"]["books_error"] or 0.0 for row in rows],
                **_style(systems, name),
                capsize=2,
                elinewidth=0.8,
            )
    axes[0].set_ylabel(f"loss minus that of {systems[report['baseline']]['label']} (nats per token)")
    _token_axis(axes[0], [row["context"] for row in report["comparison"]], "context (tokens)")
    if has_latency:
        axes[1].set_ylabel("time to read a token (microseconds)")
        if report["latency"]:
            _draw_times(axes[1], report["latency"], "prefill_us", systems)
        else:
            axes[1].text(0.5, 0.5, "not measured yet", ha="center", transform=axes[1].transAxes, color=_GREY)
    axes[0].set_title(f"{report['name']}, scale {report['plan']['scale']['name']}", loc="left", fontsize=11)
    _legend(figure, axes[0])
    _save(figure, path)


def plot_by_position(report: dict[str, Any], path: Path) -> None:
    """The loss by position in the sequence at the longest context; right: minus the baseline's, with its error."""
    figure, axes = _figure(2)
    systems, edges = report["systems"], report["by_position"]["position_edges"]
    middles = [(max(start, 1) * stop) ** 0.5 for start, stop in pairwise(edges)]
    for row in report["by_position"]["rows"]:
        for axis, key in zip(axes, ("loss", "difference"), strict=True):
            points = [(x, b[key]) for x, b in zip(middles, row["bins"], strict=True) if b[key] is not None]
            x, y = [x for x, _ in points], [value["mean"] for _, value in points]
            axis.plot(x, y, **_style(systems, row["system"]))
            if key == "difference":
                errors = [value["books_error"] or 0.0 for _, value in points]
                low, high = ([a + sign * b for a, b in zip(y, errors, strict=True)] for sign in (-1, 1))
                axis.fill_between(x, low, high, color=systems[row["system"]]["colour"], alpha=0.12, lw=0)
    axes[0].set_ylabel("loss (nats per token)")
    axes[1].set_ylabel(f"minus that of {systems[report['baseline']]['label']}")
    for axis in axes:
        _token_axis(axis, [edge for edge in edges[1:] if edge & (edge - 1) == 0], "position in the sequence (token)")
    context = in_tokens(report["by_position"]["context"])
    axes[0].set_title(f"Loss by position in a context of {context}", loc="left", fontsize=11)
    _legend(figure, axes[0])
    _save(figure, path)


def plot_times(rows: Sequence[Mapping[str, Any]], systems: Mapping[str, Mapping[str, str]], path: Path) -> None:
    """Time per token by context, a panel for each kind of work; `systems` have "label" and "colour"."""
    panels = [key for key in TIMES if key == "prefill_us" or any(row[key] is not None for row in rows)]
    figure, axes = _figure(len(panels))
    for axis, key in zip(axes, panels, strict=True):
        _draw_times(axis, rows, key, systems)
        axis.set_title(TIMES[key], loc="left", fontsize=11)
    axes[0].set_ylabel("microseconds per token")
    _legend(figure, axes[0])
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
            for i, depth in enumerate(depths):
                for j, context in enumerate(contexts):
                    if (model, task, context, depth) in cells:
                        grid[i, j], text = cells[model, task, context, depth]
                        colour = "w" if grid[i, j] > 60 else "k"
                        axes.text(j, i, text, ha="center", va="center", fontsize=6, color=colour)
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
            hollow = [row for row in some if key == "prefill_us" and not row["whole"]]
            points = [row["context"] for row in hollow], [row[key] for row in hollow]
            axes.plot(*points, **style | dict(linestyle="", markerfacecolor="white", label="_"))
    _token_axis(axes, [row["context"] for row in rows], "context (tokens)")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.5 * columns if columns > 1 else 8, 4.8), dpi=150, layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.grid(axis="y", color="#e4e7ec", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(systems: Mapping[str, Mapping[str, str]], name: str) -> dict[str, Any]:
    is_ours = name == "ttt-e2e"
    return {
        "label": systems[name]["label"],
        "color": systems[name]["colour"],
        "linewidth": 2.2 if is_ours else 1.4,
        "marker": "o",
        "markersize": 4,
        "zorder": 3 if is_ours else 2,
    }


def _token_axis(axis: Axes, ticks: Sequence[int], label: str) -> None:
    axis.set_xlabel(label)
    if ticks:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(sorted(set(ticks))))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_tokens(int(value))))


def _legend(figure: Figure, axis: Axes) -> None:
    """All labels below the panels, in as many columns as fit the longest one."""
    lines, labels = axis.get_legend_handles_labels()
    inches = 0.6 + 0.07 * max(map(len, labels), default=0)  # of the longest label at this font size
    columns = max(1, min(4, int(figure.get_figwidth() / inches)))
    figure.legend(lines, labels, frameon=False, loc="outside lower center", ncols=columns, fontsize=9)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as part:
        figure.savefig(part, format="png")
