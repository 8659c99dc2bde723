"""Truncated backpropagation through time, against plain loops whose graph autograd cuts at the same places."""

import weakref
from typing import Any

import pytest
import torch
from helpers import small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_model import plain_losses
from torch import Tensor

from ttt_e2e.config.parse import override
from ttt_e2e.config.presets import preset
from ttt_e2e.errors import UserError
from ttt_e2e.inner_loop.functions import EAGER
from ttt_e2e.inner_loop.meta_loss import mini_batch_mean, sequence_loss
from ttt_e2e.model.transformer import Transformer

F64 = torch.float64
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"inner_loop.max_grad_norm": 0.5},
    "three suffix blocks, full attention": {"suffix_layers": 3, "pattern": ("full",)},
    "learned rates, low rank": {"inner_loop.learned_lr": True, "fast_rank": 2},
    "learned rates, parallel": {"inner_loop.learned_lr": True, "parallel_mlp": True, "fast_intermediate_size": 10},
}


def tokens(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(50, (batch, length + 1), generator=torch.Generator().manual_seed(seed))


def gradients(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def by_autograd(model: Transformer, text: Tensor, chunk: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the outer gradient of the plain model."""
    nll_BT = torch.stack([plain_losses(model, row, chunk=chunk) for row in text])
    assert model.config.mini_batch_size is not None
    loss = mini_batch_mean(nll_BT, torch.ones_like(nll_BT), model.config.mini_batch_size).mean()
    return loss, gradients(model, loss)


@pytest.mark.parametrize(("shape", "chunk"), [*((shape, 2) for shape in SHAPES), ("plain", 1), ("plain", 3)])
def test_the_gradient_is_that_of_a_loop_with_cuts(shape: str, chunk: int) -> None:
    model, text = small_model(F64, num_hidden_layers=3, **SHAPES[shape]), tokens(23)
    loss, expected = by_autograd(model, text, chunk)
    for checkpointing in ("none", "mini-batch", "sqrt"):
        options: dict[str, Any] = {"activation_checkpointing": checkpointing, "truncated_bptt_steps": chunk}
        out = sequence_loss(model, text, dtype=F64, **options)
        torch.testing.assert_close(out.loss, loss, rtol=1e-10, atol=0)
        for name, grad in gradients(model, 3 * out.loss).items():
            torch.testing.assert_close(
                grad, 3 * expected[name], rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("shape", SHAPES)
def test_without_cuts_the_plain_loop_is_the_exact_gradient(shape: str) -> None:
    """So that the oracle is right; and a gradient with cuts is another one."""
    model, text = small_model(F64, num_hidden_layers=3, **SHAPES[shape]), tokens(23, batch=1)
    _, expected = by_autograd(model, text, None)
    exact, cut = (
        gradients(model, sequence_loss(model, text, dtype=F64, truncated_bptt_steps=steps).loss) for steps in (None, 2)
    )
    for name, grad in exact.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert all((cut[name] - exact[name]).norm() > 1e-3 * exact[name].norm() for name in exact if ".fast." in name)


@settings(max_examples=12, deadline=None)
@given(
    length=st.integers(1, 43),
    steps=st.integers(1, 10),
    recompute=st.sampled_from(["mini-batch", "sqrt"]),
    seed=st.integers(0, 999),
)
def test_checkpointing_gives_the_same_at_any_length(length: int, steps: int, recompute: Any, seed: int) -> None:
    model, text = small_model(F64, seed=seed), tokens(length, seed=seed)
    found = []
    for checkpointing in ("none", recompute):
        options: dict[str, Any] = {"activation_checkpointing": checkpointing, "truncated_bptt_steps": steps}
        out = sequence_loss(model, text, dtype=F64, bos=3, **options)
        found.append([out.loss, out.nll_BT, *gradients(model, out.loss).values()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("recompute", ["none", "mini-batch"])
def test_as_many_steps_as_mini_batches_are_exact(recompute: Any) -> None:
    model, text = small_model(), tokens(23)  # five mini-batches, the last one shorter
    found = []
    for steps in (None, 5, 99):
        out = sequence_loss(model, text, activation_checkpointing=recompute, truncated_bptt_steps=steps)
        found.append([out.loss, *gradients(model, out.loss).values()])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    with torch.no_grad():  # where there is nothing to cut
        assert torch.equal(sequence_loss(model, text, truncated_bptt_steps=2).nll_BT, out.nll_BT)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_no_more_than_a_chunk_is_stored(steps: int) -> None:
    """While a sequence of nine mini-batches is walked, no more of them have a graph than a chunk has."""
    losses: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def inner_step(*args: Any) -> Any:
        result = EAGER.inner_step(*args)
        losses.append(weakref.ref(result[1]))
        alive.append(sum(some is not None and some.requires_grad for some in (ref() for ref in losses)))
        return result

    functions = EAGER._replace(inner_step=inner_step)
    sequence_loss(small_model(), tokens(45), truncated_bptt_steps=steps, functions=functions).loss.backward()
    assert len(alive) == 8 and max(alive) == steps


@pytest.mark.parametrize("recompute", ["none", "mini-batch"])
def test_with_caches_that_have_all_their_slots(recompute: Any) -> None:
    """As the compiled functions are given them, which are the same to the loop."""
    model, text, found = small_model(F64, **SHAPES["learned rates, low rank"]), tokens(28), []
    for functions in (EAGER, EAGER._replace(static_cache=True)):
        options: dict[str, Any] = {"activation_checkpointing": recompute, "truncated_bptt_steps": 3}
        out = sequence_loss(model, text, dtype=F64, functions=functions, **options)
        found.append([out.loss, out.nll_BT, *gradients(model, out.loss).values()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


def test_a_second_derivative_is_refused() -> None:
    model = small_model(F64)
    out = sequence_loss(model, tokens(23), dtype=F64, truncated_bptt_steps=2)
    weight = model.suffix[0].mlp.w_in
    [grad] = torch.autograd.grad(out.loss, weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="not written out"):
        torch.autograd.grad(grad.sum(), weight)


def test_rates_need_an_update_to_go_through() -> None:
    settings = ["inner_loop.learned_lr=true", "truncated_bptt_steps=2"]
    assert override(preset("tiny"), settings).train.truncated_bptt_steps == 2
    with pytest.raises(UserError, match="truncated_bptt_steps to 2 or more"):
        override(preset("tiny"), [settings[0], "truncated_bptt_steps=1"])
    assert override(preset("tiny"), ["truncated_bptt_steps=1"]).train.truncated_bptt_steps == 1
