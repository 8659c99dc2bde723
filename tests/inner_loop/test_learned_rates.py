"""Inner learning rates that are parameters: what they do to a step, how they are trained, kept and shown."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_model
from torch import Tensor

from ttt_e2e.cli import main as cli
from ttt_e2e.config.schema import TrainConfig
from ttt_e2e.convert.from_standard import convert_from_standard
from ttt_e2e.convert.learning import LearningOptions
from ttt_e2e.inference.streaming import read_mini_batch, start_reading
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.checkpoint import load_transformer, save_model
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.training.optimizer import make_optimizer, optimizer_step

F64 = torch.float64
LEARNED = {"inner_loop.learned_lr": True}
KINDS = {"whole matrices": {}, "low rank": {"fast_rank": 2}}


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randint(50, (batch, length + 1), generator=torch.Generator().manual_seed(0))


def with_scales(model: Transformer, scale: float) -> Transformer:
    """The model with all rates multiplied by `scale`."""
    with torch.no_grad():
        for block in model.suffix:
            block.log_lr_scale.fill_(scale).log_()
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", ["none", "sqrt"])
def test_at_the_start_they_change_nothing(kind: str, checkpointing: Any) -> None:
    """Losses and gradients of a new model are those of one without them, to the last bit."""
    found = []
    for settings in ({}, LEARNED):
        model = Transformer(small_model(**KINDS[kind], **settings).config, torch.Generator().manual_seed(0))
        out = sequence_loss(model, tokens(23), activation_checkpointing=checkpointing)
        out.loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()} | {"losses": out.nll_BT})
    plain, learned = found
    names = set(learned) - set(plain)
    assert names == {f"blocks.{i}.log_lr_scale" for i in (2, 3)}
    for name in names:
        assert learned[name].shape == (2 if kind == "whole matrices" else 4,) and learned[name].abs().max() > 0
    assert all(torch.equal(learned[name], plain[name]) for name in plain)


def test_they_multiply_whatever_rate_is_given() -> None:
    """The configuration's, or that of an argument: so training can warm it up."""
    plain, tripled = small_model(F64), with_scales(small_model(F64, **LEARNED), 3.0)
    tripled.load_state_dict(plain.state_dict(), strict=False)
    for lr in (None, 0.2):
        expected = sequence_loss(plain, tokens(23), dtype=F64, inner_lr=3.0 * (lr or 1.0)).nll_BT
        torch.testing.assert_close(sequence_loss(tripled, tokens(23), dtype=F64, inner_lr=lr).nll_BT, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_each_matrix_learns_at_its_own_rate(kind: str) -> None:
    """One step moves each by its factor, in the order of the fast weights, and the clip is that of the gradients."""
    models = [small_model(F64, **LEARNED, **KINDS[kind], inner_loop__max_grad_norm=0.1) for _ in range(2)]
    with_scales(models[1], 1.0)
    factors = torch.cat([block.log_lr_scale for block in models[0].suffix]).exp().tolist()
    assert len({round(factor, 6) for factor in factors}) == len(factors)
    text, moved, norms = tokens(5), [], []
    for model in models:
        state, _, norm_B = read_mini_batch(model, start_reading(model, 2, F64), text[:, :-1], text[:, 1:], dtype=F64)
        before = model.initial_fast_weights(2)
        pairs = zip(state.loop.fast, before, strict=True)
        moved.append([w - w0 for now, start in pairs for w, w0 in zip(now, start, strict=True)])
        norms.append(norm_B)
    assert torch.equal(*norms) and norms[0].min() > 0.1
    for factor, ours, plain in zip(factors, *moved, strict=True):
        torch.testing.assert_close(ours, factor * plain)


def test_their_gradient_is_that_of_finite_differences() -> None:
    model = small_model(F64, **LEARNED, fast_rank=1, suffix_layers=1, inner_loop__max_grad_norm=0.2)
    name = "blocks.3.log_lr_scale"
    others = {other: p.detach() for other, p in model.named_parameters() if other != name}

    def loss(scales: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(model.suffix[0]._parameters, "log_lr_scale", scales)
            return sequence_loss(model, tokens(18), dtype=F64).loss

    assert others and torch.autograd.gradcheck(loss, model.suffix[0].log_lr_scale.detach().requires_grad_())


def test_weight_decay_leaves_them_alone() -> None:
    model = with_scales(small_model(**LEARNED), 2.0)
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.5))
    before = {name: p.clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer_step(model, optimizer, lr=0.1, max_grad_norm=1.0)
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert same == {f"blocks.{i}.log_lr_scale" for i in (2, 3)}


def test_an_outer_rate_of_their_own() -> None:
    model = with_scales(small_model(**LEARNED), 2.0)
    optimizer = make_optimizer(model, TrainConfig(lr=1e-3, inner_lr_lr=0.05, weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer_step(model, optimizer, lr=1e-3 / 2, max_grad_norm=1.0)  # half of its peak, as in a warm-up
    for name, parameter in model.named_parameters():
        expected = -0.025 if name.endswith(".log_lr_scale") else -0.0005
        torch.testing.assert_close(parameter - before[name], torch.full_like(parameter, expected), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("fast", ["new", "split"])
def test_a_standard_model_gets_them(fast: Any, tmp_path: Path) -> None:
    standard = small_model(suffix_layers=0, mini_batch_size=None, post_norm=False)
    save_model(standard, tmp_path / "standard", None)
    converted = []
    for learned in (True, False):
        options = LearningOptions(12, mini_batch_size=4, inner_lr=0.3, fast=fast, learned_lr=learned)
        convert_from_standard(tmp_path / "standard", tmp_path / str(learned), options)
        converted.append(load_transformer(tmp_path / str(learned)))
    ours, plain = converted
    assert ours.config.inner_loop.learned_lr and ours.config.inner_loop.lr == plain.config.inner_loop.lr == 0.3
    assert ours.suffix[0].log_lr_scale.tolist() == [0.0, 0.0]
    assert torch.equal(sequence_loss(ours, tokens(23)).nll_BT, sequence_loss(plain, tokens(23)).nll_BT)


@pytest.mark.parametrize("kind", KINDS)
def test_info_shows_them(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model(**LEARNED, **KINDS[kind], suffix_layers=3, inner_loop__lr=0.5)
    with torch.no_grad():
        for block, scale in zip(model.suffix, (1.0, 4.0, 2.0), strict=True):
            block.log_lr_scale.fill_(scale).log_()
            block.log_lr_scale[-1] = 0.0
    save_model(model, tmp_path / "model", None)
    assert cli.main(["info", str(tmp_path / "model"), "--json"]) == 0
    rates = json.loads(capsys.readouterr().out)["learned_rates"]
    names = ["w_in", "w_out"] if kind == "whole matrices" else ["up_in", "down_in", "up_out", "down_out"]
    assert list(rates) == names and rates[names[-1]] == pytest.approx([0.5] * 3)
    assert all(rates[name] == pytest.approx([0.5, 1.0, 2.0]) for name in names[:-1])
    assert cli.main(["info", str(tmp_path / "model")]) == 0
    assert f"{names[0]} 0.5 / 1 / 2" in capsys.readouterr().out
    save_model(small_model(), tmp_path / "plain", None)
    assert cli.main(["info", str(tmp_path / "plain")]) == 0 and "learned_rates" not in capsys.readouterr().out
