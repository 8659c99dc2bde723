"""Model folders that are ready to read with."""

from pathlib import Path

import pytest
from inference_helpers import TEXT

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.load import load_model
from ttt_e2e.model.transformer import Transformer


def test_load_model_checks_folder_and_tokenizer(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    from ttt_e2e.model.checkpoint import save_model

    tokenizer.save(tmp_path / "t.json")
    Tokenizer.train([TEXT], 270).save(tmp_path / "other.json")
    save_model(model, tmp_path / "good", tmp_path / "t.json")
    save_model(model, tmp_path / "mismatched", tmp_path / "other.json")
    save_model(model, tmp_path / "without", None)
    loaded, _ = load_model(tmp_path / "good")
    assert not any(weight.requires_grad for weight in loaded.parameters())
    for name, match in (
        ("mismatched", "vocabulary"),
        ("without", "no tokenizer"),
        ("nowhere", "no model folder"),
    ):
        with pytest.raises(UserError, match=match):
            load_model(tmp_path / name)
