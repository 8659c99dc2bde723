"""Settings from text and from JSON."""

import json
import re
from pathlib import Path

import pytest

import ttt_e2e
from ttt_e2e.config.parse import flatten, from_dict, override, to_dict
from ttt_e2e.config.presets import preset
from ttt_e2e.config.schema import ModelConfig, TrainConfig
from ttt_e2e.errors import UserError


def test_override_changes_settings_by_name() -> None:
    config = override(
        preset("tiny"),
        [
            *("model.sliding_window=256", "train.lr=1e-3", "steps=1e2", "tie_word_embeddings=false"),
            *("activation_checkpointing=none", "num_key_value_heads=2", "betas=0.8, 0.9"),
            *("inner_loop.lr=3", "inner_loop.max_grad_norm=2", "expand=4", "mini_batch_size=32"),
        ],
    )
    model, train = config.model, config.train
    assert (model.sliding_window, model.tie_word_embeddings, model.num_key_value_heads) == (256, False, 2)
    assert (model.inner_loop.lr, model.inner_loop.max_grad_norm, model.mamba2.expand) == (3.0, 2.0, 4)
    assert (train.lr, train.steps, train.activation_checkpointing, train.betas) == (1e-3, 100, "none", (0.8, 0.9))
    assert isinstance(train.steps, int)


def test_override_with_none_derives_the_value() -> None:
    config = override(preset("tiny"), ["num_key_value_heads=2", "warmup_steps=7"])
    config = override(config, ["num_key_value_heads=none", "warmup_steps=none"])
    assert (config.model.num_key_value_heads, config.train.warmup_steps) == (4, 100)


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("sliding_windw=3", "no setting 'sliding_windw'. Did you mean 'sliding_window'"),
        ("sliding_window", "is not a setting; write NAME=VALUE"),
        ("kernels=torch", "several settings 'kernels': model.mamba2.kernels, model.gated_deltanet.kernels; write one"),
        ("sliding_window=wide", "model.sliding_window must be a whole number, not 'wide'"),
        ("sliding_window=1.5", "model.sliding_window must be a whole number, not 1.5"),
        ("activation_checkpointing=sometimes", "activation_checkpointing must be 'none' or 'mini-batch' or 'sqrt'"),
        ("tie_word_embeddings=1", "model.tie_word_embeddings must be true or false"),
        ("rope_type=ntk", "model.rope_scaling.rope_type must be 'default' or 'linear'"),
        ("fast_rank=low", "model.fast_rank must be a whole number or none"),
    ],
)
def test_override_refuses_what_it_does_not_understand(assignment: str, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        override(preset("tiny"), [assignment])


def test_settings_survive_a_round_trip_through_json() -> None:
    shipped = json.loads((Path(ttt_e2e.__file__).parent / "shipped/config.json").read_text())["model"]
    again = to_dict(from_dict(ModelConfig, shipped))
    for name, value in shipped.items():  # a setting that is newer than the file has its default
        inner = {key: again[name][key] for key in value} if isinstance(value, dict) else again[name]
        assert inner == value, name
    changes = ["head_dim=16", "fast_rank=8", "rope_type=linear", "factor=2", "inner_loop.lr=0.5"]
    config = override(preset("tiny"), changes).model
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict(TrainConfig, {}) == TrainConfig()


def test_flatten_names_settings_in_full() -> None:
    settings = flatten(override(preset("tiny"), ["inner_loop.lr=0.5"]).model)
    assert (settings["hidden_size"], settings["inner_loop.lr"], settings["rope_scaling.rope_type"]) == (
        128,
        0.5,
        "default",
    )
    assert not {"inner_loop", "rope_scaling"} & set(settings)


def test_from_dict_refuses_unknown_missing_and_mistyped_settings() -> None:
    values = to_dict(preset("tiny"))["model"]
    for changed, sentence in (
        ({**values, "colour": 1}, "x has unknown settings: colour"),
        ({**values, "inner_loop": {"rate": 1}}, "x has unknown settings: inner_loop.rate"),
        ({k: v for k, v in values.items() if k != "hidden_size"}, "x lacks settings: hidden_size"),
        ({**values, "hidden_size": "wide"}, "hidden_size in x must be a whole number"),
        ({**values, "inner_loop": {"lr": "fast"}}, "inner_loop.lr in x must be a number"),
        ({**values, "inner_loop": 1}, "inner_loop in x must be an object"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            from_dict(ModelConfig, changed, "x")
