"""What single families have that others do not; `test_from_hf` compares the logits of all of them."""

from pathlib import Path

import pytest
import torch
from hf_helpers import SHAPE, Pretrained, with_tokenizer

from ttt_e2e.convert.calibration import TEXT
from ttt_e2e.convert.from_hf import convert_from_hf
from ttt_e2e.convert.learning import LearningOptions
from ttt_e2e.data.text import read_text
from ttt_e2e.data.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="transformers, which writes the checkpoints, is missing")


# -- Granite -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("residual", "dtype", "tied"), [(0.25, "bfloat16", True), (0.25, "bfloat16", False), (0.22, "float32", True)]
)
def test_multipliers_keep_bfloat16_and_the_tied_head_where_they_can(
    tmp_path: Path, residual: float, dtype: str, tied: bool
) -> None:
    """A power of two does not round a weight; a head that gets another factor than the embedding is not tied."""
    config = transformers.GraniteConfig(
        **{**SHAPE, "num_hidden_layers": 1, "num_attention_heads": 2},  # heads of 16: queries get a factor of 8
        attention_multiplier=2.0,
        embedding_multiplier=8.0,
        residual_multiplier=residual,
        logits_scaling=0.125 if tied else 4.0,
        tie_word_embeddings=True,
    )
    transformers.GraniteForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    done = convert_from_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert (done.dtype, done.config.tie_word_embeddings) == (dtype, tied)


# -- Phi-3 -------------------------------------------------------------------------------------------------------------


def test_sinks_beside_short_factors_are_measured_in_the_original_context(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    """A longer text would be read by transformers with the long factors, by which this model does not go."""
    theirs, folder = pretrained("phi3, short longrope")  # of a context of 60 tokens
    done = convert_from_hf(with_tokenizer(folder), tmp_path / "out", LearningOptions(12, mini_batch_size=5))
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    ids = torch.tensor([tokenizer.bos, *tokenizer.encode(read_text(TEXT)[:100])])[:61]
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(theirs(ids[None, :-1]).logits[0, 12:], ids[13:])
    assert done.sink_losses is not None
    assert done.sink_losses.full_attention == pytest.approx(float(expected), abs=1e-5)
