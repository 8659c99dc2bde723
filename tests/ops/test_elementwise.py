"""Every operator against its plain twin, with first and second derivatives, in float64 on fresh random inputs."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from helpers import plain_twins
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ttt_e2e.ops import elementwise as ops
from ttt_e2e.ops.attention import inner_loop_attention, sdpa
from ttt_e2e.ops.clipped_step import clipped_step, clipped_step_, clipped_step_reference
from ttt_e2e.ops.elementwise import Vjp
from ttt_e2e.ops.linear import OuterProductFactors, batched_linear, weight_gradient

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(lambda shape: [*shape[:-1], 2 * shape[-1]])


def angles(x: Tensor) -> tuple[Tensor, Tensor]:
    angle = torch.arange(x.shape[-1] // 2, dtype=x.dtype) + 0.5
    return angle.cos(), angle.sin()


def norm_weight(x: Tensor) -> Tensor:
    return torch.linspace(-0.5, 2, x.shape[-1], dtype=x.dtype)


def some_targets(x: Tensor) -> Tensor:
    return (torch.arange(x[..., 0].numel()) % x.shape[-1]).view(x.shape[:-1])


# Every function of one tensor, with its pull, and the plain twin.
PAIRS: dict[str, Callable[[Tensor, bool], tuple[Tensor, Vjp]]] = {
    "rms_norm": lambda x, plain: (ops.rms_norm_reference if plain else ops.rms_norm)(x, norm_weight(x), 1e-3),
    "swiglu": lambda x, plain: (ops.swiglu_reference if plain else ops.swiglu)(x),
    "rotate": lambda x, plain: (ops.rotate_reference if plain else ops.rotate)(x, *angles(x)),
    "cross_entropy": lambda x, plain: (ops.cross_entropy_reference if plain else ops.cross_entropy)(x, some_targets(x)),
}


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**31))
def test_elementwise_equals_reference(name: str, shape: list[int], seed: int) -> None:
    """Value, pull and gradient, and the gradients of the pull; autograd's own gradient of the twin decides."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    g = torch.randn(PAIRS[name](x, True)[0].shape, generator=generator, dtype=torch.float64, requires_grad=True)
    a = torch.randn(shape, generator=generator, dtype=torch.float64)

    def derivatives(y: Tensor, dx: Tensor) -> list[Tensor]:
        return [
            y,
            dx,
            *torch.autograd.grad(dx, (x, g), a, retain_graph=True, allow_unused=True, materialize_grads=True),
        ]

    y, _ = PAIRS[name](x, True)
    expected = derivatives(y, torch.autograd.grad(y, x, g, create_graph=True)[0])
    for plain in (True, False):
        y, vjp = PAIRS[name](x, plain)
        for dx in (vjp(g), torch.autograd.grad(y, x, g, create_graph=True)[0]):
            for ours, theirs in zip(derivatives(y, dx), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PAIRS)
def test_elementwise_gradgradcheck(name: str) -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: PAIRS[name](x, False)[0], x)
    assert torch.autograd.gradgradcheck(lambda x: PAIRS[name](x, False)[0], x)


@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 4)])
def test_gradients_of_a_norms_weight(shape: tuple[int, ...]) -> None:
    """Through the value and through the pull."""
    generator = torch.Generator().manual_seed(0)
    x, g, w = (torch.randn(s, dtype=torch.float64, generator=generator) for s in (shape, shape, shape[-2:]))

    def both(w: Tensor) -> Tensor:
        y, vjp = ops.rms_norm(x, w, 1e-3)
        return torch.cat((y, vjp(g)))

    assert torch.autograd.gradcheck(both, w.requires_grad_())


def test_linear_gradgradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(s, dtype=torch.float64, generator=generator) for s in ((2, 3, 4), (2, 5, 4), (2, 3, 5)))
    torch.testing.assert_close(batched_linear(x, w), torch.einsum("btd,bed->bte", x, w))
    torch.testing.assert_close(weight_gradient(g, x), torch.einsum("bte,btd->bed", g, x))
    inputs = tuple(t.requires_grad_() for t in (x, w, g))
    for f in (lambda x, w, g: batched_linear(x, w), lambda x, w, g: weight_gradient(g, x)):
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)
    assert weight_gradient(g, x).is_contiguous()
    assert torch.autograd.grad(batched_linear(x, w).sum(), w)[0].is_contiguous()


