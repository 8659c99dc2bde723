"""Attention through PyTorch's kernel: memory, and slots of the keys that hold nothing."""

import pytest
import torch
from ops_helpers import Largest, assert_same, inputs, reference
from torch import Tensor

from ttt_e2e.ops import tuning
from ttt_e2e.ops.attention import causal_window_mask, sdpa


@pytest.mark.parametrize("few", [2**26, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_over_a_whole_text_is_linear(few: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "UNFUSED_SCORES", few)
    seen = []
    for length in (1000, 2000):
        q, k, v, _ = (x.detach() for x in inputs(1, (4, 2), length, length, 16, dtype=dtype))
        with Largest() as largest:
            ours = sdpa(q, k, v, 64)
        seen.append(largest.elements)
        tolerance = 1e-5 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(
            ours.double(), reference(*(x.double() for x in (q, k, v)), 64), rtol=tolerance, atol=tolerance
        )
    assert seen[1] <= 2.1 * seen[0]


def test_memory_with_a_cap_is_linear() -> None:
    """Without a graph, in the queries and not even in the keys of a text that they do not see."""
    q, k, v, _ = (x.detach() for x in inputs(1, (4, 2), 3000, 3000, 16, dtype=torch.float32))
    with Largest() as largest:
        sdpa(q, k, v, 64, cap=5.0)
    assert largest.elements == 4 * 256 * (256 + 64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize(
    ("queries", "keys", "window"), [(5, 12, 8), (5, 12, None), (1, 40, 3), (6, 6, None), (40, 40, 7)]
)
def test_empty_slots_are_not_seen(
    queries: int, keys: int, window: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    """The same number in every row, a number for each row, or a mask: outputs and gradients are those of the rest."""
    q, k, v, do = inputs(3, (4, 2), queries, keys, 16, dtype=dtype)
    for counts in ([0, 0, 0], [keys - queries] * 3, [keys - queries, 0, (keys - queries) // 2]):
        rows = [reference(*(x[i : i + 1].double() for x in (q, k, v)), window, count) for i, count in enumerate(counts)]
        expected = [torch.cat(rows), *torch.autograd.grad(torch.cat(rows), (q, k, v), do.double())]
        each = torch.tensor(counts)
        forms: list[tuple[Tensor, ...]] = [(each,), (each, causal_window_mask(queries, keys, window, q, each))]
        if len(set(counts)) == 1:
            forms.append((each[0],))
        for form in forms:
            y = sdpa(q, k, v, window, *form)
            assert_same([y, *torch.autograd.grad(y, (q, k, v), do)], expected, tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
)
@pytest.mark.parametrize("keys", [4, 7, 8, 30])
def test_one_query_needs_no_mask(keys: int, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v, do = inputs(2, (4, 2), 1, keys, 16, dtype=dtype)
    y = sdpa(q, k, v, 7)
    truth = reference(*(x.double() for x in (q, k, v)), 7)
    expected = [truth, *torch.autograd.grad(truth, (q, k, v), do.double())]
    assert_same([y, *torch.autograd.grad(y, (q, k, v), do)], expected, tolerance)


@pytest.mark.parametrize("queries", [1, 5, 20])
def test_heads_that_share_keys_are_as_heads_with_keys_of_their_own(queries: int) -> None:
    q, k, v, _ = inputs(2, (6, 2), queries, 12 + queries, 16, dtype=torch.bfloat16)
    shared = sdpa(q, k, v, 12)
    torch.testing.assert_close(shared, sdpa(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), 12))
