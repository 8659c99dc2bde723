"""The main job: read a document of any length while learning from it, beside a baseline that does not learn.

Both read the same tokens with the same weights and the same window; the difference of their losses is what learning
gained.
"""

import itertools
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from ttt_e2e.data.text import short_chunks
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import Precision, session_facts
from ttt_e2e.progress import ProgressBar
from ttt_e2e.reading.ended import EndedReading
from ttt_e2e.reading.loss_curve import LossCurve
from ttt_e2e.reading.reading import Reading
from ttt_e2e.reading.recording import Recording, forget_unread, record_text
from ttt_e2e.reading.report import ReadingReport, build_report
from ttt_e2e.reading.resume import resume_reading, save_unfinished, unfinished_facts
from ttt_e2e.signals import GracefulStop

_MINI_BATCHES = 8  # of a chunk: between chunks, Ctrl-C and the clock are looked at


def read_document(
    session: Session,
    chunks: Iterable[str],
    *,
    name: str = "text",
    model_name: str = "model",
    total_bytes: int | None = None,
    baseline: bool = True,
    progress: bool = True,
    save: Path | None = None,
    save_every: float = 30.0,
    precision: Precision = "float32",
    recording: Recording | None = None,
    lock: IO[str] | None = None,
    show: Callable[[ReadingReport], object] | None = None,
) -> ReadingReport:
    """Read a text to its end with `session` and report what was measured.

    Ctrl-C stops the reading within eight mini-batches, and divergence stops it where it happens. The report says so,
    and the session stays usable. Saving the finished session is the last step.

    Args:
        session: Reads and learns; it keeps what it has learned. It may have read other texts before.
        chunks: The text, split in any way.
        name: Of the text, for the report.
        model_name: Of the model, for the report.
        total_bytes: Size of the text, for the progress bar.
        baseline: Also read with a new session of the same model that does not learn, for comparison.
        progress: Show a progress bar.
        save: File to save the session to, at the end and every `save_every` seconds. If it holds an unfinished reading
            of this text, that is continued, with the same result as if it had never stopped.
        save_every: Seconds.
        precision: Of the session saved at the end, as for `Session.save`; before the end nothing is rounded.
        recording: How the text is also recorded in the notebook of `save`; see `plan_recording`.
        lock: What `lock_session(save)` gives inside its block. With it, a text that an earlier command has read and
            saved, but that ended before it left its block, is not read again; see `ended`.
        show: Called with the report before the finished session is saved. What it raises is raised after that.

    Returns:
        The report, as far as the text was read.

    Raises:
        UserError: If the text cannot be read or has no tokens, or if `save` holds anything but a session, or an
            unfinished reading of another text or with other options.
    """
    tokenizer = session.tokenizer
    if tokenizer is None:
        raise UserError("Reading a text needs a tokenizer; make the session with one.")
    if not save_every >= 0:
        raise UserError(f"Cannot save every {save_every} seconds; give a number of at least 0.")
    other = None
    if baseline and session.learn:
        other = Session(session.model, tokenizer, learn=False, dtype=session.dtype)
    reading = Reading(session, other, name, total_bytes, curve=LossCurve(skip=session.pending))
    ended = None
    if save is not None and lock is not None and _was_loaded_from(session, save):
        ended = EndedReading(lock, chunks, [precision, recording is not None])
        if not unfinished_facts(save) and (report := ended.find(session.info().text_digest)):
            if progress:
                print(f"{name} was read to its end before; here is its report.", file=sys.stderr)
            if show is not None:
                show(report)
            return report
        chunks = ended.chunks()
    token_chunks = _open_tokens(reading, chunks, save, recording, progress)
    started, saved_at = time.perf_counter() - reading.seconds, time.monotonic()
    bar = ProgressBar(
        total=total_bytes,
        initial=round(reading.bytes),
        unit="B",
        unit_scale=True,
        disable=not progress,
        desc=f"reading {name}"[:40],
        mininterval=0.2 if sys.stderr.isatty() else 10,  # a log file needs few lines
    )
    with GracefulStop(signal.SIGINT) as stop, bar:
        if session.compiled:
            bar.set_postfix_str("compiling")
        diverged = None
        for ids, size in stop.until_requested(token_chunks):
            diverged = reading.read(ids, size)
            reading.seconds = time.perf_counter() - started
            bar.update(round(reading.bytes) - bar.n)
            bar.set_postfix_str(reading.describe(), refresh=False)
            if diverged:
                break
            if save is not None and time.monotonic() - saved_at >= save_every:
                try:
                    save_unfinished(save, reading)
                except UserError as error:
                    warnings.warn(f"The reading continues, but could not be saved: {error}", stacklevel=2)
                saved_at = time.monotonic()
        interrupted = stop.requested  # a Ctrl-C from here on is too late to leave anything unread
        if save is not None and interrupted and not diverged and reading.tokens:
            save_unfinished(save, reading)  # pending tokens get their losses when it is continued
        diverged = diverged or reading.score_pending()
        reading.score_pending_of_baseline()
        reading.seconds = time.perf_counter() - started
        report = build_report(reading, model_name, interrupted=interrupted, diverged=diverged)
        bar.close()
        problem = None
        if show is not None:
            try:
                show(report)
            except Exception as error:
                problem = error
        if save is not None and (diverged or not interrupted):
            if ended is not None and not diverged:
                ended.note(session.info().text_digest, report)
            session.save(save, precision)
        if problem is not None:
            raise problem
    return report


def _open_tokens(
    reading: Reading, chunks: Iterable[str], save: Path | None, recording: Recording | None, progress: bool
) -> Iterator[tuple[np.ndarray, float]]:
    """The tokens of the text that are left to read, at most a few mini-batches at a time, and their bytes.

    If `save` holds an unfinished reading of the text, `reading` continues it. With a `recording`, every chunk is
    recorded before it is read.
    """
    session = reading.session
    assert session.tokenizer is not None
    if recording is not None:
        reading.notebook_start = recording.start
        chunks = iter(chunks)
        first = next(chunks, "")  # a stream that is not text is refused before anything is written
        chunks = record_text(itertools.chain([first], chunks), recording)
    token_chunks = _tokenize(session.tokenizer, chunks, _MINI_BATCHES * session.mini_batch_size)
    if save is not None:
        reading.initial_digest = session.info().text_digest
        if resume_reading(save, token_chunks, reading):
            if progress:
                print(f"Continuing after {reading.tokens:,} tokens of {reading.name}, from {save}.", file=sys.stderr)
        elif recording is None:
            forget_unread(save)
        else:  # before anything is recorded, the session file has to say where the text begins in the notebook
            save_unfinished(save, reading)
    return token_chunks


def _was_loaded_from(session: Session, path: Path) -> bool:
    """Whether `session` was loaded from the file `path`, as far as the text that they have read can tell."""
    return path.exists() and bool(session_facts(path)["text_digest"] == session.info().text_digest)


def _tokenize(tokenizer: Tokenizer, chunks: Iterable[str], length: int) -> Iterator[tuple[np.ndarray, float]]:
    """At most `length` tokens of the text at a time, and their bytes; the splits depend on the text alone."""
    for tokens in tokenizer.encode_chunks(short_chunks(chunks)):
        token_bytes = len(tokenizer.decode(tokens).encode("utf-8", "replace")) / max(1, len(tokens))
        for start in range(0, len(tokens), length):
            ids = tokens[start : start + length]
            yield ids, token_bytes * len(ids)
