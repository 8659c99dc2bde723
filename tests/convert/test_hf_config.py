"""Configurations of Hugging Face: rotary positions, windows, and what cannot be converted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import LLAMA3, LONGROPE, SHAPE, YARN, Pretrained, change_config, convert

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.convert.from_hf import convert_from_hf
from ttt_e2e.convert.hf_config import read_source
from ttt_e2e.convert.learning import LearningOptions
from ttt_e2e.errors import UserError
from ttt_e2e.model.checkpoint import load_config
from ttt_e2e.model.rope import frequencies

transformers = pytest.importorskip("transformers", reason="transformers, which writes the checkpoints, is missing")


def rope_config(head_dim: int, rope: dict[str, Any], limit: int) -> tuple[Any, ModelConfig]:
    config = transformers.LlamaConfig(
        **{**SHAPE, "head_dim": head_dim, "max_position_embeddings": limit, "rope_parameters": dict(rope)}
    )
    written = json.loads(config.to_json_string())
    return config, ModelConfig(**read_source(written, Path("config.json")).settings)


@pytest.mark.parametrize(
    ("head_dim", "limit", "rope"),
    [
        (128, 131_072, LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 8192}),
        (64, 131_072, LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 8192, "factor": 32.0}),
        (128, 32_768, YARN | {"rope_theta": 1e6, "original_max_position_embeddings": 32_768, "beta_fast": None}),
        (64, 4096, YARN | {"factor": 16.0, "mscale": 1.0, "mscale_all_dim": 0.707}),
        (32, 4096, YARN | {"factor": 16.0, "beta_fast": 32.0, "beta_slow": 31.9}),
        (64, 16_384, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
        (64, 2048, {"rope_type": "default", "rope_theta": 1e4}),
    ],
)
def test_rope_frequencies_are_those_of_transformers(head_dim: int, limit: int, rope: dict[str, Any]) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs, ours = rope_config(head_dim, {k: v for k, v in rope.items() if v is not None}, limit)
    module = LlamaRotaryEmbedding(theirs)
    torch.testing.assert_close(frequencies(ours, "cpu"), module.inv_freq.double(), rtol=2e-6, atol=0)
    assert ours.rope_scaling.attention_factor == pytest.approx(module.attention_scaling, rel=1e-12)


def test_read_source_understands_older_configurations(pretrained: Pretrained, tmp_path: Path) -> None:
    """As transformers wrote them before version 5: `rope_theta` beside `rope_scaling`, its kind called `type` once."""
    new = json.loads((pretrained("llama, tied, llama3")[1] / "config.json").read_text())
    expected = read_source(new, tmp_path)
    rope = new.pop("rope_parameters")
    old = {**new, "rope_theta": rope.pop("rope_theta")}
    assert read_source({**old, "rope_scaling": rope}, tmp_path) == expected
    rope["type"] = rope.pop("rope_type")
    assert read_source({**old, "rope_scaling": rope}, tmp_path) == expected
    plain = read_source({**old, "rope_scaling": None}, tmp_path)
    assert "rope_scaling" not in plain.settings and plain.settings["rope_theta"] == 500


@pytest.mark.parametrize(
    ("name", "changes", "window"),
    [
        ("gemma2, windows in some layers", {"layer_types": None}, 24),
        ("gemma3, capped logits", {}, 128),
        ("llama", {}, 128),
        ("llama", {"max_position_embeddings": 131_072}, 8192),
        ("qwen2, yarn, sharded", {}, 128),
        ("qwen2, yarn, sharded", {"max_position_embeddings": 32}, 128),  # as Qwen's own writes it: the factor counts
        ("llama, dynamic", {}, 128),
        ("mistral, sliding window", {}, 24),
        ("mistral, wide heads", {}, 128),
        ("qwen3, windows in some layers", {}, 24),
        ("smollm3", {}, 128),
        (
            "qwen2, tied",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0, "layer_types": None},
            16,
        ),
        (
            "qwen2, tied",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4, "layer_types": None},
            128,
        ),
        ("qwen2, tied", {"use_sliding_window": False, "sliding_window": 16}, 128),
    ],
)
def test_default_window_is_what_the_original_can_see(
    pretrained: Pretrained, tmp_path: Path, name: str, changes: dict[str, Any], window: int
) -> None:
    folder = Path(shutil.copytree(pretrained(name)[1], tmp_path / "checkpoint"))
    change_config(folder, **changes)
    config = convert_from_hf(folder, tmp_path / "out").config
    assert (config.sliding_window, config.mini_batch_size) == (window, min(32, window))
    assert load_config(tmp_path / "out") == config
    with pytest.raises(UserError, match=rf"window of {10**6} tokens is longer than"):
        convert_from_hf(folder, tmp_path / "other", LearningOptions(sliding_window=10**6))


def test_missing_window_of_mistral_is_the_default_of_transformers(pretrained: Pretrained, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pretrained("mistral, wide heads")[1], tmp_path / "checkpoint"))
    change_config(folder, max_position_embeddings=1 << 17)
    assert convert_from_hf(folder, tmp_path / "none").config.sliding_window == 8192  # null: it sees everything
    said = json.loads((folder / "config.json").read_text())
    del said["sliding_window"]
    (folder / "config.json").write_text(json.dumps(said))
    assert convert_from_hf(folder, tmp_path / "out").config.sliding_window == 4096


@pytest.mark.parametrize(("window", "factors"), [(32, "short_factor"), (33, "long_factor")])
def test_window_decides_between_the_factors_of_longrope(
    pretrained: Pretrained, tmp_path: Path, window: int, factors: str
) -> None:
    """As transformers decides by the length of a text: here no query sees a key from farther away than the window."""
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    folder = Path(shutil.copytree(pretrained("phi3, long longrope")[1], tmp_path / "checkpoint"))
    change_config(folder, rope_parameters={k: v for k, v in LONGROPE.items() if k != "attention_factor"})
    config = convert_from_hf(folder, tmp_path / "out", LearningOptions(window, mini_batch_size=8)).config
    assert config.rope_scaling.pair_factors == tuple(LONGROPE[factors])
    module = Phi3RotaryEmbedding(transformers.AutoConfig.from_pretrained(folder))
    module(torch.zeros(1), torch.arange(window)[None])
    torch.testing.assert_close(frequencies(config, "cpu"), module.inv_freq.double(), rtol=2e-6, atol=0)
    assert config.rope_scaling.attention_factor == pytest.approx(module.attention_scaling, rel=1e-12) != 1
    assert load_config(tmp_path / "out") == config


def test_older_files_of_phi3_have_other_names_for_longrope(pretrained: Pretrained, tmp_path: Path) -> None:
    new = json.loads((pretrained("phi3, short longrope")[1] / "config.json").read_text())
    rope = new.pop("rope_parameters")
    old = {**new, "rope_theta": rope.pop("rope_theta")}
    for kind in ("longrope", "su", "yarn"):
        scaling = {"type": kind, "long_factor": rope["long_factor"], "short_factor": rope["short_factor"]}
        assert read_source({**old, "rope_scaling": scaling}, tmp_path) == read_source(
            {**new, "rope_parameters": {**rope, "rope_theta": 500.0}}, tmp_path
        )


@pytest.mark.parametrize("name", ["gemma3, windows in some layers", "olmo3, windows in some layers"])
def test_older_files_of_models_with_two_kinds_of_rotary_positions(
    pretrained: Pretrained, tmp_path: Path, name: str
) -> None:
    """As published before version 5 of transformers, with no list of layers: every third, or fourth, has no window."""
    new = json.loads((pretrained(name)[1] / "config.json").read_text())
    every = 3 if "gemma" in name else 4
    new["layer_types"] = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(4)]
    rope = new.pop("rope_parameters")
    old = {key: value for key, value in new.items() if key not in ("layer_types", "_sliding_window_pattern")}
    theta = rope["full_attention"].pop("rope_theta")
    old |= {"rope_theta": theta, "rope_scaling": rope["full_attention"]}
    local = {"rope_theta": theta}
    if "gemma" in name:
        old |= {"rope_local_base_freq": 123.0, "sliding_window_pattern": 3}
        local = {"rope_theta": 123.0, "rope_type": "default"}
    new["rope_parameters"] = {
        "full_attention": {"rope_theta": theta, **rope["full_attention"]},
        "sliding_attention": local,
    }
    found = read_source(old, tmp_path)
    assert found == read_source(new, tmp_path)
    assert found.settings["rope_local_pattern"] == tuple((i + 1) % every != 0 for i in range(4))


def test_first_files_of_gemma_call_their_activation_gelu(pretrained: Pretrained, tmp_path: Path) -> None:
    config = json.loads((pretrained("gemma, one key head")[1] / "config.json").read_text())
    assert config["hidden_act"] == "gelu_pytorch_tanh"
    assert read_source({**config, "hidden_act": "gelu"}, tmp_path) == read_source(config, tmp_path)


def test_values_that_published_gemma_3_leaves_out_are_those_of_transformers(tmp_path: Path) -> None:
    """The configuration of gemma-3-4b-it names six values of its language model."""
    text = dict(
        hidden_size=2560,
        intermediate_size=10240,
        model_type="gemma3_text",
        num_hidden_layers=34,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
        sliding_window=1024,
    )
    published = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    whole = transformers.Gemma3Config(text_config=text).to_dict()
    found = read_source(published, tmp_path)
    assert found == read_source(whole, tmp_path)
    config = ModelConfig(**found.settings)
    assert (config.head_dim, config.num_key_value_heads, config.vocab_size) == (256, 4, 262_208)
    assert config.local_rope_layers == tuple((i + 1) % 6 != 0 for i in range(34))
    assert (config.rope_theta, config.rope_scaling.factor, config.rope_local_base_freq) == (1e6, 8, 1e4)
    assert (found.max_window, config.embedding_multiplier) == (1024, 2560**0.5)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gpt2"}, r"model_type 'gpt2', which cannot be converted; Llama, Qwen2, Qwen3, Mistral, .* can"),
        ({"model_type": None}, "model_type 'nothing'"),
        ({"model_type": "ministral3"}, "it has queries that are scaled by their positions; Llama, .*, Gemma 3"),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, "hidden_activation = gelu; only gelu_pytorch_tanh"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0.0, which is not above 0"),
        ({"model_type": "gemma2", "final_logit_softcapping": "30"}, "final_logit_softcapping = '30', which is not a"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0; only None"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern = 0, which is not"),
        (
            {"model_type": "olmo3", "rope_parameters": {"sliding_attention": YARN}},
            r"stretches the rotary positions of layers with a sliding window \(yarn\); only those of the other",
        ),
        ({"model_type": "qwen3_moe"}, r"is a mixture of experts \(qwen3_moe\)"),
        ({"num_local_experts": 8}, "is a mixture of experts"),
        ({"n_routed_experts": 64, "num_experts_per_tok": 2}, "is a mixture of experts"),
        ({"quantization_config": {"bits": 4}}, "describes a quantised checkpoint, which"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"describes a quantised checkpoint \(gptq\), which"),
        ({"quantization_config": {"quant_method": "awq"}}, r"describes a quantised checkpoint \(awq\), which"),
        ({"architectures": ["LlamaForTokenClassification"]}, "describes a LlamaForTokenClassification"),
        ({"hidden_act": "gelu"}, "has hidden_act = gelu; only silu"),
        ({"mlp_bias": True}, "has mlp_bias = True; only False"),
        (
            {"rope_parameters": {"rope_type": "axial"}},
            "rope_type 'axial'.*; default, linear, llama3, yarn, longrope, dynamic are",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "lacks long_factor"),
        ({"rope_parameters": LONGROPE | {"short_factor": [1, 2]}}, "has 2 factors for 4 rotary pairs"),
        ({"rope_parameters": LONGROPE | {"short_factor": [1, 2, 3, -1]}}, "pair_factors must be 0 or from 1e-06 to"),
        ({"rope_parameters": LONGROPE | {"long_factor": "all"}}, "long_factor = 'all', which is not a list of numbers"),
        ({"rope_parameters": YARN | {"truncate": False}}, "has truncate = False"),
        ({"rope_parameters": {"full_attention": YARN}}, "has more than one kind of rotary positions"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks factor"),
        ({"partial_rotary_factor": 0.5}, "has partial_rotary_factor = 0.5"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size = 'wide', which is not a whole number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small', which is not a number"),
        ({"tie_word_embeddings": 3}, "neither true nor false"),
        ({"num_attention_heads": 3, "head_dim": None}, "hidden_size 32 does not divide into 3 heads"),
        ({"num_attention_heads": 3}, "3 query heads cannot share|of shape"),
        ({"num_attention_heads": 8, "head_dim": None}, r"k_proj.weight of shape \[8, 32\]"),
        ({"intermediate_size": 64}, r"gate_proj.weight of shape \[48, 32\], but the configuration requires \[64, 32\]"),
        ({"vocab_size": 97}, r"has model.embed_tokens.weight of shape \[96, 32\]"),
        ({"num_hidden_layers": 5}, r"lacks model.layers.4.*and more"),
        ({"num_hidden_layers": 5000}, "5000, which is not a whole number of at least 1 and at most 4096"),
        ({"num_hidden_layers": 3}, r"does not explain, such as model.layers.3"),
        ({"attention_bias": True}, r"lacks model.layers.0.self_attn.k_proj.bias"),
        ({"model_type": "qwen3"}, r"lacks model.layers.0.self_attn.k_norm.weight"),
        ({"tie_word_embeddings": True}, "the checkpoint has another one"),
        ({"layer_types": ["full_attention", "linear_attention"] * 2}, "a hybrid cannot be converted"),
        ({"layer_types": ["full_attention"]}, "for each of its layers"),
        ({"layer_types": 3}, "layer_types = 3, which is not a list"),
        (
            {"model_type": "smollm3", "no_rope_layers": [1, 2, 1, 1]},
            "no_rope_layers = .*, which is not 0 or 1",
        ),
    ],
)
def test_configurations_that_are_refused(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    change_config(checkpoint, **changes)
    with pytest.raises(UserError, match=sentence):
        convert(checkpoint, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 0},
        {"num_local_experts": 1, "num_experts_per_tok": 2},
        {"n_routed_experts": None, "n_shared_experts": None},
        {"num_experts": 0, "num_experts_per_tok": 8, "use_experts": False},
    ],
)
def test_fields_that_say_dense_are_no_mixture(pretrained: Pretrained, tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(pretrained("llama")[1], tmp_path / "checkpoint"))
    change_config(folder, **fields)
    assert (convert(folder, tmp_path) / "model.safetensors").is_file()


def test_new_fast_mlps_are_refused_before_a_norm(checkpoint: Path, tmp_path: Path) -> None:
    change_config(checkpoint, model_type="olmo2")
    with pytest.raises(UserError, match=r"norms after its MLPs .* split the MLPs instead"):
        convert(checkpoint, tmp_path, fast="new")
