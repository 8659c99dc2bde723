"""Reading a document beside a baseline that does not learn: report, summary, plot, and saving on the way."""

import os
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference import session_file as session_files
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import session_facts
from ttt_e2e.inner_loop.compiled import compiled_functions
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.reading.document import read_document
from ttt_e2e.reading.loss_curve import BINS
from ttt_e2e.reading.plot import plot_reading
from ttt_e2e.reading.report import ReadingReport, sparkline, summary

TEXT = "".join(f"The {i}th ship of {i * 7 % 13} sailed east, and the sea was calm.\n" for i in range(45))
TOKENIZER = Tokenizer.train([TEXT], 290)
# One block that learns and one that does not: more would take time and no path of this room.
SHAPE: dict = dict(num_hidden_layers=2, suffix_layers=1, vocab_size=TOKENIZER.vocab_size, inner_loop__lr=0.1)
TRAINABLE = small_model(**SHAPE)
MODEL = small_model(**SHAPE).eval().requires_grad_(False)


def report_of(text: str = TEXT, **options: object) -> ReadingReport:
    return read_document(Session(MODEL, TOKENIZER), [text], progress=False, **options)  # type: ignore[arg-type]


def test_report_has_the_losses_of_sequence_loss() -> None:
    report = report_of()
    tokens = torch.tensor([[TOKENIZER.bos, *TOKENIZER.encode(TEXT)]])
    learned = sequence_loss(TRAINABLE, tokens).nll_BT[0].detach()
    frozen = sequence_loss(MODEL, tokens, learn=False).nll_BT[0]
    assert report.tokens == len(learned)
    assert report.bytes == len(TEXT.encode())
    assert report.loss == pytest.approx(float(learned.mean()), abs=1e-5)
    assert report.loss_without == pytest.approx(float(frozen.mean()), abs=1e-5)
    assert report.gain == pytest.approx(float((frozen - learned).mean()), abs=1e-5)
    assert report.bits_per_byte == pytest.approx(float(learned.sum()) / np.log(2) / report.bytes, rel=1e-5)
    assert len(report.parts) == 10 and report.quarters is not None
    assert np.mean(report.quarters) == pytest.approx(report.gain, abs=1e-5)
    assert BINS / 2 <= len(report.curve) <= BINS
    assert report.curve[-1].stop == report.tokens
    start, stop = int(report.curve[3].start), int(report.curve[3].stop)
    assert report.curve[3].loss == pytest.approx(float(learned[start:stop].mean()), abs=1e-4)


def test_report_does_not_depend_on_how_the_text_was_split() -> None:
    whole = report_of()
    split = read_document(Session(MODEL, TOKENIZER), (c for c in TEXT), progress=False)
    assert (whole.loss, whole.loss_without, whole.curve) == (split.loss, split.loss_without, split.curve)


