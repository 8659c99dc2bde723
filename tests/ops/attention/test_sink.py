"""Attention with a sink, in every implementation, against a softmax with one more column written out for each query."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import assert_same, draw_sink, inputs, literal_with_sink, two_orders_with_sink
from torch import Tensor

from ttt_e2e.ops import tuning
from ttt_e2e.ops.attention import Sink, inner_loop_attention, sdpa, windowed_attention
from ttt_e2e.ops.derivatives import definitions

SIZES = dict(
    length=st.integers(1, 13),
    cached=st.integers(0, 9),
    window=st.one_of(st.none(), st.integers(1, 15)),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    batch=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)


@settings(max_examples=40, deadline=None)
@given(**SIZES, tile=st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_every_implementation_equals_literal_attention_to_second_order(
    length: int, cached: int, window: int | None, heads: tuple[int, int], batch: int, seed: int, tile: tuple[int, int]
) -> None:
    q, k, v, do = inputs(batch, heads, length, cached + length, 4, seed)
    sink = draw_sink(heads, 4, seed)
    variables = (q, k, v, *sink)
    expected = two_orders_with_sink(literal_with_sink(q, k, v, window, sink), variables, do)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "TILE_QUERIES", tile[0])
        patch.setattr(tuning, "TILE_KEYS", tile[1])
        for name in ("reference", "tiled"):
            ours = windowed_attention(q, k, v, window, sink=sink, implementation=name)
            assert_same(two_orders_with_sink(ours, variables, do), expected, 1e-10)
        for cap in (None, 0.7):
            truth = literal_with_sink(q, k, v, window, sink, cap=cap)
            y = sdpa(q, k, v, window, sink=sink, cap=cap)
            found = (
                torch.autograd.grad(x, variables, do, allow_unused=True, materialize_grads=True) for x in (y, truth)
            )
            ours, expected_first = found
            assert_same([y, *ours], [truth, *expected_first], 1e-10)


@settings(max_examples=40, deadline=None)
@given(**SIZES, empty=st.integers(0, 4), cap=st.sampled_from([None, 0.7]))
def test_inner_loop_attention_differentiates_its_vjp(
    length: int,
    cached: int,
    window: int | None,
    heads: tuple[int, int],
    batch: int,
    seed: int,
    empty: int,
    cap: float | None,
) -> None:
    """Kept scores, tiles and the definition, capped scores; with empty slots in front of the keys and without."""
    q, k, v, g = inputs(batch, heads, length, cached + length, 4, seed)
    sink = draw_sink(heads, 4, seed)
    new_k, new_v = k[:, :, cached:], v[:, :, cached:]
    truth = literal_with_sink(
        q, torch.cat((k[:, :, :cached], new_k), 2), torch.cat((v[:, :, :cached], new_v), 2), window, sink, 0, cap
    )
    outputs = [truth, *torch.autograd.grad(truth, (q, new_k, new_v), g, create_graph=True)]
    variables = (q, k, v, g, *sink)

    def gradients(outputs: list[Tensor]) -> list[Tensor]:
        along = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t) for t in outputs]
        found = torch.autograd.grad(outputs, variables, along, allow_unused=True, materialize_grads=True)
        return [*outputs, *found]

    expected = gradients(outputs)
    slots = [torch.cat((torch.full_like(x[:, :, :1], 7.0).expand(-1, -1, empty, -1), x), 2) for x in (k, v)]
    with pytest.MonkeyPatch.context() as patch:
        for kept, defined in ((2**24, False), (0, False), (2**24, True)):
            patch.setattr(tuning, "KEPT_SCORES", {"cpu": kept})
            with definitions() if defined else nullcontext():
                y, vjp = inner_loop_attention(q, *slots, window, torch.tensor(empty), sink=sink, cap=cap)
                ours = [y, *vjp(g)]
            assert_same(gradients(ours), expected, 1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize(("queries", "keys", "window"), [(5, 12, 8), (1, 40, 3), (40, 40, 7), (6, 9, 2)])
def test_rows_with_different_numbers_of_empty_slots(
    queries: int,
    keys: int,
    window: int,
    dtype: torch.dtype,
    tolerance: float,
    cap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "TILE_QUERIES", 4)
    q, k, v, do = inputs(3, (4, 2), queries, keys, 16, dtype=dtype)
    sink = draw_sink((4, 2), 16, dtype=dtype)
    variables, counts = (q, k, v, *sink), [keys - queries, 0, (keys - queries) // 2]
    wide = Sink(*(x.double() for x in sink))
    rows = [
        literal_with_sink(*(x[i : i + 1].double() for x in (q, k, v)), window, wide, count, cap)
        for i, count in enumerate(counts)
    ]
    expected = [torch.cat(rows), *torch.autograd.grad(torch.cat(rows), variables, do.double())]
    y = sdpa(q, k, v, window, torch.tensor(counts), sink=sink, cap=cap)
    assert_same([y, *torch.autograd.grad(y, variables, do)], expected, tolerance)


def test_gradgradcheck_with_a_cap() -> None:
    q, k, v, _ = inputs(1, (2, 1), 3, 5, 2)
    sink = draw_sink((2, 1), 2)

    def attention(q: Tensor, k: Tensor, v: Tensor, logit_H: Tensor, value_GK: Tensor) -> Tensor:
        return inner_loop_attention(q, k, v, 4, sink=Sink(logit_H, value_GK), cap=0.7)[0]

    assert torch.autograd.gradcheck(attention, (q, k, v, *sink))
    assert torch.autograd.gradgradcheck(attention, (q, k, v, *sink))


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_gradgradcheck(name: str) -> None:
    q, k, v, _ = inputs(1, (2, 1), 3, 5, 2)
    sink = draw_sink((2, 1), 2)

    def attention(q: Tensor, k: Tensor, v: Tensor, logit_H: Tensor, value_GK: Tensor) -> Tensor:
        return windowed_attention(q, k, v, 4, sink=Sink(logit_H, value_GK), implementation=name)

    assert torch.autograd.gradcheck(attention, (q, k, v, *sink))
    assert torch.autograd.gradgradcheck(attention, (q, k, v, *sink))


def test_inside_the_window_nothing_changes() -> None:
    """To the last bit, however large the sink is."""
    q, k, v, _ = inputs(2, (4, 2), 9, 9, 4)
    sink = Sink(torch.full((4,), 50.0).double(), torch.full((2, 4), 1e3).double())
    for attention in (sdpa, windowed_attention, lambda *args, **options: inner_loop_attention(*args, **options)[0]):
        with_sink, without = attention(q, k, v, 6, sink=sink), attention(q, k, v, 6)  # type: ignore[operator]
        assert torch.equal(with_sink[:, :, :6], without[:, :, :6])
        assert (with_sink[:, :, 6:] - without[:, :, 6:]).abs().min() > 1
