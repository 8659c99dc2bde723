"""The inner loop's update against its definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ttt_e2e.ops.clipped_step import clipped_step, clipped_step_, clipped_step_reference
from ttt_e2e.ops.linear import OuterProductFactors, weight_gradient

RATES = st.sampled_from([0.7, torch.tensor(0.7), torch.tensor([0.7, 0.2])])


@settings(max_examples=40, deadline=None)
@given(clip=st.floats(0.01, 10), scale=st.floats(0.001, 100), seed=st.integers(0, 999), rates=st.booleans())
def test_clipped_step_equals_reference(clip: float, scale: float, seed: int, rates: bool) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(factor: float) -> list[Tensor]:
        shapes = ((2, 3, 4), (2, 4, 2))
        draws = [factor * torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
        return [x.requires_grad_() for x in draws]

    weights, gradients, along = draw(1.0), draw(scale), draw(1.0)
    lr = torch.tensor([0.7, 0.2], dtype=torch.float64, requires_grad=True) if rates else 0.7
    inputs = [*weights, *gradients, *([lr] if isinstance(lr, Tensor) else [])]
    results = []
    for step in (clipped_step, clipped_step_reference):
        new, norm = step(weights, gradients, lr, clip)
        total = sum((a.detach() * n).sum() for a, n in zip(along, new, strict=True))
        results.append([*new, norm, *torch.autograd.grad(total, inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for b in range(2):
        expected = sum(g[b].square().sum() for g in gradients).sqrt()
        if expected < clip:
            torch.testing.assert_close(results[0][0][b], (weights[0] - 0.7 * gradients[0])[b], rtol=0, atol=1e-15)


@settings(max_examples=20, deadline=None)
@given(clip=st.floats(0.01, 10), seed=st.integers(0, 999), lr=RATES)
def test_clipped_step_without_autograd_writes_to_the_gradients(clip: float, seed: int, lr: float | Tensor) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights, gradients = ([torch.randn(s, generator=generator) for s in ((2, 3, 4), (2, 4, 2))] for _ in range(2))
    weights[0] = weights[0][:1].expand(2, -1, -1)  # as a text's first weights are
    before = [w.clone() for w in weights]
    expected, norm = clipped_step(weights, gradients, lr, clip)
    with torch.no_grad():
        found, norm_too = clipped_step(weights, gradients, lr, clip)
    for ours, theirs, gradient in zip(found, expected, gradients, strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() == gradient.data_ptr()
    assert torch.equal(norm, norm_too) and all(map(torch.equal, weights, before))


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 9),
    shapes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3),
    scale=st.sampled_from([0.0, 1e-3, 1.0]),
    seed=st.integers(0, 2**31),
    rates=st.booleans(),
)
def test_clipped_step_in_place_equals_reference(
    batch: int, tokens: int, shapes: list[tuple[int, int]], scale: float, seed: int, rates: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    weights = [draw(*shape) for shape in shapes]
    factors = [OuterProductFactors(scale * draw(tokens, e), draw(tokens, d)) for e, d in shapes]
    lr = torch.rand(len(shapes), generator=generator, dtype=torch.float64) if rates else 0.7
    expected, norm = clipped_step_reference(weights, [weight_gradient(*pair) for pair in factors], lr, 0.5)
    found = clipped_step_(weights, factors, lr, 0.5)
    torch.testing.assert_close(found, norm, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(weights, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("recorded", [True, False])
def test_norms_of_large_matrices_are_exact_in_float32(recorded: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [
        OuterProductFactors(*(torch.randn(2, 16, n, generator=generator) for n in shape))
        for shape in ((2816, 256), (9, 1))
    ]
    gradients = [weight_gradient(*pair) for pair in factors]
    weights = [torch.zeros_like(g) for g in gradients]
    exact = torch.stack([g.double().square().sum((1, 2)) for g in gradients]).sum(0).sqrt()
    with torch.set_grad_enabled(recorded):
        found = [clipped_step(weights, [g.clone() for g in gradients], 0.7, 1.0)[1]]
    found.append(clipped_step_([w.clone() for w in weights], factors, 0.7, 1.0))
    for norm in found:
        torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)


def test_clipped_step_is_finite_at_zero() -> None:
    """A gradient of zero moves nothing, and the derivative stays finite."""
    weights = [torch.randn(2, 3, 4, requires_grad=True)]
    gradients = [torch.zeros(2, 3, 4, requires_grad=True)]
    new, norm = clipped_step(weights, gradients, 1.0, 0.5)
    assert torch.equal(new[0], weights[0]) and (norm == 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(new[0].square().sum(), weights + gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [0.1, 1.0, 3.0, 1e-18, 1e18])
def test_a_gradient_whose_norm_is_the_clip_is_clipped(clip: float, dtype: torch.dtype) -> None:
    """As in optax: only a smaller norm is left alone, so that the derivative goes through the norm, once either way."""
    gradient = torch.tensor([[[clip, 0.0]]], dtype=dtype, requires_grad=True)
    weight = torch.zeros_like(gradient, requires_grad=True)
    along = torch.tensor([[[1.0, 1.0]]], dtype=dtype)
    torch._dynamo.reset()
    compiled = torch.compile(clipped_step, backend="aot_eager", fullgraph=True)
    for step in (clipped_step, clipped_step_reference, compiled):
        [new], norm = step([weight], [gradient], 1.0, clip)
        assert torch.equal(new, -gradient) and norm == gradient[0, 0, 0]
        # Of g min(1, c / |g|) at |g| = c: the part along g is lost, the part across it stays.
        [found] = torch.autograd.grad((along * new).sum(), gradient)
        torch.testing.assert_close(found, torch.tensor([[[0.0, -1.0]]], dtype=dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip", [1e-18, 1.0, 1e18, math.inf])
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0, 1e12])
def test_clipped_step_is_exact_and_finite_at_any_clip(clip: float, scale: float) -> None:
    draws = torch.randn(3, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    weights, gradients = [draws[0].requires_grad_()], [(scale * draws[1]).requires_grad_()]
    exact = gradients[0].double()
    norm_B = exact.square().sum((1, 2)).sqrt()
    expected = weights[0].double() - exact * torch.where(norm_B < clip, 1.0, clip / norm_B)[:, None, None]
    for step in (clipped_step, clipped_step_reference):
        [new], found = step(weights, gradients, 1.0, clip)
        torch.testing.assert_close(found.double(), norm_B, rtol=1e-6, atol=0)
        torch.testing.assert_close(new.double(), expected, rtol=1e-6, atol=1e-6)
        assert all(g.isfinite().all() for g in torch.autograd.grad((new * draws[2]).sum(), weights + gradients))
    factors = [OuterProductFactors(gradients[0].detach().mT, torch.eye(4).expand(2, 4, 4))]
    in_place = [weights[0].detach().clone()]
    torch.testing.assert_close(clipped_step_(in_place, factors, 1.0, clip).double(), norm_B, rtol=1e-6, atol=0)
    torch.testing.assert_close(in_place[0].double(), expected.detach(), rtol=1e-6, atol=1e-6)