@pytest.mark.filterwarnings("error:Continuing without compilation")
def test_a_compiled_session_gives_the_same_report(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(
        "ttt_e2e.inference.session.compiled_functions", lambda device: compiled_functions(device, "aot_eager")
    )
    compiled = read_document(Session(MODEL, TOKENIZER, compile=True), [TEXT], progress=False)
    plain = report_of()
    assert compiled.loss_without == plain.loss_without  # the twin is not compiled
    assert [part.loss for part in compiled.curve] == pytest.approx([part.loss for part in plain.curve], abs=1e-4)


def test_a_session_can_read_another_text() -> None:
    session = Session(MODEL, TOKENIZER)
    half = len(TEXT) // 2
    read_document(session, [TEXT[:half]], progress=False, baseline=False)
    report = read_document(session, [TEXT[half:]], progress=False)
    assert report.tokens == len(TOKENIZER.encode(TEXT[half:]))
    assert report.gain is not None


def test_ctrl_c_stops_the_reading_and_reports() -> None:
    def chunks() -> Iterator[str]:
        yield TEXT * 12  # a segment and more
        os.kill(os.getpid(), signal.SIGINT)
        yield TEXT

    model = small_model(vocab_size=TOKENIZER.vocab_size, mini_batch_size=64, sliding_window=64)
    session = Session(model, TOKENIZER)
    before = signal.getsignal(signal.SIGINT)
    report = read_document(session, chunks(), progress=False)
    assert report.interrupted and report.gain is not None
    assert 0 < report.tokens < 12 * len(TOKENIZER.encode(TEXT))
    assert session.position + session.pending == report.tokens
    assert signal.getsignal(signal.SIGINT) == before


def test_divergence_is_reported_and_the_session_stays_usable() -> None:
    model = small_model(vocab_size=TOKENIZER.vocab_size, inner_loop__lr=1e30)
    session = Session(model, TOKENIZER)
    report = read_document(session, [TEXT], progress=False)
    assert report.diverged is not None and "diverged" in report.diverged
    assert session.position == 0 and report.tokens == 5
    assert len(list(session.generate_tokens(max_tokens=3))) == 3


def test_an_empty_text_is_refused() -> None:
    for chunks in ([], [""]):
        with pytest.raises(UserError, match="nothing to read in text"):
            read_document(Session(MODEL, TOKENIZER), chunks, progress=False)


def test_a_short_text_is_read_without_learning() -> None:
    report = report_of("Hi")
    assert report.tokens == len(TOKENIZER.encode("Hi")) and report.gain == pytest.approx(0)
    assert "nothing could be learned" in summary(report)


def test_a_standard_model_is_read_without_comparison(tmp_path: Path) -> None:
    model = small_model(vocab_size=TOKENIZER.vocab_size, suffix_layers=0)
    report = read_document(Session(model, TOKENIZER), [TEXT], progress=False)
    assert report.gain is None and report.quarters is None
    assert "no fast weights" in summary(report)
    plot_reading(report, tmp_path / "p.svg")


def test_summary_and_plot(tmp_path: Path) -> None:
    report = report_of(name="ships_$x$.txt")
    text = summary(report)
    assert f"{report.gain:+.4f}" in text and "first 10 %" in text and "last 10 %" in text
    plot_reading(report, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    plot_reading(report_of("Hi"), tmp_path / "short.pdf")
    plot_reading(report_of(name=os.fsdecode(b"caf\xe9.txt")), tmp_path / "latin.png")
    with pytest.raises(UserError, match=r"\.png"):
        plot_reading(report, tmp_path / "p.docx")
    with pytest.raises(UserError, match="folder"):
        plot_reading(report, tmp_path)


@pytest.mark.parametrize("columns", [38, 47, 48, 67, 68, 80, 120])
def test_the_table_fits_a_narrow_terminal(columns: int) -> None:
    report = report_of()
    lines = summary(report, columns).splitlines()
    table = lines[lines.index("") + 1 : -3]  # the rest is sentences
    assert max(map(len, table)) <= columns
    (whole,) = (line for line in table if line.startswith("whole text"))
    assert whole.split()[2:5] == [f"{report.loss_without:.4f}", f"{report.loss:.4f}", f"{report.gain:+.4f}"]
    assert whole.endswith("%") == (columns >= 48)
    assert any("▁" in line or "█" in line for line in table)


def test_sparkline() -> None:
    assert sparkline([0.0, 1.0, 2.0]).startswith("▁▅█") or sparkline([0.0, 1.0, 2.0]).startswith("▁▄█")
    assert sparkline([]) == ""


# -- saving while reading --------------------------------------------------------------------------------


class Killed(BaseException):
    """As if the process ended here."""


def but_times(report: ReadingReport) -> dict:
    times = {"seconds", "learning_seconds", "tokens_per_second"}
    return {name: value for name, value in asdict(report).items() if name not in times}


def read_saving(path: Path, text: str = TEXT, killed_at: int | None = None, **options: object) -> ReadingReport:
    """Read with a save after every chunk; at chunk number `killed_at` the process ends, so to speak."""
    session = options.pop("session", None) or Session(MODEL, TOKENIZER, learn=bool(options.pop("learn", True)))
    with pytest.MonkeyPatch.context() as patch:
        reads, read_chunks = iter(range(10**6)), Session.read_chunks

        def killed_chunks(self: Session, tokens: np.ndarray) -> Iterator[np.ndarray]:
            if self is session and next(reads) == killed_at:
                raise Killed
            return read_chunks(self, tokens)

        patch.setattr(Session, "read_chunks", killed_chunks)
        settings = {"progress": False, "save": path, "save_every": 0.0, **options}
        return read_document(session, [text], **settings)  # type: ignore[arg-type]


@given(
    kills=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    baseline=st.booleans(),
    before=st.sampled_from(["", "Hi", TEXT[:200]]),
)
@settings(max_examples=6, deadline=None)
def test_killed_and_run_again_it_comes_to_the_same_end(
    tmp_path_factory: pytest.TempPathFactory, kills: list[int], baseline: bool, before: str
) -> None:
    folder, text = tmp_path_factory.mktemp("s"), TEXT[:900]

    def session() -> Session:
        session = Session(MODEL, TOKENIZER)
        session.read(before)
        return session

    expected = read_saving(folder / "whole", text, session=session(), baseline=baseline)
    for kill in kills:
        with pytest.raises(Killed):
            read_saving(folder / "s", text, killed_at=kill, session=session(), baseline=baseline)
            raise Killed  # it was finished before
    report = read_saving(folder / "s", text, session=session(), baseline=baseline)
    assert but_times(report) == but_times(expected)
    assert (folder / "s").read_bytes() == (folder / "whole").read_bytes()
    assert "unfinished" not in session_facts(folder / "s")


def test_a_session_that_continues_in_its_own_file_can_be_resumed(tmp_path: Path) -> None:
    for name in ("whole", "s"):
        session = Session(MODEL, TOKENIZER)
        session.read(TEXT[:300])
        session.save(tmp_path / name)

    def read_on(name: str, killed_at: int | None = None) -> ReadingReport:
        return read_saving(
            tmp_path / name, session=Session.load(tmp_path / name, MODEL, TOKENIZER), killed_at=killed_at
        )

    expected = read_on("whole")
    for kill in (4, 3):
        with pytest.raises(Killed):
            read_on("s", kill)
    assert but_times(read_on("s")) == but_times(expected)
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()


def test_ctrl_c_and_the_same_command_again(tmp_path: Path) -> None:
    text = TEXT * 12

    def chunks() -> Iterator[str]:
        yield text[:40000]
        os.kill(os.getpid(), signal.SIGINT)
        yield text[40000:]

    def read(name: str, text: Iterator[str]) -> ReadingReport:
        session = Session(model, TOKENIZER)
        return read_document(session, text, progress=False, save=tmp_path / name)

    model = small_model(vocab_size=TOKENIZER.vocab_size, mini_batch_size=64, sliding_window=64)
    expected = read("whole", iter([text]))
    stopped = read("s", chunks())
    assert stopped.interrupted and stopped.tokens < expected.tokens
    facts = session_facts(tmp_path / "s")
    assert facts["unfinished"]["tokens"] == stopped.tokens
    assert Session.load(tmp_path / "s", model, TOKENIZER).position == facts["position"]  # a session like any other
    assert but_times(read("s", iter([text]))) == but_times(expected)
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()


def test_ctrl_c_while_pending_tokens_are_scored_is_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Session.score_pending

    def score_pending(self: Session) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGINT)
        return plain(self)

    expected = read_saving(tmp_path / "expected.session", baseline=False)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "score_pending", score_pending)
        report = read_saving(tmp_path / "s.session", baseline=False)
    assert not report.interrupted and report.tokens == expected.tokens
    assert (tmp_path / "s.session").read_bytes() == (tmp_path / "expected.session").read_bytes()


