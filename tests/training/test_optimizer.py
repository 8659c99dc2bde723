"""The outer optimizer against the official schedule, exact clipping and AdamW written out."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ttt_e2e.config.schema import ModelConfig, TrainConfig
from ttt_e2e.training.optimizer import (
    clip_gradients,
    inner_learning_rate,
    learning_rate,
    make_optimizer,
    optimizer_step,
)

MODEL = ModelConfig(
    vocab_size=8,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=8,
    suffix_layers=1,
    sliding_window=8,
    mini_batch_size=4,
)


def test_learning_rate_follows_the_official_schedule(golden_dir: Path) -> None:
    golden = load_file(golden_dir / "tiny_e2e.safetensors")
    config = TrainConfig(lr=3e-3, lr_init=0.0, lr_end=1e-5, warmup_steps=10, steps=100)
    ours = [learning_rate(int(step), config) for step in golden["lr_schedule_steps"]]
    torch.testing.assert_close(torch.tensor(ours), golden["lr_schedule_values"], rtol=1e-6, atol=1e-9)


def test_learning_rate_at_its_corners() -> None:
    config = TrainConfig(lr=1.0, lr_init=0.1, lr_end=0.2, warmup_steps=4, steps=12)
    assert learning_rate(0, config) == 0.1
    assert learning_rate(4, config) == 1.0
    assert learning_rate(8, config) == pytest.approx(0.6)
    assert learning_rate(12, config) == pytest.approx(0.2)
    assert learning_rate(0, TrainConfig(lr=1.0, warmup_steps=0, steps=3)) == 1.0


def test_inner_learning_rate_warms_up_from_its_first_value() -> None:
    config = TrainConfig(inner_lr_init=0.1, inner_warmup_steps=9)
    assert inner_learning_rate(0, config, MODEL) == pytest.approx(0.2)
    assert inner_learning_rate(8, config, MODEL) == inner_learning_rate(500, config, MODEL) == 1.0
    assert inner_learning_rate(0, TrainConfig(inner_warmup_steps=0), MODEL) == 1.0


@pytest.mark.parametrize(("clip", "scale"), [(10.0, 1.0), (5.0, 1.0), (1.0, 0.2)])
def test_clip_gradients_by_the_exact_global_norm(clip: float, scale: float) -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2))])
    model[0].grad, model[1].grad = torch.tensor([3.0]), torch.tensor([0.0, 4.0])
    assert clip_gradients(model, clip) == 5.0
    torch.testing.assert_close(model[0].grad, torch.tensor([3.0 * scale]), rtol=1e-7, atol=0)
    torch.testing.assert_close(model[1].grad, torch.tensor([0.0, 4.0 * scale]), rtol=1e-7, atol=0)


def test_update_is_adamw_with_decay_on_every_tensor() -> None:
    config = TrainConfig(lr=0.1, weight_decay=0.5)
    model = nn.ParameterList([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))])
    optimizer = make_optimizer(model, config)
    for weight in model:
        weight.grad = torch.full_like(weight, 1e-3)
    norm = optimizer_step(model, optimizer, lr=0.1, max_grad_norm=1.0)
    assert norm == pytest.approx(1e-3 * math.sqrt(7))
    for weight in model:  # the first step of Adam is lr * sign(gradient)
        torch.testing.assert_close(weight.detach(), torch.full_like(weight, 1 - 0.1 * 0.5 - 0.1), rtol=1e-4, atol=0)
        assert weight.grad is None


def test_gradient_that_is_not_finite_changes_nothing() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(3))])
    optimizer = make_optimizer(model, TrainConfig())
    model[0].grad = torch.tensor([1.0, math.nan, 1.0])
    assert math.isnan(optimizer_step(model, optimizer, lr=0.1, max_grad_norm=1.0))
    assert model[0].tolist() == [1.0, 1.0, 1.0]
