"""The inner loop's attention and PyTorch's, against attention computed query by query."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ttt_e2e.ops.attention import inner_loop_attention, sdpa
from ttt_e2e.ops.derivatives import definitions


def literal_attention(q, k, v, window, cap):  # type: ignore[no-untyped-def]
    """Query by query, key by key."""
    out = torch.zeros_like(q)
    offset, groups = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                first = 0 if window is None else max(0, i + offset - window + 1)
                keys, values = (x[b, h // groups, first : i + offset + 1] for x in (k, v))
                scores = keys @ q[b, h, i] * q.shape[3] ** -0.5
                out[b, h, i] = (scores if cap is None else cap * (scores / cap).tanh()).softmax(0) @ values
    return out


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 23),
    cached=st.integers(0, 9),
    window=st.one_of(st.none(), st.integers(1, 30)),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    batch=st.integers(1, 2),
    cap=st.sampled_from([None, 0.7]),
    seed=st.integers(0, 2**31),
)
def test_equals_literal_attention(
    length: int, cached: int, window: int | None, heads: tuple[int, int], batch: int, cap: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(h: int, t: int) -> Tensor:
        return torch.randn(batch, h, t, 4, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = draw(heads[0], length), draw(heads[1], cached + length), draw(heads[1], cached + length)
    truth = literal_attention(q, k, v, window, cap)
    cotangent = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad(truth, (q, k, v), cotangent)
    y, vjp = inner_loop_attention(q, k, v, window, cap=cap)
    for ours in (y, sdpa(q, k, v, window, cap=cap)):
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
def test_vjp_equals_the_definition_and_skips_empty_slots(
    length: int, cached: int, empty: int, window: int | None, heads: tuple[int, int], seed: int
) -> None:
    """Value, vjp and derivatives, against the definition that a compiler is given."""
    generator = torch.Generator().manual_seed(seed)

    def draw(h: int, t: int) -> Tensor:
        return torch.randn(2, h, t, 4, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = draw(heads[0], length), draw(heads[1], cached + length), draw(heads[1], cached + length)
    g = draw(heads[0], length)
    slots = [torch.cat((torch.full_like(x[:, :, :1], 7.0).expand(-1, -1, empty, -1), x), 2) for x in (k, v)]
    results = []
    for plain, padded in ((False, False), (True, False), (False, True), (True, True)):
        with definitions() if plain else nullcontext():
            keys = (q, *slots) if padded else (q, k, v)
            y, vjp = inner_loop_attention(*keys, window, torch.tensor(empty) if padded else None)
            outputs = [y, *vjp(g)]
        along = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t) for t in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, (q, k, v, g), along)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("length", "keys", "window"), [(40, 40, 7), (5, 12, 8), (9, 9, None)])
def test_bfloat16_stays_close(length: int, keys: int, window: int | None) -> None:
    """To the rounding of bfloat16; on a CPU this takes a path of its own."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, t, 16, generator=generator) for h, t in ((4, length), (2, keys), (2, keys)))
    exact = sdpa(q, k, v, window)
    torch.testing.assert_close(inner_loop_attention(q, k, v, window)[0], exact)
    rounded = sdpa(q.bfloat16(), k.bfloat16(), v.bfloat16(), window)
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)