def test_an_unfinished_reading_is_resumed_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(Killed):
        read_saving(path, killed_at=6)
    assert session_facts(path)["unfinished"]["name"] == "text"
    kept = path.read_bytes()
    other = Session(MODEL, TOKENIZER)
    other.read("Something else.")
    cases = [
        ("does not begin with the", {"text": "A" + TEXT}),
        ("does not begin with the", {"text": TEXT[:300]}),
        ("does not begin with the", {"text": TEXT[:300] + "x" + TEXT[301:]}),
        ("--no-baseline", {"baseline": False}),
        ("--no-learning", {"learn": False}),
        ("--session", {"session": other}),
        ("--dtype", {"session": Session(MODEL, TOKENIZER, dtype=torch.bfloat16)}),
        ("another model", {"session": Session(small_model(**SHAPE | {"inner_loop__lr": 0.2}), TOKENIZER)}),
    ]
    for match, options in cases:
        with pytest.raises(UserError, match=match):
            read_saving(path, **options)  # type: ignore[arg-type]
        assert path.read_bytes() == kept
    longer = TEXT + TEXT  # it begins with what was read, and that is all that matters
    expected = read_saving(tmp_path / "whole", longer)
    assert but_times(read_saving(path, longer)) == but_times(expected)


def test_a_finished_session_is_overwritten(tmp_path: Path) -> None:
    expected = read_saving(tmp_path / "s")
    assert but_times(read_saving(tmp_path / "s")) == but_times(expected)
    read_saving(tmp_path / "s", "Another text.")
    assert session_facts(tmp_path / "s")["text_bytes"] == len("Another text.")


def test_divergence_after_a_save_leaves_a_finished_session(tmp_path: Path) -> None:
    model = small_model(vocab_size=TOKENIZER.vocab_size, inner_loop__lr=1e30)
    report = read_saving(tmp_path / "s", session=Session(model, TOKENIZER))
    assert report.diverged is not None
    assert session_facts(tmp_path / "s")["position"] == 0 and "unfinished" not in session_facts(tmp_path / "s")


def test_a_full_disk_while_reading_does_not_end_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, save = iter(range(1000)), session_files.save_safetensors

    def full_at_first(*arguments: object) -> None:
        if next(calls) < 2:
            raise OSError(28, "No space left on device")
        save(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(session_files, "save_safetensors", full_at_first)
    with pytest.warns(UserWarning, match="continues, but could not be saved: No space left"):
        report = read_saving(tmp_path / "s")
    assert report.tokens == len(TOKENIZER.encode(TEXT)) and (tmp_path / "s").exists()


def test_stale_parts_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    for name in (".s.123.part", ".other.123.part"):
        (tmp_path / name).write_bytes(b"half")
    read_saving(tmp_path / "s")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".other.123.part", "s"]


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_save_every_rejects_negative_and_nan(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(UserError, match="seconds"):
        read_saving(tmp_path / "s", save_every=seconds)
