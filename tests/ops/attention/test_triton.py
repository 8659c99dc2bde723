"""The Triton kernels against attention built from PyTorch's own operations.

On a machine with a GPU they run there, elsewhere in the interpreter, where test_triton_interpreter.py starts them.
"""

import os

import pytest
import torch
from ops_helpers import (
    CASES,
    EMPTY_SLOTS,
    assert_same,
    directions,
    draw,
    draw_sink,
    inputs,
    literal_with_sink,
    two_orders,
    two_orders_of_reference,
    two_orders_with_sink,
)

from ttt_e2e.ops import tuning

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def obstacle() -> str:
    """Why the kernels cannot run in this process; empty if they can."""
    if not INTERPRETED:
        return "" if torch.cuda.is_available() else "needs a GPU or the interpreter"
    import numpy
    import triton

    triton_version, numpy_version = (tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, numpy))
    # Loops over computed bounds raise a TypeError there.
    return "needs Triton 3.7 or NumPy 2.3" if triton_version < (3, 7) and numpy_version > (2, 3) else ""


RUNNABLE = pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "none")


@RUNNABLE
@pytest.mark.parametrize("case", CASES)
def test_equals_reference_to_second_order(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths of several blocks of 16 and a rest."""
    small = (16, 16, 1, 1)
    monkeypatch.setattr(tuning, "TRITON_FLOAT32", (small,))
    queries, keys, window, num_new_keys = CASES[case].values()
    # Which head is which does not depend on the case, and the interpreter takes its time for each.
    heads = (4, 2) if case == "cached keys" else (2, 1)
    q, k, v, do = inputs(1, heads, queries, keys, 16, dtype=torch.float32, device=DEVICE)
    abc = directions(q, k, num_new_keys)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, do)]
    theirs = two_orders_of_reference(*wide, tuple(x.double() for x in abc), num_new_keys, window)
    assert_same(two_orders(q, k, v, do, abc, num_new_keys, window, "triton"), theirs, 1e-5)


@RUNNABLE
@pytest.mark.parametrize(("queries", "keys", "num_new_keys", "window", "num_empty_slots"), EMPTY_SLOTS)
def test_empty_slots_are_not_seen(
    queries: int,
    keys: int,
    num_new_keys: int,
    window: int | None,
    num_empty_slots: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = (16, 16, 1, 1)
    monkeypatch.setattr(tuning, "TRITON_FLOAT32", (small,))
    q, k, v, do = inputs(1, (2, 1), queries, keys, 16, dtype=torch.float32, device=DEVICE)
    abc = directions(q, k, num_new_keys)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, do)]
    theirs = two_orders_of_reference(*wide, tuple(x.double() for x in abc), num_new_keys, window, num_empty_slots)
    assert_same(two_orders(q, k, v, do, abc, num_new_keys, window, "triton", num_empty_slots), theirs, 1e-5)


@RUNNABLE
@pytest.mark.parametrize(("queries", "keys", "num_new_keys", "window"), [(70, 150, 40, 90), (33, 64, 64, None)])
@pytest.mark.parametrize(("block_t", "block_s"), [(16, 32), (32, 16)])
def test_blocks_of_different_sizes(
    queries: int,
    keys: int,
    num_new_keys: int,
    window: int | None,
    block_t: int,
    block_s: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some blocks are seen whole by every query."""
    blocks = (block_t, block_s, 4, 1)
    monkeypatch.setattr(tuning, "TRITON_FLOAT32", (blocks,))
    q, k, v, do = inputs(1, (1, 1), queries, keys, 16, dtype=torch.float32, device=DEVICE)
    abc = directions(q, k, num_new_keys)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, do)]
    theirs = two_orders_of_reference(*wide, tuple(x.double() for x in abc), num_new_keys, window)
    assert_same(two_orders(q, k, v, do, abc, num_new_keys, window, "triton"), theirs, 1e-5)


@RUNNABLE
@pytest.mark.parametrize("width", [5, 64, 256] if INTERPRETED else [5, 16, 32, 64, 80, 128, 256])  # it takes long there
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_default_blocks_of_every_head_dimension(width: int, dtype: torch.dtype, tolerance: float) -> None:
    """With the blocks of `tuning`, and a q whose rows are not contiguous."""
    q, k, v, do = inputs(1, (1, 1), 70, 140, width, dtype=dtype, device=DEVICE)
    q = draw(1, 70, 1, width, dtype=dtype, device=DEVICE).detach().transpose(1, 2).requires_grad_()
    abc = directions(q, k, 70)
    ours = two_orders(q, k, v, do, abc, 70, 100, "triton")
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, do)]
    assert_same(ours, two_orders_of_reference(*wide, tuple(x.double() for x in abc), 70, 100), tolerance)


@RUNNABLE
@pytest.mark.parametrize(("queries", "keys", "window"), [(20, 20, 7), (9, 40, 17)])
def test_sink_to_second_order(queries: int, keys: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from ttt_e2e.ops.attention.operators import windowed_attention

    monkeypatch.setattr(tuning, "TRITON_FLOAT32", ((16, 16, 1, 1),))
    q, k, v, do = inputs(1, (4, 2), queries, keys, 16, dtype=torch.float32, device=DEVICE)
    sink = draw_sink((4, 2), 16, dtype=torch.float32, device=DEVICE)
    ours = windowed_attention(q, k, v, window, sink=sink, implementation="triton")
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, *sink, do)]
    theirs = literal_with_sink(*wide[:3], window, type(sink)(*wide[3:5]))
    expected = two_orders_with_sink(theirs, tuple(wide[:5]), wide[5])
    assert_same(two_orders_with_sink(ours, (q, k, v, *sink), do), expected, 1e-5)


@RUNNABLE
@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 16), (torch.float32, 272)])
def test_refuses_what_kernels_cannot_serve(dtype: torch.dtype, width: int) -> None:
    from ttt_e2e.ops.attention.operators import windowed_attention

    q, k, v, _ = inputs(1, (1, 1), 3, 5, width, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match="implementation 'triton' needs"):
        windowed_attention(q, k, v, implementation="triton")
