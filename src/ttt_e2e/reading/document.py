"""The main job: read a document of any length while learning from it, beside a frozen twin that does not learn.

Both walk the same tokens with the same weights and the same window; what differs is the inner learning rate, so the
difference of their losses is what learning gained. Losses are summed into a fixed number of bins as they come: memory
does not grow with the document.
"""

import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self, TypeVar

import numpy as np
from tqdm import tqdm

from ttt_e2e.data.text import short_pieces
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Diverged, Session
from ttt_e2e.inference.session_file import Precision
from ttt_e2e.reading.loss_curve import Curve
from ttt_e2e.reading.resume import Chunk, Progress, go_on, save_unfinished

_BARS = "▁▂▃▄▅▆▇█"
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Part:
    """Tokens `start` to `stop` of a text: mean losses in nats per token; `gain` is what learning saved."""

    start: float
    stop: float
    loss: float
    loss_without: float | None
    gain: float | None


@dataclass(frozen=True)
class ReadingReport:
    """What came of reading one document. Losses are means in nats per token, `_without` learning those of the twin.

    tokens, bytes: of the text, as far as both readers have come. bits_per_byte: the loss by the text's size, for
    comparison across tokenizers. parts: tenths of the text. quarters: the gain of each. curve: at most `BINS` parts.
    seconds: in all; learning_seconds: of the learning reader; tokens_per_second: its speed.
    interrupted: stopped by the user. diverged: the sentence that says where learning failed.
    note: a sentence for people, such as that the text was too short to learn from it.
    """

    name: str
    model: str
    learns: bool
    tokens: int
    bytes: int
    loss: float
    loss_without: float | None
    gain: float | None
    gain_percent: float | None
    bits_per_byte: float
    bits_per_byte_without: float | None
    quarters: list[float] | None
    parts: list[Part]
    curve: list[Part]
    seconds: float
    learning_seconds: float
    tokens_per_second: float
    mini_batch: int | None
    window: int
    interrupted: bool = False
    diverged: str | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return asdict(self)


def read_document(
    session: Session,
    pieces: Iterable[str],
    *,
    name: str = "text",
    model_name: str = "model",
    total_bytes: int | None = None,
    baseline: bool = True,
    progress: bool = True,
    save: Path | None = None,
    save_every: float = 30.0,
    precision: Precision = "float32",
    begin: int | None = None,
) -> ReadingReport:
    """Read a text to its end with `session`, and with a frozen twin of it if `baseline`; returns what came of it.

    pieces: the text, split in any way. total_bytes: its size, for the progress bar. The twin starts afresh: where the
    session has read something before, the gain is that of all it has learned. It is never compiled. Ctrl-C ends the
    reading within eight mini-batches, and learning that diverges ends it where it does; the report says so and the
    session is sound. Raises UserError for a text that cannot be read.

    save: where to keep the session, at the end and every `save_every` seconds on the way. If that file is an unfinished
    reading of this text, the session first becomes what it holds and the reading goes on there, to the same end as if
    it had never stopped; the same after Ctrl-C. Raises UserError if it is unfinished, but of another text or kind.
    precision: of what is kept at the end, as for `Session.save`; on the way nothing is rounded.

    begin: the character of a notebook at which the text begins, where `pieces` are noted in one (see `noting`). The
    file keeps it; so it is written before the first piece is asked for, unless the reading goes on.
    """
    tokenizer = session.tokenizer
    if tokenizer is None:
        raise UserError("Reading a text needs a tokenizer; make the session with one.")
    if not save_every >= 0:
        raise UserError(f"A reading cannot be saved every {save_every} seconds; give a number from 0 on.")
    twin = None
    if baseline and session.learn:
        twin = Session(session.model, tokenizer, learn=False, dtype=session.dtype)
    began = "" if save is None else session.info().text_digest
    chunks = _chunks(tokenizer, pieces, 8 * session.mini_batch)
    resumed = None if save is None else go_on(save, session, twin, chunks, began, name, begin)
    if resumed is not None and progress:
        print(f"Going on after {resumed.tokens:,} tokens of {name}, where {save} stopped.", file=sys.stderr)
    done = resumed or Progress(from_before=session.pending, begin=begin)
    curve, twin_curve, diverged = done.curve, done.twin_curve, None
    started = time.perf_counter() - done.seconds
    saved = time.monotonic()

    def keep(target: Path) -> None:
        done.seconds = time.perf_counter() - started
        save_unfinished(target, session, twin, done, began, name, total_bytes)

    if save is not None and begin is not None and resumed is None:
        keep(save)
    bar = tqdm(
        total=total_bytes,
        initial=round(done.bytes),
        unit="B",
        unit_scale=True,
        disable=not progress,
        desc=f"reading {name}"[:40],
        mininterval=0.2 if sys.stderr.isatty() else 10,  # a log file wants no line every moment
    )
    with _Interrupts() as interrupts, bar:
        if session.compiled:
            bar.set_postfix_str("compiling")
        for chunk in interrupts.while_waiting(chunks):
            before = time.perf_counter()
            try:
                for losses in session.steps(chunk.ids):
                    done.add(losses)
            except Diverged as error:
                diverged = str(error)
            done.learning_seconds += time.perf_counter() - before
            if twin is not None:
                twin_curve.add(twin.read(chunk.ids))
            done.took(chunk)
            bar.update(round(done.bytes) - bar.n)
            bar.set_postfix_str(_so_far(curve, twin_curve, done.learning_seconds), refresh=False)
            if diverged:
                break
            if save is not None and time.monotonic() - saved >= save_every:
                try:
                    keep(save)
                except UserError as error:
                    warnings.warn(f"The reading goes on, but could not be saved on the way: {error}", stacklevel=2)
                saved = time.monotonic()
        stopped = interrupts.asked  # a Ctrl-C from here on comes too late to leave anything unread
        if save is not None and stopped and not diverged and done.tokens:
            keep(save)  # before the rest is scored: who goes on learns from it and scores it then
        if not diverged:
            before = time.perf_counter()
            try:
                done.add(session.score_pending())
            except Diverged as error:
                diverged = str(error)
            done.learning_seconds += time.perf_counter() - before
        if twin is not None:
            twin_curve.add(twin.score_pending())
    report = _report(
        session,
        curve,
        twin_curve if twin is not None else None,
        name=name,
        model_name=model_name,
        bytes_read=done.bytes,
        seconds=time.perf_counter() - started,
        learning_seconds=done.learning_seconds,
        interrupted=stopped,
        diverged=diverged,
    )
    if save is not None and (diverged or not stopped):
        session.save(save, precision)
    return report


