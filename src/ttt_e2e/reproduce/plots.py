"""The pictures of a comparison, drawn without a display."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from ttt_e2e.files import atomic_path
from ttt_e2e.model.cost import in_tokens


def comparison(report: dict[str, Any], path: Path) -> None:
    """Each system's loss minus the baseline's by context; in figure 1 also, right, the time to read a token."""
    timed = report["what"] == "figure1"
    figure, axes = _figure(1 + timed)
    systems = report["systems"]
    contexts = sorted({row["context"] for row in report["comparison"]})
    for name in systems:
        rows = [r for r in report["comparison"] if r["system"] == name and r["difference"] is not None]
        if rows:
            axes[0].errorbar(
                [row["context"] for row in rows],
                [row["difference"]["mean"] for row in rows],
                [row["difference"]["books_error"] or 0.0 for row in rows],
                **_style(report, name),
                capsize=2,
                elinewidth=0.8,
            )
    axes[0].set_ylabel(f"loss minus that of {systems[report['baseline']]['label']} (nats per token)")
    _by_tokens(axes[0], contexts, "context (tokens)")
    if timed:
        _latency(report, axes[1])
    axes[0].set_title(f"{report['what']}, scale {report['plan']['scale']['name']}", loc="left", fontsize=11)
    _legend(figure, axes[0])
    _save(figure, path)


def _latency(report: dict[str, Any], axes: Axes) -> None:
    for name in report["systems"]:
        rows = [r for r in report["latency"] if r["system"] == name and r["prefill_us"] is not None]
        if rows:
            style = _style(report, name)
            axes.plot([row["context"] for row in rows], [row["prefill_us"] for row in rows], **style)
            # What is interpolated from stretches has a white middle.
            some = [row for row in rows if not row.get("whole", True)]
            places = [row["context"] for row in some], [row["prefill_us"] for row in some]
            axes.plot(*places, **style | dict(linestyle="", markerfacecolor="white", label="_"))
    axes.set_ylabel("time to read a token (microseconds)")
    _by_tokens(axes, sorted({row["context"] for row in report["latency"]}), "context (tokens)")
    if report["latency"]:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    else:
        axes.text(0.5, 0.5, "not measured yet", ha="center", transform=axes.transAxes, color="#667085")


def along(report: dict[str, Any], path: Path) -> None:
    """The loss by position in the sequence at the longest context; right: minus the baseline's, with its error."""
    if report["along"] is None:
        return
    figure, axes = _figure(2)
    edges = report["along"]["position_edges"]
    middles = [(max(a, 1) * b) ** 0.5 for a, b in pairwise(edges)]
    for row in report["along"]["rows"]:
        for axis, key in zip(axes, ("loss", "difference"), strict=True):
            points = [(x, b[key]) for x, b in zip(middles, row["bins"], strict=True) if b[key] is not None]
            x, y = [x for x, _ in points], [value["mean"] for _, value in points]
            axis.plot(x, y, **_style(report, row["system"]))
            if key == "difference":
                errors = [value["books_error"] or 0.0 for _, value in points]
                low, high = ([a + sign * b for a, b in zip(y, errors, strict=True)] for sign in (-1, 1))
                axis.fill_between(x, low, high, color=report["systems"][row["system"]]["colour"], alpha=0.12, lw=0)
    axes[0].set_ylabel("loss (nats per token)")
    axes[1].set_ylabel(f"minus that of {report['systems'][report['baseline']]['label']}")
    ticks = [edge for edge in edges[1:] if edge & (edge - 1) == 0]
    for axis in axes:
        _by_tokens(axis, ticks, "position in the sequence (token)")
    axes[0].set_title(f"Loss along a context of {in_tokens(report['along']['context'])}", loc="left", fontsize=11)
    _legend(figure, axes[0])
    _save(figure, path)


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.5 * columns if columns > 1 else 8, 4.8), dpi=150, layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.grid(axis="y", color="#e4e7ec", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(report: dict[str, Any], name: str) -> dict[str, Any]:
    system = report["systems"][name]
    ours = name == "ttt-e2e"
    return {
        "label": system["label"],
        "color": system["colour"],
        "linewidth": 2.2 if ours else 1.4,
        "marker": "o",
        "markersize": 4,
        "zorder": 3 if ours else 2,
    }


def _by_tokens(axis: Axes, ticks: list[int], label: str) -> None:
    axis.set_xlabel(label)
    if ticks:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_tokens(int(value))))


def _legend(figure: Figure, axis: Axes) -> None:
    """All labels below the pictures, in as many columns as the longest leaves room for."""
    lines, labels = axis.get_legend_handles_labels()
    widest = 0.6 + 0.07 * max(map(len, labels), default=0)  # inches, with letters of this size
    columns = max(1, min(4, int(figure.get_figwidth() / widest)))
    figure.legend(lines, labels, frameon=False, loc="outside lower center", ncols=columns, fontsize=9)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as part:
        figure.savefig(part, format="png")
