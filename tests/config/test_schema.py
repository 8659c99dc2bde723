"""Settings: what is refused, and values that follow from others."""

import re

import pytest

from ttt_e2e.config.parse import override
from ttt_e2e.config.presets import preset
from ttt_e2e.config.schema import TrainConfig, replace
from ttt_e2e.errors import UserError


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("mini_batch_size=1024", "mini-batch b = 1024 is longer than the window k = 512"),
        ("mini_batch_size=none", "set mini_batch_size"),
        ("suffix_layers=9", "suffix of 9 blocks does not fit 8 blocks"),
        ("num_attention_heads=3", "hidden_size 128 does not divide into 3 heads"),
        ("num_key_value_heads=3", "cannot share 3 key/value heads"),
        ("head_dim=5", "need an even head_dim, not 5"),
        ("fast_intermediate_size=0", "fast_intermediate_size must be at least 1"),
        ("fast_rank=0", "fast_rank must be at least 1"),
        ("initializer_range=-1", "initializer_range must be at least 0"),
        ("inner_loop.max_grad_norm=0", "inner_loop.max_grad_norm must be at least 1e-18, not 0.0"),
        ("inner_loop.lr=-1", "inner_loop.lr must be at least 0"),
        ("mamba2.expand=0", "mamba2.expand must be at least 1"),
        ("rope_scaling.factor=2", "rope_scaling.factor needs a rope_scaling.rope_type"),
        ("rope_scaling.rope_type=yarn", "rope_type yarn needs original_max_position_embeddings"),
        ("rope_scaling.attention_factor=0", "rope_scaling.attention_factor must be at least 0.001"),
        ("rope_scaling.pair_factors=2", "pair_factors are for rope_type longrope alone"),
        ("pattern=mamba3", "no mixer 'mamba3'. Did you mean 'mamba2'"),
        ("steps=0", "steps must be at least 1"),
        ("max_grad_norm=0", "max_grad_norm must be at least 1e-18"),
        ("betas=0.9,1", "betas must be two numbers from 0 to below 1, not 0.9, 1.0"),
        ("betas=0.9", "betas must be two numbers from 0 to below 1, not 0.9"),
        ("seed=-1", "seed must be at least 0"),
        ("lr_init=-1", "lr_init must be at least 0"),
        ("accumulate=3", "does not split into 3 equal parts"),
    ],
)
def test_settings_that_do_not_fit_are_refused(assignment: str, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        override(preset("tiny"), [assignment])


@pytest.mark.parametrize(
    ("assignments", "sentence"),
    [
        (["parallel_mlp=true", "static_mlp=false"], "parallel_mlp needs static_mlp=true"),
        (
            ["rope_type=llama3", "original_max_position_embeddings=64", "low_freq_factor=4"],
            "low_freq_factor must be below high_freq_factor, not 4.0, 4.0",
        ),
        (
            ["rope_type=yarn", "original_max_position_embeddings=64", "rope_theta=1"],
            "rope_type yarn needs a rope_theta above 1",
        ),
        (["rope_type=longrope", "pair_factors=2,3"], "pair_factors are one for each of 16 pairs, not 2"),
        (["rope_type=longrope", "pair_factors=2,-1"], "pair_factors must be 0 or from 1e-06 to 1e+06, not (2.0, -1.0)"),
        (["qk_norm_joint=true", "qk_norm=false"], "qk_norm_joint is for mixers 'full' and 'window' alone, and needs"),
        (["pattern=mamba2,window", "rope_pattern=false,true"], "rope_pattern can be false only where the mixer is"),
        (["pattern=mamba2,window", "rope_local_pattern=true"], "rope_local_pattern and attn_logit_softcapping are for"),
        (["pattern=titans,window", "attn_logit_softcapping=50"], "are for mixers 'full' and 'window' alone"),
        (["attn_logit_softcapping=0"], "attn_logit_softcapping must be at least 0.001, not 0"),
        (["hidden_act=relu"], "hidden_act must be 'silu' or 'gelu_pytorch_tanh', not 'relu'"),
        (["pattern=full,window", "suffix_layers=3"], "all its mixers must be 'window', or all 'full'"),
        (
            ["pattern=mamba2,window", "attention_bias=true"],
            "With mamba2, neither head_dim nor biases of attention can be set",
        ),
        (["pattern=mamba2,window", "n_groups=3"], "do not divide into 3 groups (mamba2.n_groups)"),
        (["pattern=titans,window", "mini_batch_size=60"], "is not a multiple of mini_batch_size 60"),
        (
            ["pattern=ttt-kvb,window", "suffix_layers=0", "mini_batch_size=none"],
            "ttt-kvb and titans learn mini-batch by mini",
        ),
    ],
)
def test_combinations_that_do_not_fit_are_refused(assignments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        override(preset("tiny"), assignments)


def test_pattern_is_repeated_over_the_depth() -> None:
    assert override(preset("tiny"), ["pattern=mamba2,window"]).model.mixers == ("mamba2", "window") * 4


def test_derived_values_follow_what_they_are_derived_from() -> None:
    model = preset("tiny").model
    assert (model.head_dim, model.num_key_value_heads, model.memory.intermediate_size) == (32, 4, 128)
    wider = replace(model, {"hidden_size": 256, "intermediate_size": 500, "memory.lr": 0.5})
    assert (wider.head_dim, wider.memory.intermediate_size, wider.memory.lr) == (64, 256, 0.5)
    assert (wider.fast_intermediate_size, wider.suffix_intermediate_size) == (500, 500)
    kept = replace(replace(model, {"head_dim": 16, "memory.intermediate_size": 8}), {"hidden_size": 256})
    assert (kept.head_dim, kept.memory.intermediate_size) == (16, 8)
    assert replace(TrainConfig(steps=100), {"steps": 50}).warmup_steps == 5
    assert replace(TrainConfig(steps=100, warmup_steps=3), {"steps": 50}).warmup_steps == 3