def _chunks(tokenizer: Tokenizer, pieces: Iterable[str], most: int) -> Iterator[Chunk]:
    """The text's tokens, `most` at a time: between two of them are looks at the clock, and at Ctrl-C.

    They depend on the text alone, so that a reading that goes on finds the same ones.
    """
    for tokens in tokenizer.encode_pieces(short_pieces(pieces)):
        size = len(tokenizer.decode(tokens).encode("utf-8", "replace")) / max(1, len(tokens))
        for start in range(0, len(tokens), most):
            ids = tokens[start : start + most]
            yield Chunk(ids, size * len(ids))


def _so_far(curve: Curve, twin: Curve, seconds: float) -> str:
    if curve.tokens == 0:
        return "filling the first mini-batch"
    without = f" ({twin.total() / twin.tokens:.3f} without learning)" if twin.tokens else ""
    return f"{curve.tokens / max(seconds, 1e-9):,.0f} tokens/s, loss {curve.total() / curve.tokens:.3f}{without}"


def _report(
    session: Session,
    curve: Curve,
    twin: Curve | None,
    *,
    name: str,
    model_name: str,
    bytes_read: float,
    seconds: float,
    learning_seconds: float,
    interrupted: bool,
    diverged: str | None,
) -> ReadingReport:
    tokens = min(curve.tokens, twin.tokens) if twin is not None else curve.tokens
    if tokens == 0:
        if diverged:
            raise UserError(diverged)
        if interrupted:
            raise KeyboardInterrupt
        raise UserError(f"There is nothing to read in {name}: it has no tokens.")
    # Readers that were stopped apart are compared as far as the slower one has come.
    reached = max(curve.tokens, twin.tokens if twin is not None else 0)
    size = bytes_read * tokens / reached

    def part(start: float, stop: float) -> Part:
        loss = curve.mean(start, stop)
        without = None if twin is None else twin.mean(start, stop)
        return Part(start, stop, loss, without, None if without is None else without - loss)

    def parts(count: int) -> list[Part]:
        return [part(tokens * i / count, tokens * (i + 1) / count) for i in range(count)]

    width = max(curve.width, twin.width if twin is not None else 1)
    whole = part(0, tokens)
    b = session.model.config.mini_batch_size
    note = None
    if not session.model.suffix:
        note = "This is a standard model: it has no fast weights to learn with while it reads."
    elif session.learn and b is not None and tokens <= b:
        note = f"The text is not longer than one mini-batch of {b} tokens: nothing could be learned from it yet."
    to_bits = tokens / math.log(2) / max(size, 1)
    return ReadingReport(
        name=name,
        model=model_name,
        learns=session.learn,
        tokens=tokens,
        bytes=round(size),
        loss=whole.loss,
        loss_without=whole.loss_without,
        gain=whole.gain,
        gain_percent=None if whole.gain is None or not whole.loss_without else 100 * whole.gain / whole.loss_without,
        bits_per_byte=whole.loss * to_bits,
        bits_per_byte_without=None if whole.loss_without is None else whole.loss_without * to_bits,
        quarters=None if twin is None else [q.gain for q in parts(4) if q.gain is not None],
        parts=parts(10),
        curve=[part(start, min(start + width, tokens)) for start in range(0, tokens, width)],
        seconds=seconds,
        learning_seconds=learning_seconds,
        tokens_per_second=curve.tokens / max(learning_seconds, 1e-9),
        mini_batch=b,
        window=session.model.config.sliding_window,
        interrupted=interrupted,
        diverged=diverged,
        note=note,
    )


