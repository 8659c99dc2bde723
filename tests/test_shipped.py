"""The model that ships in the package."""

from pathlib import Path

import pytest
import torch

from ttt_e2e.data.text import standard_library_document
from ttt_e2e.evaluation.documents import evaluate
from ttt_e2e.inference.session import load_reader, shipped_model


def test_it_is_small_and_whole() -> None:
    folder: Path = shipped_model()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 20_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "MODEL_CARD.md"} <= {f.name for f in folder.iterdir()}
    model, tokenizer = load_reader(None, torch.device("cpu"))
    assert model.config.suffix_layers > 0
    assert tokenizer.vocab_size == model.config.vocab_size


def test_it_learns_while_it_reads() -> None:
    """On code it was not trained on: lower loss with learning, and lower still later in the text."""
    model, tokenizer = load_reader(None, torch.device("cpu"))
    report = evaluate(model, tokenizer, [standard_library_document("asyncio")], max_tokens=12_000, progress=False)
    document = report.documents[0]
    assert document.gain is not None and document.gain > 0.05
    # As measured when it was shipped, in float32 on Python 3.11.7; another patch release has a slightly other text.
    assert document.loss == pytest.approx(1.952, abs=0.03)
    assert document.loss_without == pytest.approx(2.804, abs=0.03)
    assert document.last_quarter is not None and document.first_quarter is not None
    assert document.last_quarter > document.first_quarter
    assert document.loss == pytest.approx(report.loss)
