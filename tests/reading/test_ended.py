"""A reading that continues a session in its own file: stopped anywhere and repeated, it reads its text once."""

import itertools
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from helpers import small_model

from ttt_e2e import files
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference import session_file
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import lock_session, session_facts
from ttt_e2e.reading.document import read_document
from ttt_e2e.reading.recording import plan_recording
from ttt_e2e.reading.report import ReadingReport
from ttt_e2e.retrieval.notebook import Notebook, notebook_folder

TEXT = "".join(f"The {i}th ship of {i * 7 % 13} sailed east.\n" for i in range(2))
TOKENIZER = Tokenizer.train([TEXT], 290)
SHAPE: dict = dict(num_hidden_layers=2, suffix_layers=1, vocab_size=TOKENIZER.vocab_size, inner_loop__lr=0.1)
MODEL = small_model(**SHAPE).eval().requires_grad_(False)


MOMENTS = 45  # there are somewhat more


class Killed(BaseException):
    """As if the process ended here."""


def read(
    path: Path, text: str = TEXT, show: Callable[[ReadingReport], object] = id, record: bool = False, **options: Any
) -> ReadingReport:
    """Read as `ttt-e2e read --session S --save S` does, saving after every chunk; raises KeyboardInterrupt as it."""
    with lock_session(path) as lock:
        session = Session.load(path, MODEL, TOKENIZER)
        recording = plan_recording(path, path, MODEL.config.sliding_window) if record else None
        settings = {"progress": False, "save": path, "save_every": 0.0, **options}
        report = read_document(session, [text], lock=lock, show=show, recording=recording, **settings)
    if report.interrupted:
        raise KeyboardInterrupt
    return report


def read_stopped(at: int, stop: Callable[[], None], path: Path, **options: Any) -> bool:
    """`read`, stopped at the moment `at` among those before and after every step; returns whether it ended well."""
    moments, killed, unlink = itertools.count(), False, Path.unlink

    def moment() -> None:
        nonlocal killed
        if next(moments) == at:
            killed = stop is kill
            stop()

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def stepwise(*values: Any, **named: Any) -> Any:
            if killed:  # nothing is tidied up
                raise Killed
            moment()
            result = function(*values, **named)
            if function is not unlink:  # of the lock file: then the command has succeeded
                moment()
            return result

        return stepwise

    with pytest.MonkeyPatch.context() as patch:
        steps = [(session_file, "save_safetensors"), (files, "_sync_tree"), (files, "sync"), (files, "_remove")]
        steps += [(Path, name) for name in ("rename", "replace", "unlink", "mkdir", "touch")]
        steps += [(Session, name) for name in ("read_chunks", "score_pending", "load", "save")]
        for owner, name in steps:
            function = around(getattr(owner, name))
            patch.setattr(owner, name, staticmethod(function) if name == "load" else function)
        try:
            read(path, show=around(options.pop("show", id)), **options)
        except (Killed, KeyboardInterrupt):
            return False
    return True


def kill() -> None:
    raise Killed


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def interrupt_twice() -> None:
    interrupt()
    interrupt()


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a session that has read something, and its notebook."""
    monkeypatch.setattr(os, "fsync", id)  # which takes longest
    session = Session(MODEL, TOKENIZER)
    session.read("Before. ")
    (tmp_path / "start").mkdir()
    session.save(tmp_path / "start" / "s")
    with Notebook(notebook_folder(tmp_path / "start" / "s"), size=20) as notebook:
        notebook.add("Before. ")
    return tmp_path / "start"


def without_times(report: ReadingReport) -> dict[str, Any]:
    return {name: value for name, value in asdict(report).items() if "seconds" not in name and "second" not in name}


@pytest.mark.parametrize(
    ("stop", "step"), [(kill, 5), (interrupt, 9), (interrupt_twice, 9), pytest.param(kill, 1, marks=pytest.mark.slow)]
)
def test_stopped_at_any_moment_and_repeated_until_it_succeeds(
    started: Path, tmp_path: Path, stop: Callable[[], None], step: int
) -> None:
    place = tmp_path / "place"
    shutil.copytree(started, tmp_path / "whole")
    expected = without_times(read(tmp_path / "whole" / "s"))
    for at in itertools.count(0, step):
        shutil.copytree(started, place)
        shown: list[ReadingReport] = []
        if done := read_stopped(at, stop, place / "s", show=shown.append):
            (report,) = shown
        else:
            report = read(place / "s")
        assert (place / "s").read_bytes() == (tmp_path / "whole" / "s").read_bytes(), at
        assert without_times(report) == expected, at
        assert sorted(path.name for path in place.iterdir()) == ["s", "s.notebook"]
        shutil.rmtree(place)
        if done and at >= MOMENTS:
            break
    assert at < 2 * MOMENTS


def test_repeated_after_success_it_reads_once_more(started: Path) -> None:
    first, second = read(started / "s"), read(started / "s")
    assert (
        session_facts(started / "s")["tokens"] == 1 + len(TOKENIZER.encode("Before. ")) + first.tokens + second.tokens
    )


@pytest.mark.parametrize("record", [False, True])
def test_saved_but_not_shown_it_is_shown_by_the_same_command_and_another_text_is_read(
    started: Path, record: bool
) -> None:
    def full(report: ReadingReport) -> None:
        raise OSError(28, "No space left on device")

    for text, read_after in ((TEXT, 0), ("Another text. " * 9, 1)):
        with pytest.raises(OSError, match="No space"):
            read(started / "s", show=full, record=record)
        saved = session_facts(started / "s")["tokens"]
        assert "unfinished" not in session_facts(started / "s")
        report = read(started / "s", text, record=record)
        assert session_facts(started / "s")["tokens"] == saved + read_after * len(TOKENIZER.encode(text))
        assert report.tokens == len(TOKENIZER.encode(text))
        assert not (started / ".s.lock").exists()


def test_a_second_process_is_refused_before_it_has_read_anything(started: Path) -> None:
    kept = (started / "s").read_bytes()
    with lock_session(started / "s"), pytest.raises(UserError, match="is being written by another process"):
        read(started / "s")
    assert (started / "s").read_bytes() == kept
    Session.load(started / "s", MODEL, TOKENIZER)  # readers need no lock