def summary(report: ReadingReport) -> str:
    """The report as a short text with a table, for a terminal."""
    lines = [f"{report.name}: {report.tokens:,} tokens ({report.bytes:,} bytes), read with {report.model}"]
    if report.interrupted:
        lines.append("Stopped before the end; this is what was read.")
    names = ["first 10 %", *(f"{10 * i} - {10 * i + 10} %" for i in range(1, 9)), "last 10 %"]
    rows = [*zip(names, report.parts, strict=True)]
    whole = Part(0, report.tokens, report.loss, report.loss_without, report.gain)
    if report.gain is None:
        lines += ["", f"{'':<14}{'loss (nats per token)':>24}"]
        lines += [f"{name:<14}{part.loss:>24.4f}" for name, part in [*rows, ("whole text", whole)]]
    else:
        lines += [
            "",
            f"{'nats per token':<14}{'without learning':>18}{'with learning':>16}{'gain':>10}{'':>3}",
        ]
        for name, part in [*rows, ("whole text", whole)]:
            assert part.gain is not None and part.loss_without is not None
            percent = 100 * part.gain / part.loss_without if part.loss_without else 0.0
            lines.append(f"{name:<14}{part.loss_without:>18.4f}{part.loss:>16.4f}{part.gain:>+10.4f}{percent:>+8.1f} %")
        lines += [
            "",
            f"gain along the text  {sparkline([p.gain for p in report.curve if p.gain is not None])}",
        ]
    bits = f"{report.bits_per_byte:.4f} bits per byte"
    if report.bits_per_byte_without is not None:
        bits += f" with learning, {report.bits_per_byte_without:.4f} without"
    speed = f"{report.tokens_per_second:,.0f} tokens/s{' while learning' if report.learns else ''}"
    lines += ["", bits, f"{speed}, {report.seconds:,.1f} s in all"]
    if report.note:
        lines.append(report.note)
    return "\n".join(lines)


def sparkline(values: list[float], width: int = 48) -> str:
    """Values along a text as one line of block characters with its scale; below zero is the lowest block."""
    if not values:
        return ""
    groups = [group.mean() for group in np.array_split(np.array(values), min(width, len(values)))]
    top = max(max(groups), 1e-12)
    marks = [_BARS[min(len(_BARS) - 1, max(0, round(v / top * (len(_BARS) - 1))))] for v in groups]
    return f"{''.join(marks)}  {min(groups):+.3f} to {max(groups):+.3f}"


class _Interrupts:
    """While it is open, a first Ctrl-C only sets `asked`, and ends the wait for more input; the next one is as ever."""

    def __init__(self) -> None:
        self.asked = False
        self._waiting = False
        self._before: Any = None

    def while_waiting(self, items: Iterator[_Item]) -> Iterator[_Item]:
        """The items, until Ctrl-C."""
        while not self.asked:
            self._waiting = True
            try:
                item = next(items, None)
            except KeyboardInterrupt:
                return
            finally:
                self._waiting = False
            if item is None:
                return
            yield item

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()
        if self._waiting:
            raise KeyboardInterrupt

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
