"""Every operator against its plain twin, with first and second derivatives, in float64 on fresh random inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.ops.attention import attention, attention_once
from ttt_e2e.ops.elementwise import (
    clipped_step,
    clipped_step_reference,
    masked_softmax,
    masked_softmax_reference,
    rotate,
    rotate_reference,
    swiglu,
    swiglu_reference,
    unit_rms,
    unit_rms_reference,
)

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(lambda shape: [*shape[:-1], 2 * shape[-1]])


def angles(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(x.shape[-1] // 2, dtype=x.dtype) + 0.5
    return angle.cos(), angle.sin()


PAIRS = {
    "unit_rms": (lambda x: unit_rms(x, 1e-3), lambda x: unit_rms_reference(x, 1e-3)),
    "swiglu": (swiglu, swiglu_reference),
    "rotate": (lambda x: rotate(x, *angles(x)), lambda x: rotate_reference(x, *angles(x))),
    "masked_softmax": (
        lambda x: masked_softmax(x, torch.arange(x.shape[-1]) % 3 != 1),
        lambda x: masked_softmax_reference(x, torch.arange(x.shape[-1]) % 3 != 1),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**31))
def test_elementwise_equals_reference(name: str, shape: list[int], seed: int) -> None:
    """Value, gradient, and gradient of a function of the gradient."""
    fast, plain = PAIRS[name]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    g = torch.randn(fast(x).shape, generator=generator, dtype=torch.float64, requires_grad=True)
    a = torch.randn(shape, generator=generator, dtype=torch.float64)
    results = []
    for f in (fast, plain):
        y = f(x)
        (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
        results.append([y, dx, *torch.autograd.grad(dx, (x, g), a, allow_unused=True, materialize_grads=True)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PAIRS)
def test_elementwise_gradgradcheck(name: str) -> None:
    f = PAIRS[name][0]
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


@settings(max_examples=40, deadline=None)
@given(clip=st.floats(0.01, 10), scale=st.floats(0.001, 100), seed=st.integers(0, 999))
def test_clipped_step_equals_reference(clip: float, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(factor: float) -> list[torch.Tensor]:
        shapes = ((2, 3, 4), (2, 4, 2))
        draws = [factor * torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
        return [x.requires_grad_() for x in draws]

    weights, gradients, along = draw(1.0), draw(scale), draw(1.0)
    results = []
    for step in (clipped_step, clipped_step_reference):
        new, norm = step(weights, gradients, 0.7, clip)
        total = sum((a.detach() * n).sum() for a, n in zip(along, new, strict=True))
        results.append([*new, norm, *torch.autograd.grad(total, weights + gradients)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for b in range(2):
        expected = sum(g[b].square().sum() for g in gradients).sqrt()
        if expected < clip:
            torch.testing.assert_close(results[0][0][b], (weights[0] - 0.7 * gradients[0])[b], rtol=0, atol=1e-15)


def test_clipped_step_at_zero() -> None:
    """A gradient of zero moves nothing, and the derivative stays finite."""
    weights = [torch.randn(2, 3, 4, requires_grad=True)]
    gradients = [torch.zeros(2, 3, 4, requires_grad=True)]
    new, norm = clipped_step(weights, gradients, 1.0, 0.5)
    assert torch.equal(new[0], weights[0]) and (norm == 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(new[0].square().sum(), weights + gradients))


def literal_attention(q, k, v, window):  # type: ignore[no-untyped-def]
    """Query by query, key by key."""
    out = torch.zeros_like(q)
    offset, groups = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                first = 0 if window is None else max(0, i + offset - window + 1)
                keys, values = (x[b, h // groups, first : i + offset + 1] for x in (k, v))
                out[b, h, i] = (keys @ q[b, h, i] * q.shape[3] ** -0.5).softmax(0) @ values
    return out


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 23),
    cached=st.integers(0, 9),
    window=st.one_of(st.none(), st.integers(1, 30)),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    batch=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_attention(length: int, cached: int, window: int | None, heads: tuple[int, int], batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(h: int, t: int) -> torch.Tensor:
        return torch.randn(batch, h, t, 4, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = draw(heads[0], length), draw(heads[1], cached + length), draw(heads[1], cached + length)
    truth = literal_attention(q, k, v, window)
    cotangent = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad(truth, (q, k, v), cotangent)
    pieces = [x.split([cached, length], 2) for x in (k, v)]
    for ours in (attention(q, *pieces, window), attention(q, [k], [v], window), attention_once(q, k, v, window)):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
        for a, b in zip(torch.autograd.grad(ours, (q, k, v), cotangent), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_attention_gradgradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, t, 4, generator=generator, dtype=torch.float64) for h, t in ((2, 3), (1, 5), (1, 5)))
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradgradcheck(lambda q, k, v: attention(q, k.split([2, 3], 2), v.split([2, 3], 2), 4), inputs)


@pytest.mark.parametrize(("length", "keys", "window"), [(40, 40, 7), (5, 12, 8), (9, 9, None)])
def test_attention_in_bfloat16(length: int, keys: int, window: int | None) -> None:
    """To the rounding of bfloat16; on a CPU this takes a path of its own."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, t, 16, generator=generator) for h, t in ((4, length), (2, keys), (2, keys)))
    exact = attention_once(q, k, v, window)
    torch.testing.assert_close(attention(q, [k], [v], window), exact)
    rounded = attention_once(q.bfloat16(), k.bfloat16(), v.bfloat16(), window)
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)
