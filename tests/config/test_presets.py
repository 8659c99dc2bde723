"""The presets: the published table, the proportions of ours, and as many parameters for every system."""

import pytest
import torch

from ttt_e2e.config.parse import from_dict, to_dict
from ttt_e2e.config.presets import PRESETS, extend_model, extend_training, preset, rope_theta_for
from ttt_e2e.config.schema import ModelConfig, RunConfig
from ttt_e2e.errors import UserError
from ttt_e2e.model.cost import parameters
from ttt_e2e.model.transformer import Transformer

# The paper's table: layers, width, heads, MLP width full / TTT-E2E, suffix, outer learning rate, steps, batch.
PUBLISHED = {
    "125m": (12, 768, 12, 2048, 1664, 3, 3e-3, 4800, 64),
    "350m": (24, 1024, 16, 2816, 2304, 6, 1.5e-3, 13500, 64),
    "760m": (24, 1536, 16, 4096, 3328, 6, 1.25e-3, 29000, 64),
    "1b": (24, 2048, 32, 5376, 4352, 6, 1e-3, 50000, 64),
    "3b": (32, 2560, 32, 6912, 5632, 8, 8e-4, 52000, 128),
}


def counted_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_presets_are_those_of_the_paper(name: str) -> None:
    layers, width, heads, full, ttt, suffix, lr, steps, batch = PUBLISHED[name]
    ours, baseline = preset(name), preset(f"{name}-full")
    for config, mlp, fast in ((ours, ttt, suffix), (baseline, full, 0)):
        model, train = config.model, config.train
        assert (model.num_hidden_layers, model.hidden_size, model.num_attention_heads) == (layers, width, heads)
        assert (model.intermediate_size, model.suffix_layers, model.vocab_size) == (mlp, fast, 128_256)
        assert (train.lr, train.steps, train.batch, train.context) == (lr, steps, batch, 8192)
        assert (train.betas, train.weight_decay, train.max_grad_norm) == ((0.9, 0.95), 0.1, 1.0)
        assert (train.lr_end, train.warmup_steps) == (1e-5, steps // 10)
        assert (train.inner_lr_init, train.inner_warmup_steps) == (0.1, steps // 10)
        assert model.rope_theta == 500_000
    assert (ours.model.sliding_window, ours.model.mini_batch_size) == (8192, 1024)
    assert (ours.model.inner_loop.lr, ours.model.inner_loop.max_grad_norm) == (1.0, 1.0)
    assert baseline.model.pattern == ("full",)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_our_presets_keep_the_published_proportions(name: str) -> None:
    config = preset(name)
    assert config.model.sliding_window == 8 * config.model.mini_batch_size
    assert config.train.context == 8 * config.model.sliding_window
    assert config.model.suffix_layers == config.model.num_hidden_layers / 4


@pytest.mark.parametrize("name", PRESETS)
def test_every_system_has_as_many_parameters_as_full_attention(name: str) -> None:
    full = PRESETS[f"{name.partition('-')[0]}-full"].model
    assert parameters(PRESETS[name].model) == counted_parameters(PRESETS[name].model)
    assert parameters(PRESETS[name].model) == pytest.approx(parameters(full), rel=0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_round_trip(name: str) -> None:
    assert from_dict(RunConfig, to_dict(preset(name))) == preset(name)


def test_mixers_of_the_presets() -> None:
    assert preset("125m-hybrid").model.mixers == (("window",) * 5 + ("full",)) * 2
    assert preset("tiny-full-prefix").model.mixers == ("full",) * 6 + ("window",) * 2


def test_extension_follows_the_published_recipe() -> None:
    train = preset("3b").train
    longer = extend_training(train, 131_072, train.steps)
    assert (longer.context, longer.lr, longer.steps, longer.inner_warmup_steps) == (131_072, 4e-4, 1300, 0)
    assert longer.warmup_steps == 130
    assert longer.batch * longer.context == train.batch * train.context
    assert [rope_theta_for(n) for n in (8192, 32_768, 131_072)] == [5e5, 2e6, 1e7]
    assert extend_model(preset("3b-full").model, 32_768).rope_theta == 2e6
    assert extend_model(preset("3b").model, 32_768) == preset("3b").model


def test_unknown_preset_names_a_near_one() -> None:
    with pytest.raises(UserError, match=r"no preset 'tyni'\. Did you mean 'tiny'"):
        preset("tyni")
