"""What single families have that others do not; `test_from_hf` compares the logits of all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import SHAPE, Pretrained, with_tokenizer
from torch import Tensor

from ttt_e2e.convert.calibration import TEXT
from ttt_e2e.convert.from_hf import convert_from_hf
from ttt_e2e.convert.learning import LearningOptions
from ttt_e2e.data.text import read_text
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.checkpoint import load_transformer

transformers = pytest.importorskip("transformers", reason="transformers, which writes the checkpoints, is missing")


def calibration_ids(folder: Path, length: int) -> Tensor:
    """The first tokens of the calibration text, [1, length + 1]."""
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    ids = [tokenizer.bos, *tokenizer.encode(read_text(TEXT)[: 2 * length])]
    return torch.tensor([ids[: length + 1]])


@torch.no_grad()
def loss_past(theirs: Any, ids: Tensor, window: int) -> float:
    """Mean loss in transformers, after as many tokens as a window has."""
    logits = theirs(ids[:, :-1]).logits
    return float(torch.nn.functional.cross_entropy(logits[0, window:], ids[0, window + 1 :]))


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
    assert done.sink_losses is not None
    expected = loss_past(theirs, calibration_ids(folder, 60), 12)
    assert done.sink_losses.full_attention == pytest.approx(expected, abs=1e-5)


# -- windows in some layers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [24, 12])
def test_layers_keep_the_window_that_they_were_trained_with(
    pretrained: Pretrained, tmp_path: Path, window: int
) -> None:
    """The last two of four layers have one of 24. As long as it stays theirs, their sinks weigh nothing."""
    theirs, folder = pretrained("qwen3, windows in some layers")
    done = convert_from_hf(with_tokenizer(folder), tmp_path / "out", LearningOptions(window, mini_batch_size=4))
    model, ids = load_transformer(tmp_path / "out"), calibration_ids(folder, 128)
    assert done.sink_losses is not None
    assert done.sink_losses.full_attention == pytest.approx(loss_past(theirs, ids, window), abs=1e-5)
    with_sink = float(sequence_loss(model, ids, learn=False).nll_BT[0, window:].mean())
    assert done.sink_losses.with_sink == pytest.approx(with_sink, abs=1e-5)
    for i, block in enumerate(model.blocks):
        is_off = i >= 2 and window == 24
        assert (block.mixer.sink_logit < -1000).all() == is_off and block.mixer.sink_value.any() != is_off
        if is_off:
            with torch.no_grad():
                block.mixer.sink_value.fill_(1e3)
    assert float(sequence_loss(model, ids, learn=False).nll_BT[0, window:].mean()) == with_sink
