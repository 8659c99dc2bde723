"""The plot of a reading, drawn without a display."""

from dataclasses import astuple
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ttt_e2e.errors import UserError
from ttt_e2e.files import atomic_path
from ttt_e2e.reading.report import ReadingReport

SUFFIXES = (".png", ".pdf", ".svg")
_WITH, _WITHOUT, _GREY = "#1565c0", "#d9822b", "#667085"
_SMOOTHING = 25  # a smoothed point is the mean over one part in so many of the text


def check_plot_target(path: Path) -> None:
    """Raise UserError if no plot can be written to `path`: a folder, or a suffix other than `SUFFIXES`."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file for the plot.")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"A plot cannot be written as {path.name!r}; use a name that ends in {', '.join(SUFFIXES)}.")


def plot_reading(report: ReadingReport, path: Path) -> None:
    """Draw the loss along the document, with and without learning, and the gain below it, to the file `path`.

    Thin lines are bins of tokens, thick ones their mean over a twenty-fifth of the text. Raises UserError as
    `check_plot_target` does, for a full disk, and if `path` cannot be written.
    """
    path = Path(path)
    check_plot_target(path)
    compared = report.gain is not None
    figure = Figure(figsize=(9, 5.6 if compared else 3.8), dpi=150, layout="constrained")
    axes = figure.subplots(1 + compared, sharex=True, squeeze=False, height_ratios=[2, 1][: 1 + compared])[:, 0]
    start, stop, loss, without, gain = np.array([astuple(part) for part in report.curve], float).T
    tokens, weights = (start + stop) / 2, stop - start
    series = [(without, report.loss_without, "without learning", _WITHOUT)] if compared else []
    series.append((loss, report.loss, "with learning" if report.learns else "loss", _WITH))
    low, high = np.percentile(np.concatenate([values for values, *_ in series]), [1, 99])
    for values, mean, label, color in series:
        smooth = _smooth(values, weights)
        low, high = min(low, smooth.min()), max(high, smooth.max())
        axes[0].plot(tokens, values, color=color, linewidth=0.6, alpha=0.25)
        axes[0].plot(tokens, smooth, color=color, linewidth=1.8, label=f"{label} (mean {mean:.3f})")
    axes[0].set_ylabel("loss (nats per token)")
    margin = 0.05 * (high - low) or 0.1
    axes[0].set_ylim(low - margin, high + margin)
    axes[0].legend(frameon=False, loc="best")
    if compared:
        gain = _smooth(gain, weights)
        axes[1].axhline(0, color=_GREY, linewidth=0.8)
        axes[1].fill_between(tokens, gain, 0, where=gain >= 0, interpolate=True, color=_WITH, alpha=0.3, linewidth=0)
        axes[1].fill_between(tokens, gain, 0, where=gain <= 0, interpolate=True, color=_WITHOUT, alpha=0.4, linewidth=0)
        axes[1].plot(tokens, gain, color=_WITH, linewidth=1.4)
        axes[1].set_ylabel("gain")
        axes[1].yaxis.set_major_locator(MaxNLocator(4))
    axes[-1].set_xlabel("tokens read")
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes[-1].set_xlim(0, report.tokens)
    for axis in axes:
        axis.grid(axis="y", color="#e4e7ec", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    title = f"Reading {report.name}: {report.tokens:,} tokens with {report.model}"
    if report.gain_percent is not None:
        title += f"\nlearning gains {report.gain:+.3f} nats per token ({report.gain_percent:+.1f} %)"
    title = title.encode("utf-8", "replace").decode()  # the name of a file may be invalid UTF-8
    axes[0].set_title(title, loc="left", fontsize=11, parse_math=False)  # a name may contain $
    with atomic_path(path) as part_path:
        figure.savefig(part_path, format=path.suffix[1:].lower())


def _smooth(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Running mean, weighted by tokens, over a twenty-fifth of the bins, centred; shorter at the ends."""
    window = np.ones(2 * (len(values) // _SMOOTHING // 2) + 1)
    return np.convolve(values * weights, window, "same") / np.convolve(weights, window, "same")
