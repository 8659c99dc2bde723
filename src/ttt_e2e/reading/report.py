"""The report of a reading: losses with learning and without it, as values and as a table for a terminal."""

import math
from dataclasses import dataclass

import numpy as np

from ttt_e2e.errors import UserError
from ttt_e2e.reading.reading import Reading

_BARS = "▁▂▃▄▅▆▇█"
_PERCENT_WIDTH = 10  # of a column in the table


@dataclass(frozen=True)
class SegmentLoss:
    """Mean losses of tokens `start` to `stop`, in nats per token; `gain` is what learning saved."""

    start: float
    stop: float
    loss: float
    loss_without: float | None = None
    gain: float | None = None


@dataclass(frozen=True)
class ReadingReport:
    """What reading one document measured. Losses are means in nats per token; `_without` means without learning."""

    name: str
    model: str
    learns: bool
    tokens: int  # of the text, as far as both readers have come; so are `bytes`
    bytes: int
    loss: float
    loss_without: float | None
    gain: float | None
    gain_percent: float | None
    bits_per_byte: float  # the loss relative to the size of the text, which is comparable across tokenizers
    bits_per_byte_without: float | None
    quarters: list[float] | None  # the gain in each quarter of the text
    parts: list[SegmentLoss]  # tenths of the text
    curve: list[SegmentLoss]  # at most `loss_curve.BINS` segments
    seconds: float
    learning_seconds: float  # of the reader that learns, without the baseline
    tokens_per_second: float  # of the reader that learns
    mini_batch_size: int | None
    sliding_window: int
    interrupted: bool = False
    diverged: str | None = None  # where and how learning diverged
    note: str | None = None  # a sentence for people, such as that the text was too short to learn from


def build_report(reading: Reading, model_name: str, *, interrupted: bool, diverged: str | None) -> ReadingReport:
    """The report of a reading that has ended.

    Raises UserError if there was nothing to read, and KeyboardInterrupt if the reading was interrupted before it began.
    """
    session = reading.session
    curves = [reading.curve] if reading.baseline is None else [reading.curve, reading.baseline_curve]
    # Readers that stopped at different places are compared as far as the slower one has come.
    tokens, bin_tokens = min(curve.tokens for curve in curves), max(curve.bin_tokens for curve in curves)
    if tokens == 0:
        if diverged:
            raise UserError(diverged)
        if interrupted:
            raise KeyboardInterrupt
        raise UserError(f"There is nothing to read in {reading.name}: it has no tokens.")

    def segment(start: float, stop: float) -> SegmentLoss:
        loss, *without = (curve.mean(start, stop) for curve in curves)
        return SegmentLoss(start, stop, loss, *without, *(mean - loss for mean in without))

    def segments(count: int) -> list[SegmentLoss]:
        return [segment(tokens * i / count, tokens * (i + 1) / count) for i in range(count)]

    size = reading.bytes * tokens / max(curve.tokens for curve in curves)
    config, whole, bits = session.model.config, segment(0, tokens), tokens / math.log(2) / max(size, 1)
    b, note = config.mini_batch_size, None
    if not session.model.suffix:
        note = "This is a standard model: it has no fast weights to learn with while it reads."
    elif session.learn and b is not None and tokens <= b:
        note = f"The text is not longer than one mini-batch of {b} tokens: nothing could be learned from it yet."
    return ReadingReport(
        name=reading.name,
        model=model_name,
        learns=session.learn,
        tokens=tokens,
        bytes=round(size),
        loss=whole.loss,
        loss_without=whole.loss_without,
        gain=whole.gain,
        gain_percent=None if whole.gain is None or not whole.loss_without else 100 * whole.gain / whole.loss_without,
        bits_per_byte=whole.loss * bits,
        bits_per_byte_without=None if whole.loss_without is None else whole.loss_without * bits,
        quarters=[quarter.gain for quarter in segments(4) if quarter.gain is not None] or None,
        parts=segments(10),
        curve=[segment(start, min(start + bin_tokens, tokens)) for start in range(0, tokens, bin_tokens)],
        seconds=reading.seconds,
        learning_seconds=reading.learning_seconds,
        tokens_per_second=reading.curve.tokens / max(reading.learning_seconds, 1e-9),
        mini_batch_size=b,
        sliding_window=config.sliding_window,
        interrupted=interrupted,
        diverged=diverged,
        note=note,
    )


def summary(report: ReadingReport, columns: int = 120) -> str:
    """The report as a short text with a table, for a terminal with this many columns, of which the table needs 38."""
    lines = [f"{report.name}: {report.tokens:,} tokens ({report.bytes:,} bytes), read with {report.model}"]
    if report.interrupted:
        lines.append("Stopped before the end; these are the losses so far.")
    names = ["first 10 %", *(f"{10 * i} - {10 * i + 10} %" for i in range(1, 9)), "last 10 %", "whole text"]
    whole = SegmentLoss(0, report.tokens, report.loss, report.loss_without, report.gain)
    rows = zip(names, [*report.parts, whole], strict=True)
    if report.gain is None:
        lines += ["", f"{'':<14}{'loss (nats per token)':>24}"]
        lines += [f"{name:<14}{part.loss:>24.4f}" for name, part in rows]
    else:
        heads, widths = ("nats per token", "without learning", "with learning"), (14, 18, 16, 10)
        if columns < sum(widths) + _PERCENT_WIDTH:
            heads, widths = ("nats/token", "without", "with"), (11, 9, 9, 9)
        has_percent, (a, b, c, d) = columns >= sum(widths) + _PERCENT_WIDTH, widths
        lines += ["", f"{heads[0]:<{a}}{heads[1]:>{b}}{heads[2]:>{c}}{'gain':>{d}}"]
        for name, part in rows:
            assert part.gain is not None and part.loss_without is not None
            percent = 100 * part.gain / part.loss_without if part.loss_without else 0.0
            line = f"{name:<{a}}{part.loss_without:>{b}.4f}{part.loss:>{c}.4f}{part.gain:>+{d}.4f}"
            lines.append(f"{line}{percent:>+8.1f} %" if has_percent else line)
        title, gains = "gain along the text", [p.gain for p in report.curve if p.gain is not None]
        line = f"{title}  {sparkline(gains)}"
        lines += ["", line] if len(line) <= columns else ["", title, sparkline(gains, min(48, max(1, columns - 20)))]
    bits = f"{report.bits_per_byte:.4f} bits per byte"
    if report.bits_per_byte_without is not None:
        bits += f" with learning, {report.bits_per_byte_without:.4f} without"
    speed = f"{report.tokens_per_second:,.0f} tokens/s{' while learning' if report.learns else ''}"
    lines += ["", bits, f"{speed}, {report.seconds:,.1f} s in all"]
    if report.note:
        lines.append(report.note)
    return "\n".join(lines)


def sparkline(values: list[float], width: int = 48) -> str:
    """Values along a text as one line of block characters with its scale; negative ones get the lowest block."""
    if not values:
        return ""
    groups = [group.mean() for group in np.array_split(np.array(values), min(width, len(values)))]
    top = max(max(groups), 1e-12)
    marks = [_BARS[min(len(_BARS) - 1, max(0, round(v / top * (len(_BARS) - 1))))] for v in groups]
    return f"{''.join(marks)}  {min(groups):+.3f} to {max(groups):+.3f}"
