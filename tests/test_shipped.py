"""The model that ships in the package, on a text of ours that was in no training."""

from pathlib import Path

import pytest

import ttt_e2e
from ttt_e2e import evaluate_documents, load_model
from ttt_e2e.data.text import Document

TEXT = Path(__file__).parent / "texts/lighthouse.txt"


def test_shipped_model_is_small_and_whole() -> None:
    folder = Path(ttt_e2e.__file__).parent / "shipped"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 20_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "MODEL_CARD.md"} <= {f.name for f in folder.iterdir()}
    model, tokenizer = load_model()
    assert model.config.suffix_layers > 0
    assert tokenizer.vocab_size == model.config.vocab_size


def test_shipped_model_learns_while_it_reads() -> None:
    """Lower loss with learning, and the more so the more it has read; losses as measured when the text was written."""
    model, tokenizer = load_model()
    text = Document("lighthouse", TEXT.read_text())
    document = evaluate_documents(model, tokenizer, [text], progress=False).documents[0]
    assert document.tokens == 2290
    assert document.loss == pytest.approx(2.9080, abs=1e-3)
    assert document.loss_without == pytest.approx(3.7126, abs=1e-3)
    assert document.gain is not None and document.first_quarter is not None and document.last_quarter is not None
    assert document.gain == pytest.approx(0.8046, abs=1e-3)
    assert document.first_quarter == pytest.approx(0.325, abs=2e-3)
    assert document.last_quarter == pytest.approx(1.067, abs=2e-3)
