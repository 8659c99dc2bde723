"""Models at the edges of every setting's range, and with random settings, against plain loops in float64."""

import os
from typing import Any

import pytest
import torch
from helpers import small_config, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_model import plain_losses

from ttt_e2e.config.components import InnerLoopConfig, RopeScaling
from ttt_e2e.config.ranges import ranges_of
from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.errors import UserError
from ttt_e2e.inference.streaming import read_mini_batch, start_reading
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.transformer import Transformer

F64 = torch.float64
YARN = {"rope_scaling.rope_type": "yarn", "rope_scaling.original_max_position_embeddings": 8}


def check_model(model: Transformer, length: int = 7) -> None:
    """A reading step, an inner step and the outer gradient are finite, and those of the plain loops."""
    text = torch.randint(model.config.vocab_size, (2, length + 1), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([plain_losses(model, row) for row in text])
    out = sequence_loss(model, text, dtype=F64)
    assert out.nll_BT.isfinite().all()
    torch.testing.assert_close(out.nll_BT, expected.detach(), rtol=1e-7, atol=1e-9)
    b = (model.config.mini_batch_size if model.suffix else None) or length
    parameters = list(model.parameters())
    plain = torch.autograd.grad(expected.mean(), parameters, allow_unused=True, materialize_grads=True)
    ours = torch.autograd.grad(out.loss, parameters, allow_unused=True, materialize_grads=True)
    for (name, _), a, e in zip(model.named_parameters(), ours, plain, strict=True):
        assert a.isfinite().all(), name
        assert float((a - e).norm()) <= 1e-6 * float(e.norm()) + 1e-9, name
    state, losses = start_reading(model, 2, F64), []
    for i in range(0, length, b):
        tokens, targets = text[:, i : min(i + b, length)], text[:, i + 1 : i + b + 1]
        state, nll, norm = read_mini_batch(model, state, tokens, targets, dtype=F64)
        losses.append(nll)
        assert norm.isfinite().all()
    torch.testing.assert_close(torch.cat(losses, 1), expected.detach(), rtol=1e-7, atol=1e-9)


def float_edges() -> list[tuple[str, float]]:
    """Both ends of every range of the model's settings that are not whole numbers."""
    classes = {"": ModelConfig, "inner_loop.": InnerLoopConfig, "rope_scaling.": RopeScaling}
    ranges = {prefix + name: range_ for prefix, cls in classes.items() for name, range_ in ranges_of(cls).items()}
    return [(name, end) for name, (*ends, _) in ranges.items() for end in ends if isinstance(end, float)]


@pytest.mark.parametrize(("name", "value"), float_edges())
def test_both_ends_of_every_range_work(name: str, value: float) -> None:
    values: dict[str, Any] = {"num_hidden_layers": 2, "mini_batch_size": 2, "sliding_window": 3}
    if name.startswith("rope_scaling."):
        values |= YARN | {"rope_scaling.low_freq_factor": 1e-6, "rope_scaling.high_freq_factor": 1e6}
        if name == "rope_scaling.low_freq_factor" and value == 1e6:
            values["rope_scaling.low_freq_factor"] = value
            with pytest.raises(UserError, match="low_freq_factor must be below"):
                small_config(**values)
            return
        if name == "rope_scaling.high_freq_factor" and value == 1e-6:
            return
    check_model(small_model(F64, **values | {name: value}))


@pytest.mark.parametrize(
    "values",
    [
        {"vocab_size": 1},
        {"vocab_size": 2, "hidden_size": 1, "num_attention_heads": 1, "head_dim": 2, "intermediate_size": 1},
        {"sliding_window": 1, "mini_batch_size": 1},
        {"sliding_window": 2**30, "mini_batch_size": 3},
        {"pattern": ("full",), "mini_batch_size": 2**30},
        {"num_attention_heads": 4, "num_key_value_heads": 1, "fast_rank": 1},
        {"fast_rank": 40},
        {"num_hidden_layers": 1, "suffix_layers": 1},
        {"rope_theta": 1 + 1e-15, **YARN},
        {"inner_loop.max_grad_norm": 1e-18, "inner_loop.lr": 1e18},
        {"initializer_range": 0.0, "pre_norm": False, "post_norm": False},
    ],
)
def test_smallest_and_largest_shapes_work(values: dict) -> None:
    check_model(small_model(F64, **{"num_hidden_layers": 2, "sliding_window": 3, "mini_batch_size": 2, **values}))


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Settings by name, most of which fit together."""
    few, flag = st.integers(1, 3), st.booleans()
    layers = draw(few)
    values: dict[str, Any] = {
        "vocab_size": draw(st.integers(1, 9)),
        "num_hidden_layers": layers,
        "suffix_layers": draw(st.integers(0, layers + (draw(st.integers(0, 9)) == 0))),
        "num_attention_heads": draw(st.sampled_from([1, 2, 4])),
        "num_key_value_heads": draw(st.sampled_from([None, None, 1, 2])),
        "hidden_size": draw(st.sampled_from([4, 8, 8, 6])),
        "head_dim": draw(st.sampled_from([None, 2, 4, 4])),
        "intermediate_size": draw(few),
        "pattern": draw(st.sampled_from([("window",), ("window",), ("full",), ("full", "window"), ("window", "full")])),
        "sliding_window": draw(st.integers(2, 6)),
        "mini_batch_size": draw(st.integers(1, 3)),
        "rope_theta": draw(st.floats(1, 1e6)),
        "rope_pattern": draw(st.sampled_from([(True,), (True,), (False,), (True, False)])),
        "rope_local_pattern": draw(st.sampled_from([(False,), (True,), (True, False)])),
        "rope_local_base_freq": draw(st.floats(1, 1e6)),
        "hidden_act": draw(st.sampled_from(["silu", "gelu_pytorch_tanh"])),
        "attn_logit_softcapping": draw(st.none() | st.floats(0.5, 50)),
        "final_logit_softcapping": draw(st.none() | st.floats(0.5, 50)),
        "embedding_multiplier": draw(st.sampled_from([1.0, 1.0, 4.0])),
        "rms_norm_eps": draw(st.sampled_from([1e-18, 1e-6, 1.0])),
        "tie_word_embeddings": draw(flag),
        "initializer_range": draw(st.sampled_from([0.02, 0.3])),
        "inner_loop.lr": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "inner_loop.max_grad_norm": draw(st.sampled_from([1e-18, 0.05, 1.0, 1e18])),
        "fast_rank": draw(st.sampled_from([None, None, 1, 5])),
        "fast_intermediate_size": draw(st.none() | few),
        "suffix_intermediate_size": draw(st.none() | few),
    }
    for name in ("qk_norm", "pre_norm", "post_norm", "attention_bias", "attention_out_bias", "parallel_mlp"):
        values[name] = draw(flag)
    values["qk_norm_joint"] = values["qk_norm"] and draw(flag)
    values["attention_sink"] = "window" in values["pattern"] and draw(flag)
    values["static_mlp"] = values["parallel_mlp"] or draw(flag)
    kind = draw(st.sampled_from(["default", "linear", "llama3", "yarn", "longrope"]))
    if kind != "default":
        values |= {
            "rope_scaling.rope_type": kind,
            "rope_scaling.factor": draw(st.floats(0.5, 8)),
            "rope_scaling.original_max_position_embeddings": draw(st.integers(1, 40)),
            "rope_scaling.high_freq_factor": draw(st.floats(0.5, 32)),
            "rope_scaling.attention_factor": draw(st.floats(0.5, 2)),
        }
    if kind == "longrope":
        pairs = (values["head_dim"] or values["hidden_size"] // values["num_attention_heads"]) // 2
        values["rope_scaling.pair_factors"] = tuple(
            draw(st.lists(st.just(0.0) | st.floats(0.5, 8), min_size=pairs, max_size=pairs))
        )
    return values


@settings(max_examples=int(os.environ.get("TTT_E2E_EXAMPLES", "25")))
@given(values=configurations(), seed=st.integers(0, 99))
def test_any_settings_work_as_plain_loops_do_or_are_refused(values: dict[str, Any], seed: int) -> None:
    try:
        model = small_model(F64, seed, **values)
    except UserError as error:
        assert str(error).endswith(".")
        return
    check_model(model, 5)
