"""What single families have that others do not; `test_from_hf` compares the logits of all of them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import SHAPE, TOKENS, Pretrained, tokens, with_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from ttt_e2e.config.schema import replace
from ttt_e2e.convert.calibration import TEXT
from ttt_e2e.convert.from_hf import convert_from_hf
from ttt_e2e.convert.learning import LearningOptions
from ttt_e2e.data.text import read_text
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.inference.streaming import forward, start_reading
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.checkpoint import load_transformer
from ttt_e2e.model.transformer import Transformer

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


# -- Gemma -------------------------------------------------------------------------------------------------------------


def test_norms_of_gemma_stay_exact_beside_matrices_in_bfloat16(pretrained: Pretrained, tmp_path: Path) -> None:
    """1 + weight is what transformers computes in float32; the scale of the embedding is rounded as there."""
    theirs, folder = pretrained("gemma3, windows in some layers")
    theirs = type(theirs).from_pretrained(folder, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "checkpoint")
    done = convert_from_hf(tmp_path / "checkpoint", tmp_path / "out", LearningOptions(24, mini_batch_size=5))
    stored, model = load_file(tmp_path / "out/model.safetensors"), load_transformer(tmp_path / "out")
    assert done.dtype == "bfloat16" and {weight.dtype for weight in stored.values()} == {torch.bfloat16, torch.float32}
    assert all((weight.dtype == torch.float32) == ("norm" in name) for name, weight in stored.items())
    layer = theirs.model.layers[1]
    assert torch.equal(model.blocks[1].mlp_norm.weight, 1 + layer.pre_feedforward_layernorm.weight.float())
    scale = (12 / 20) ** 0.5  # of the width of a head and query_pre_attn_scalar
    assert torch.equal(model.blocks[1].mixer.q_norm, scale * (1 + layer.self_attn.q_norm.weight.float()))
    assert torch.equal(model.blocks[1].mixer.w_out, layer.self_attn.o_proj.weight.float())
    assert torch.equal(model.embed(tokens(), torch.bfloat16), theirs.model.embed_tokens(tokens()))
    assert float(torch.tensor(32**0.5, dtype=torch.bfloat16)) != pytest.approx(32**0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "setting", "other"),
    [
        ("gemma2, biases, sliding window", "attn_logit_softcapping", None),
        ("gemma2, biases, sliding window", "final_logit_softcapping", None),
        ("gemma2, biases, sliding window", "embedding_multiplier", 1.0),
        ("gemma2, biases, sliding window", "hidden_act", "silu"),
        ("gemma3, sliding window", "rope_local_pattern", (False,)),
        ("olmo3, windows in some layers", "rope_local_base_freq", 1000.0),
    ],
)
def test_logits_depend_on_every_setting(
    pretrained: Pretrained, tmp_path: Path, name: str, setting: str, other: Any
) -> None:
    theirs, folder = pretrained(name)
    convert_from_hf(folder, tmp_path / "out", LearningOptions(24, mini_batch_size=5))
    model = load_transformer(tmp_path / "out")
    assert getattr(model.config, setting) != other
    changed = Transformer(replace(model.config, {setting: other}))
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = theirs(tokens(24)).logits
        logits = forward(changed, start_reading(changed, 2), tokens(24))[0]
    assert (logits - expected).abs().max() > 1e-2


@pytest.fixture(scope="module")
def with_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A small Gemma 3 that also sees images, and its checkpoint."""
    text = {**SHAPE, "head_dim": 8, "sliding_window": 24, **TOKENS}
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision | {"patch_size": 14})
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(folder := tmp_path_factory.mktemp("images"))
    return model, folder


@pytest.mark.parametrize("newer", [False, True])
def test_gemma_3_without_its_images(with_images: tuple[Any, Path], tmp_path: Path, newer: bool) -> None:
    """The names of tensors are those of the published files, or those of the model's own."""
    theirs, folder = with_images
    folder = Path(shutil.copytree(folder, tmp_path / "checkpoint"))
    if newer:
        weights = {name: weight.clone() for name, weight in theirs.state_dict().items() if name != "lm_head.weight"}
        save_file(weights, folder / "model.safetensors")
    names = load_file(folder / "model.safetensors").keys()
    assert ("model.language_model.norm.weight" in names) == newer and any("vision_tower" in name for name in names)
    done = convert_from_hf(folder, tmp_path / "out", LearningOptions(24, mini_batch_size=5))
    assert done.family == "gemma3_text"
    model = load_transformer(tmp_path / "out")
    with torch.no_grad():
        expected = theirs(tokens(24)).logits
    assert (forward(model, start_reading(model, 2), tokens(24))[0] - expected).abs().max() < 1e-4


# -- windows in some layers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [24, 12])
@pytest.mark.parametrize(
    "name", [f"{family}, windows in some layers" for family in ("qwen3", "gemma2", "gemma3", "olmo3")]
)
def test_layers_keep_the_window_that_they_were_trained_with(
    pretrained: Pretrained, tmp_path: Path, name: str, window: int
) -> None:
    """Some of four layers have one of 24. As long as it stays theirs, their sinks weigh nothing."""
    theirs, folder = pretrained(name)
    done = convert_from_hf(with_tokenizer(folder), tmp_path / "out", LearningOptions(window, mini_batch_size=4))
    model, ids = load_transformer(tmp_path / "out"), calibration_ids(folder, 128)
    assert done.sink_losses is not None
    assert done.sink_losses.full_attention == pytest.approx(loss_past(theirs, ids, window), abs=1e-5)
    with_sink = float(sequence_loss(model, ids, learn=False).nll_BT[0, window:].mean())
    assert done.sink_losses.with_sink == pytest.approx(with_sink, abs=1e-5)
    for i, block in enumerate(model.blocks):
        is_off = theirs.config.layer_types[i] == "sliding_attention" and window == 24
        assert (block.mixer.sink_logit < -1000).all() == is_off and block.mixer.sink_value.any() != is_off
        if is_off:
            with torch.no_grad():
                block.mixer.sink_value.fill_(1e3)
    assert float(sequence_loss(model, ids, learn=False).nll_BT[0, window:].mean()) == with_sink
