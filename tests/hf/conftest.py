"""Fixtures: a model folder, and the same written for the transformers library."""

from pathlib import Path

import pytest
from helpers import small_model
from transformers_helpers import TEXT

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.model.checkpoint import save_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer."""
    where = tmp_path_factory.mktemp("ours")
    tokenizer = Tokenizer.train([TEXT], 300)
    tokenizer.save(where / "tokenizer.json")
    model = small_model(vocab_size=tokenizer.vocab_size, inner_loop__lr=0.3, inner_loop__learned_lr=True)
    save_model(model, where / "model", where / "tokenizer.json")
    return where / "model"


@pytest.fixture(scope="session")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ttt_e2e.hf.export import convert_to_hf

    out = tmp_path_factory.mktemp("theirs") / "model"
    convert_to_hf(folder, out)
    return out
