"""The causal window as a mask."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ttt_e2e.ops.attention import causal_window_mask


@given(
    queries=st.integers(1, 9),
    cached=st.integers(0, 9),
    window=st.one_of(st.none(), st.integers(1, 20)),
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=3),
)
def test_causal_window_mask_shows_the_last_keys_up_to_the_querys_own(
    queries: int, cached: int, window: int | None, counts: list[int]
) -> None:
    keys, like = cached + queries, torch.empty(0, dtype=torch.bfloat16)
    by_row = causal_window_mask(queries, keys, window, like, torch.tensor(counts))
    assert by_row.shape == (len(counts), 1, queries, keys) and by_row.dtype == torch.bfloat16
    for mask, count in zip(by_row[:, 0], counts, strict=True):
        assert torch.equal(mask, causal_window_mask(queries, keys, window, like, torch.tensor(count)))
        for i in range(queries):
            own = cached + i
            for key in range(keys):
                seen = key <= own and (window is None or key > own - window) and key >= count
                assert mask[i, key] == (0.0 if seen else -torch.inf)
    assert torch.equal(
        causal_window_mask(queries, keys, window, like),
        causal_window_mask(queries, keys, window, like, torch.tensor(0)),
    )
