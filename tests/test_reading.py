"""Reading a document beside its frozen twin: the curve, the report, the summary and the picture."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.compiled import compiled_steps
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inner_loop import sequence_loss
from ttt_e2e.picture import reading_picture
from ttt_e2e.reading import BINS, Curve, ReadingReport, read_document, sparkline, summary
from ttt_e2e.session import Session

TEXT = "".join(f"The {i}th ship of {i * 7 % 13} sailed east, and the sea was calm.\n" for i in range(45))
TOKENIZER = Tokenizer.train([TEXT], 290)
TRAINABLE = small_model(vocab_size=TOKENIZER.vocab_size, inner_lr=0.1)
MODEL = small_model(vocab_size=TOKENIZER.vocab_size, inner_lr=0.1).eval().requires_grad_(False)


def report_of(text: str = TEXT, **options: object) -> ReadingReport:
    return read_document(Session(MODEL, TOKENIZER), [text], progress=False, **options)  # type: ignore[arg-type]


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), bins=st.sampled_from([2, 4, 16]))
@settings(deadline=None)
def test_a_curve_keeps_sums_and_means(sizes: list[int], bins: int) -> None:
    losses = np.random.default_rng(0).random(sum(sizes)).astype(np.float32)
    curve = Curve(bins)
    for piece in np.split(losses, np.cumsum(sizes)[:-1]):
        curve.add(piece)
    assert curve.tokens == len(losses) <= curve.width * bins
    assert curve.total() == pytest.approx(losses.sum(), abs=1e-4)
    for start in range(0, len(losses), curve.width):
        stop = min(start + curve.width, len(losses))
        assert curve.mean(start, stop) == pytest.approx(losses[start:stop].mean(), abs=1e-5)


def test_the_report_holds_the_losses_of_sequence_loss() -> None:
    report = report_of()
    tokens = torch.tensor([[TOKENIZER.bos, *TOKENIZER.encode(TEXT)]])
    learned = sequence_loss(TRAINABLE, tokens).nll_BT[0].detach()
    frozen = sequence_loss(MODEL, tokens, inner_lr=0).nll_BT[0]
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


def test_any_split_gives_the_same_report() -> None:
    whole = report_of()
    split = read_document(Session(MODEL, TOKENIZER), (c for c in TEXT), progress=False)
    assert (whole.loss, whole.loss_without, whole.curve) == (split.loss, split.loss_without, split.curve)


def test_compiled_it_is_the_same_report(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("ttt_e2e.session.compiled_steps", lambda device: compiled_steps(device, "aot_eager"))
    compiled = read_document(Session(MODEL, TOKENIZER, compile=True), [TEXT], progress=False)
    plain = report_of()
    assert compiled.loss_without == plain.loss_without  # the twin is not compiled
    assert [part.loss for part in compiled.curve] == pytest.approx([part.loss for part in plain.curve], abs=1e-4)


def test_a_session_goes_on_with_another_text() -> None:
    session = Session(MODEL, TOKENIZER)
    half = len(TEXT) // 2
    read_document(session, [TEXT[:half]], progress=False, baseline=False)
    report = read_document(session, [TEXT[half:]], progress=False)
    assert report.tokens == len(TOKENIZER.encode(TEXT[half:]))
    assert report.gain is not None


def test_ctrl_c_stops_at_a_mini_batch_and_reports() -> None:
    def pieces() -> Iterator[str]:
        yield TEXT * 12  # a segment and more
        os.kill(os.getpid(), signal.SIGINT)
        yield TEXT

    model = small_model(vocab_size=TOKENIZER.vocab_size, mini_batch=64, window=64)
    session = Session(model, TOKENIZER)
    before = signal.getsignal(signal.SIGINT)
    report = read_document(session, pieces(), progress=False)
    assert report.interrupted and report.gain is not None
    assert 0 < report.tokens < 12 * len(TOKENIZER.encode(TEXT))
    assert session.position + session.pending == report.tokens
    assert signal.getsignal(signal.SIGINT) == before


def test_learning_that_diverges_is_reported_and_the_session_is_sound() -> None:
    model = small_model(vocab_size=TOKENIZER.vocab_size, inner_lr=1e30)
    session = Session(model, TOKENIZER)
    report = read_document(session, [TEXT], progress=False)
    assert report.diverged is not None and "diverged" in report.diverged
    assert session.position == 0 and report.tokens == 5
    assert list(session.generate_tokens(max_tokens=3)) is not None


def test_short_texts() -> None:
    report = report_of("Hi")
    assert report.tokens == len(TOKENIZER.encode("Hi")) and report.gain == pytest.approx(0)
    assert "nothing could be learned" in summary(report)


def test_a_standard_model_is_read_without_comparison(tmp_path: Path) -> None:
    model = small_model(vocab_size=TOKENIZER.vocab_size, suffix_layers=0)
    report = read_document(Session(model, TOKENIZER), [TEXT], progress=False)
    assert report.gain is None and report.quarters is None
    assert "no fast weights" in summary(report)
    reading_picture(report, tmp_path / "p.svg")


def test_summary_and_picture(tmp_path: Path) -> None:
    report = report_of(name="ships_$x$.txt")
    text = summary(report)
    assert f"{report.gain:+.4f}" in text and "first 10 %" in text and "last 10 %" in text
    reading_picture(report, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    reading_picture(report_of("Hi"), tmp_path / "short.pdf")
    with pytest.raises(UserError, match=r"\.png"):
        reading_picture(report, tmp_path / "p.docx")
    with pytest.raises(UserError, match="folder"):
        reading_picture(report, tmp_path)


def test_sparkline() -> None:
    assert sparkline([0.0, 1.0, 2.0]).startswith("▁▅█") or sparkline([0.0, 1.0, 2.0]).startswith("▁▄█")
    assert sparkline([]) == ""