@settings(max_examples=40, deadline=None)
@given(clip=st.floats(0.01, 10), scale=st.floats(0.001, 100), seed=st.integers(0, 999))
def test_clipped_step_equals_reference(clip: float, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(factor: float) -> list[Tensor]:
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


@settings(max_examples=20, deadline=None)
@given(clip=st.floats(0.01, 10), seed=st.integers(0, 999))
def test_clipped_step_without_recording_gives_the_same_in_the_gradients_memory(clip: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights, gradients = ([torch.randn(s, generator=generator) for s in ((2, 3, 4), (2, 4, 2))] for _ in range(2))
    weights[0] = weights[0][:1].expand(2, -1, -1)  # as a text's first weights are
    before = [w.clone() for w in weights]
    expected, norm = clipped_step(weights, gradients, 0.7, clip)
    with torch.no_grad():
        found, norm_too = clipped_step(weights, gradients, 0.7, clip)
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
)
def test_clipped_step_in_place_multiplies_nothing_out(
    batch: int, tokens: int, shapes: list[tuple[int, int]], scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    weights = [draw(*shape) for shape in shapes]
    factors = [OuterProductFactors(scale * draw(tokens, e), draw(tokens, d)) for e, d in shapes]
    expected, norm = clipped_step_reference(weights, [weight_gradient(*pair) for pair in factors], 0.7, 0.5)
    found = clipped_step_(weights, factors, 0.7, 0.5)
    torch.testing.assert_close(found, norm, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(weights, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("recorded", [True, False])
def test_norms_of_large_matrices_are_exact_to_single_precision(recorded: bool) -> None:
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

    def draw(h: int, t: int) -> Tensor:
        return torch.randn(batch, h, t, 4, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = draw(heads[0], length), draw(heads[1], cached + length), draw(heads[1], cached + length)
    truth = literal_attention(q, k, v, window)
    cotangent = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad(truth, (q, k, v), cotangent)
    y, vjp = inner_loop_attention(q, k, v, window)
    for ours in (y, sdpa(q, k, v, window)):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
        for a, b in zip(torch.autograd.grad(ours, (q, k, v), cotangent, retain_graph=True), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    own = [expected[0], *(x[:, :, cached:] for x in expected[1:])]
    for a, b in zip(vjp(cotangent), own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(
    length=st.integers(1, 6),
    cached=st.integers(0, 4),
    empty=st.integers(0, 4),
    window=st.one_of(st.none(), st.integers(1, 8)),
    heads=st.sampled_from([(2, 2), (4, 2)]),
    seed=st.integers(0, 2**31),
)
def test_attention_with_its_pull(
    length: int, cached: int, empty: int, window: int | None, heads: tuple[int, int], seed: int
) -> None:
    """Value, pull, derivatives, against the plain twin that a compiler is given; empty slots do not count."""
    generator = torch.Generator().manual_seed(seed)

    def draw(h: int, t: int) -> Tensor:
        return torch.randn(2, h, t, 4, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = draw(heads[0], length), draw(heads[1], cached + length), draw(heads[1], cached + length)
    g = draw(heads[0], length)
    slots = [torch.cat((torch.full_like(x[:, :, :1], 7.0).expand(-1, -1, empty, -1), x), 2) for x in (k, v)]
    results = []
    for plain, padded in ((False, False), (True, False), (False, True), (True, True)):
        with plain_twins() if plain else nullcontext():
            keys = (q, *slots) if padded else (q, k, v)
            y, vjp = inner_loop_attention(*keys, window, torch.tensor(empty) if padded else None)
            outputs = [y, *vjp(g)]
        along = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t) for t in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, (q, k, v, g), along)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("length", "keys", "window"), [(40, 40, 7), (5, 12, 8), (9, 9, None)])
def test_attention_in_bfloat16(length: int, keys: int, window: int | None) -> None:
    """To the rounding of bfloat16; on a CPU this takes a path of its own."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, t, 16, generator=generator) for h, t in ((4, length), (2, keys), (2, keys)))
    exact = sdpa(q, k, v, window)
    torch.testing.assert_close(inner_loop_attention(q, k, v, window)[0], exact)
    rounded = sdpa(q.bfloat16(), k.bfloat16(), v.bfloat16(), window)
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)
