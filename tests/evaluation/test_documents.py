"""Whole documents read at once give what a session gives for each alone."""

import json

import numpy as np
import pytest
import torch
from helpers import small_model

from ttt_e2e.data.text import Document
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation.documents import evaluate_documents, format_report
from ttt_e2e.inference.divergence import Diverged
from ttt_e2e.inference.session import Session

TEXT = "".join(f"Day {i}: the wind came from {'north' if i % 3 else 'the sea'}.\n" for i in range(60))
TOKENIZER = Tokenizer.train([TEXT], 290)
MODEL = small_model(vocab_size=TOKENIZER.vocab_size, inner_loop__lr=0.1).eval().requires_grad_(False)
DOCUMENTS = [Document(f"d{i}", TEXT[: 20 + 160 * i] * (1 + i % 2)) for i in (3, 0, 1, 4, 2)]


def alone(document: Document, learn: bool) -> np.ndarray:
    session = Session(MODEL, TOKENIZER, learn=learn)
    return np.concatenate((session.read(document.text), session.score_pending()))


@pytest.mark.parametrize("pattern", ["window", "full", "mamba2,window", "titans,window"])
def test_evaluation_in_float64_is_that_in_float32(pattern: str) -> None:
    settings = {"pattern": tuple(pattern.split(",")), "inner_loop__lr": 0.1, "mini_batch_size": 4}
    model = small_model(vocab_size=TOKENIZER.vocab_size, **settings)
    one, other = (
        evaluate_documents(model, TOKENIZER, DOCUMENTS[:2], dtype=dtype, max_tokens=40, progress=False)
        for dtype in (torch.float32, torch.float64)
    )
    assert one.loss == pytest.approx(other.loss, abs=1e-4) and one.loss != other.loss


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_evaluation_equals_sessions_alone(batch: int) -> None:
    report = evaluate_documents(MODEL, TOKENIZER, DOCUMENTS, batch=batch, progress=False)
    assert [result.name for result in report.documents] == [document.name for document in DOCUMENTS]
    gains = []
    for result, document in zip(report.documents, DOCUMENTS, strict=True):
        learned, frozen = alone(document, True), alone(document, False)
        assert (result.tokens, result.bytes) == (len(learned), len(document.text.encode()))
        assert result.loss == pytest.approx(learned.mean(), abs=1e-5)
        assert result.loss_without == pytest.approx(frozen.mean(), abs=1e-5)
        quarter = len(learned) // 4
        expected = (frozen - learned)[-quarter:].mean() if quarter else None
        assert result.last_quarter == pytest.approx(expected, abs=1e-5)
        expected = (frozen - learned)[:quarter].mean() if quarter else None
        assert result.first_quarter == pytest.approx(expected, abs=1e-5)
        for bits, losses in ((result.bits_per_byte, learned), (result.bits_per_byte_without, frozen)):
            assert bits == pytest.approx(losses.sum() / np.log(2) / result.bytes, rel=1e-5)
        gains.append((frozen - learned).mean())
    assert report.gain == pytest.approx(np.mean(gains), abs=1e-5)
    assert report.gain_error == pytest.approx(np.std(gains, ddof=1) / len(gains) ** 0.5, abs=1e-5)
    first = report.positions[0]
    assert (first.start, first.stop) == (0, 5)
    assert first.documents == len(DOCUMENTS)
    expected = np.mean([alone(document, False)[:5].mean() for document in DOCUMENTS])
    assert first.loss_without == pytest.approx(expected, abs=1e-5)
    assert [bin_.stop for bin_ in report.positions[:3]] == [5, 10, 20]
    read = [(alone(document, True), alone(document, False)) for document in DOCUMENTS]
    for bin_ in report.positions:
        reaching = [(a[bin_.start : bin_.stop], b[bin_.start : bin_.stop]) for a, b in read if len(a) >= bin_.stop]
        assert bin_.documents == len(reaching)
        means = [np.mean([part.mean() for part in parts]) for parts in zip(*reaching, strict=True)]
        assert (bin_.loss, bin_.loss_without) == pytest.approx(means, abs=1e-5)


def test_max_tokens_limits_each_document() -> None:
    report = evaluate_documents(MODEL, TOKENIZER, DOCUMENTS[:2], max_tokens=33, progress=False)
    assert all(result.tokens <= 33 for result in report.documents)
    assert report.documents[0].loss == pytest.approx(alone(DOCUMENTS[0], True)[:33].mean(), abs=1e-5)


def test_standard_model_has_no_gain() -> None:
    model = small_model(vocab_size=TOKENIZER.vocab_size, suffix_layers=0)
    report = evaluate_documents(model, TOKENIZER, DOCUMENTS, progress=False)
    assert report.gain is None and report.documents[0].loss_without is None
    assert "mean over documents" in format_report(report)


def test_report_as_table_and_json() -> None:
    report = evaluate_documents(MODEL, TOKENIZER, DOCUMENTS, progress=False)
    lines = format_report(report).splitlines()
    assert sum(line.startswith("d") for line in lines) == 1 + len(DOCUMENTS)  # with the head, "document"
    assert f"± {report.gain_error:.4f}" in format_report(report)
    json.dumps(report.to_dict(), allow_nan=False)


def test_no_documents_and_invalid_batch_are_rejected() -> None:
    with pytest.raises(UserError, match="no documents"):
        evaluate_documents(MODEL, TOKENIZER, [], progress=False)
    with pytest.raises(UserError, match="at least 1"):
        evaluate_documents(MODEL, TOKENIZER, DOCUMENTS, batch=0, progress=False)


def test_divergence_names_the_document() -> None:
    model = small_model(vocab_size=TOKENIZER.vocab_size, inner_loop__lr=1e30)
    with pytest.raises(Diverged, match=r"the loss at tokens 5 to 10 of d3 is .*--max-tokens"):
        evaluate_documents(model, TOKENIZER, DOCUMENTS, progress=False)
