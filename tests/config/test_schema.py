"""Configurations: the published presets, settings changed by name, and what is refused."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import ttt_e2e
from ttt_e2e.config.parse import from_dict, override, to_dict
from ttt_e2e.config.presets import PRESETS, extension, preset, rope_theta_for
from ttt_e2e.config.schema import ModelConfig, RunConfig, TrainConfig
from ttt_e2e.errors import UserError
from ttt_e2e.model.transformer import Transformer

# The table: layers, width, heads, MLP full / TTT-E2E, suffix, outer lr, steps, batch.
PUBLISHED = {
    "125m": (12, 768, 12, 2048, 1664, 3, 3e-3, 4800, 64),
    "350m": (24, 1024, 16, 2816, 2304, 6, 1.5e-3, 13500, 64),
    "760m": (24, 1536, 16, 4096, 3328, 6, 1.25e-3, 29000, 64),
    "1b": (24, 2048, 32, 5376, 4352, 6, 1e-3, 50000, 64),
    "3b": (32, 2560, 32, 6912, 5632, 8, 8e-4, 52000, 128),
}


def parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_presets(name: str) -> None:
    layers, width, heads, full, ttt, suffix, lr, steps, batch = PUBLISHED[name]
    ours, baseline = preset(name), preset(f"{name}-full")
    for config, mlp, fast in ((ours, ttt, suffix), (baseline, full, 0)):
        model, train = config.model, config.train
        assert (model.num_hidden_layers, model.hidden_size, model.num_attention_heads) == (layers, width, heads)
        assert (model.intermediate_size, model.suffix_layers, model.vocab_size) == (mlp, fast, 128_256)
        assert (train.lr, train.steps, train.batch, train.context) == (lr, steps, batch, 8192)
        assert (train.beta1, train.beta2, train.weight_decay, train.max_grad_norm) == (0.9, 0.95, 0.1, 1.0)
        assert (train.lr_end, train.warmup, train.inner_lr_init, train.inner_warmup) == (
            1e-5,
            steps // 10,
            0.1,
            steps // 10,
        )
        assert model.rope_theta == 500_000
    assert (
        ours.model.sliding_window,
        ours.model.mini_batch_size,
        ours.model.inner_loop.lr,
        ours.model.inner_loop.max_grad_norm,
    ) == (
        8192,
        1024,
        1.0,
        1.0,
    )
    assert baseline.model.pattern == ("full",)
    assert parameters(ours.model) == pytest.approx(parameters(baseline.model), rel=0.02)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_our_presets_keep_the_published_proportions(name: str) -> None:
    config = preset(name)
    assert config.model.sliding_window == 8 * config.model.mini_batch_size
    assert config.train.context == 8 * config.model.sliding_window
    assert config.model.suffix_layers == config.model.num_hidden_layers / 4
    for other in ("full", "window"):
        assert parameters(config.model) == pytest.approx(parameters(preset(f"{name}-{other}").model), rel=0.02)


def test_extension_follows_the_published_recipe() -> None:
    train = preset("3b").train
    longer = extension(train, 131_072, train.steps)
    assert (longer.context, longer.lr, longer.steps, longer.inner_warmup) == (131_072, 4e-4, 1300, 0)
    assert longer.batch * longer.context == train.batch * train.context
    assert [rope_theta_for(n) for n in (8192, 32_768, 131_072)] == [5e5, 2e6, 1e7]


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name: str) -> None:
    config = preset(name)
    assert from_dict(RunConfig, to_dict(config)) == config


def test_override() -> None:
    config = override(
        preset("tiny"),
        [
            "model.sliding_window=256",
            "train.lr=1e-3",
            "steps=1e2",
            "tie_word_embeddings=false",
            "activation_checkpointing=none",
            "num_key_value_heads=none",
        ],
    )
    assert (config.model.sliding_window, config.train.lr, config.train.steps) == (256, 1e-3, 100)
    assert (
        config.model.tie_word_embeddings,
        config.train.activation_checkpointing,
        config.model.num_key_value_heads,
    ) == (False, "none", None)
    assert isinstance(config.train.steps, int)


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("windw=3", "no setting 'windw'. Did you mean 'window'"),
        ("window", "is not an override; write NAME=VALUE"),
        ("sliding_window=wide", "window must be a whole number, not 'wide'"),
        ("sliding_window=1.5", "window must be a whole number, not 1.5"),
        ("mini_batch_size=1024", "mini-batch b = 1024 is longer than the window k = 512"),
        ("suffix_layers=9", "suffix of 9 blocks does not fit a model of 8"),
        ("mini_batch_size=none", "set mini_batch"),
        ("num_attention_heads=3", "does not divide into 3 heads"),
        ("num_key_value_heads=3", "cannot share 3 key/value heads"),
        ("steps=0", "steps must be at least 1"),
        ("max_grad_norm=0", "clip must be above 0"),
        ("beta2=1", "beta2 must be from 0 to below 1"),
        ("seed=-1", "seed must not be negative"),
        ("lr_init=-1", "lr_init must not be negative"),
        ("initializer_range=-1", "init_std must not be negative"),
        ("accumulate=3", "does not split into 3 equal pieces"),
        ("activation_checkpointing=sometimes", "recompute must be 'none' or 'mini-batch' or 'sqrt'"),
        ("tie_word_embeddings=1", "tied_head must be true or false"),
        ("inner_loop.max_grad_norm=0", "inner_clip must be positive"),
        ("inner_loop.lr=-1", "inner_lr must not be negative"),
        ("head_dim=5", "need an even head width, not 5"),
        ("fast_intermediate_size=0", "fast_mlp_width must be at least 1"),
        ("fast_rank=0", "fast_rank must be at least 1"),
        ("rope_scaling.factor=2", "rope_factor needs a rope_scaling"),
        ("rope_scaling.rope_type=yarn", "set rope_context"),
        ("rope_scaling.rope_type=ntk", "rope_scaling must be 'none' or 'linear'"),
        ("rope_scaling.attention_factor=0", "rope_attention must be positive"),
    ],
)
def test_refused_settings(assignment: str, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        override(preset("tiny"), [assignment])


@pytest.mark.parametrize(
    ("assignments", "sentence"),
    [
        (["parallel_mlp=true", "static_mlp=false"], "it needs static_mlp=true"),
        (
            [
                "rope_scaling.rope_type=llama3",
                "rope_scaling.original_max_position_embeddings=64",
                "rope_scaling.low_freq_factor=4",
            ],
            "below rope_fast = 4.0",
        ),
        (["pattern=mamba2,window", "attention_bias=true"], "for attentions alone, not for mamba2"),
    ],
)
def test_settings_that_do_not_fit_together(assignments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        override(preset("tiny"), assignments)


def test_later_fields_are_written_where_they_are_set() -> None:
    """So that what was written before there were any is still recognised."""
    shipped = json.loads((Path(ttt_e2e.__file__).parent / "shipped/config.json").read_text())["model"]
    assert to_dict(from_dict(ModelConfig, shipped)) == shipped
    plain = to_dict(preset("tiny"))["model"]
    assert list(plain)[-1] == "kernels" and "head_size" not in plain
    config = override(
        preset("tiny"), ["head_dim=16", "fast_rank=8", "rope_scaling.rope_type=linear", "rope_scaling.factor=2"]
    ).model
    assert to_dict(config) == {
        **plain,
        "head_dim": 16,
        "fast_rank": 8,
        "rope_scaling.rope_type": "linear",
        "rope_scaling.factor": 2.0,
    }
    assert from_dict(ModelConfig, to_dict(config)) == config


def test_unknown_preset_names_a_near_one() -> None:
    with pytest.raises(UserError, match=r"no preset 'tyni'\. Did you mean 'tiny'"):
        preset("tyni")


def test_from_dict_refuses_what_is_no_configuration() -> None:
    values = to_dict(preset("tiny"))["model"]
    for changed, sentence in (
        ({**values, "colour": 1}, "unknown fields: colour"),
        ({k: v for k, v in values.items() if k != "width"}, "is incomplete"),
        ({**values, "hidden_size": "wide"}, "width in x must be a whole number"),
    ):
        with pytest.raises(UserError, match=sentence):
            from_dict(ModelConfig, changed, "x")
    assert dataclasses.is_dataclass(from_dict(TrainConfig, {}))


@pytest.mark.parametrize("name", PRESETS)
def test_every_system_has_as_many_parameters_as_full_attention(name: str) -> None:
    full = PRESETS[f"{name.partition('-')[0]}-full"]
    assert parameters(PRESETS[name].model) == pytest.approx(parameters(full.model), rel=0.02)


def test_patterns() -> None:
    hybrid = preset("125m-hybrid").model
    assert hybrid.mixers == (("window",) * 5 + ("full",)) * 2
    config = override(preset("tiny"), ["pattern=mamba2,window"]).model
    assert config.mixers == ("mamba2", "window") * 4
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert preset("tiny-full-prefix").model.mixers == ("full",) * 6 + ("window",) * 2
    with pytest.raises(UserError, match="no mixer 'mamba3'"):
        override(preset("tiny"), ["pattern=mamba3"])


def test_every_setting_is_explained() -> None:
    """docs/training.md has a row for each, and none that there is not."""
    text = (Path(__file__).parents[2] / "docs/training.md").read_text().split("## Settings")[1]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    fields = [field.name for kind in (ModelConfig, TrainConfig) for field in dataclasses.fields(kind)]
    assert sorted(named) == sorted(fields)
