"""The operators of attention against attention built from PyTorch's own differentiable operations."""

import itertools
import shutil
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import (
    CASES,
    EMPTY_SLOTS,
    Largest,
    assert_same,
    directions,
    draw,
    inputs,
    reference,
    two_orders,
    two_orders_of_reference,
)
from torch import Tensor

from ttt_e2e.ops import tuning
from ttt_e2e.ops.attention import tiled
from ttt_e2e.ops.attention.mask import Attended, KeyView
from ttt_e2e.ops.attention.operators import (
    attention_backward,
    attention_double_backward,
    attention_forward,
    windowed_attention,
)

COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_equals_reference_to_second_order(
    name: str, case: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "TILE_QUERIES", 4)
    monkeypatch.setattr(tuning, "TILE_KEYS", 3)
    queries, keys, window, num_new_keys = CASES[case].values()
    q, k, v, do = inputs(2, heads, queries, keys, 4)
    abc = directions(q, k, num_new_keys)
    ours, theirs = (
        two_orders(q, k, v, do, abc, num_new_keys, window, name),
        two_orders_of_reference(q, k, v, do, abc, num_new_keys, window),
    )
    assert_same(ours, theirs, 1e-12)


@pytest.mark.parametrize(("queries", "keys", "num_new_keys", "window", "num_empty_slots"), EMPTY_SLOTS)
@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_empty_slots_are_not_seen(
    name: str,
    queries: int,
    keys: int,
    num_new_keys: int,
    window: int | None,
    num_empty_slots: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "TILE_QUERIES", 4)
    monkeypatch.setattr(tuning, "TILE_KEYS", 3)
    q, k, v, do = inputs(2, (4, 2), queries, keys, 4)
    abc = directions(q, k, num_new_keys)
    theirs = two_orders_of_reference(q, k, v, do, abc, num_new_keys, window, num_empty_slots)
    assert_same(two_orders(q, k, v, do, abc, num_new_keys, window, name, num_empty_slots), theirs, 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(1, 23),
    cached=st.integers(0, 19),
    window=st.one_of(st.none(), st.integers(1, 50)),
    share=st.floats(0, 1),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    batch=st.integers(1, 2),
    tile=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**31),
)
def test_tiled_equals_reference_at_any_size(
    queries: int,
    cached: int,
    window: int | None,
    share: float,
    heads: tuple[int, int],
    batch: int,
    tile: tuple[int, int],
    seed: int,
) -> None:
    keys = queries + cached
    num_new_keys = max(1, round(share * keys))
    q, k, v, do = inputs(batch, heads, queries, keys, 4, seed)
    abc = directions(q, k, num_new_keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "TILE_QUERIES", tile[0])
        patch.setattr(tuning, "TILE_KEYS", tile[1])
        tiled = two_orders(q, k, v, do, abc, num_new_keys, window, "tiled")
    assert_same(tiled, two_orders(q, k, v, do, abc, num_new_keys, window, "reference"), 1e-10)


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_logsumexp_is_float32(name: str) -> None:
    q, k, v, _ = inputs(1, (4, 2), 3, 5, 8, dtype=torch.bfloat16)
    _, lse = attention_forward(q, k, v, 2, None, name)
    assert lse.dtype == torch.float32
    scores = q.double()[0, 3, 1] @ k.double()[0, 1, 2:4].T * 8**-0.5
    torch.testing.assert_close(lse[0, 3, 1].double(), scores.logsumexp(0), rtol=0.01, atol=0.01)


def test_large_scores_stay_finite() -> None:
    """Scores beyond the range of exp, in tiles whose first rows see nothing."""
    q, k, v, do = inputs(1, (1, 1), 600, 900, 4)
    q = (q * 500).detach().requires_grad_()
    abc = directions(q, k, 600)
    tiled = two_orders(q, k, v, do, abc, 600, 40, "tiled")
    assert all(x.isfinite().all() for x in tiled)
    assert_same(tiled, two_orders_of_reference(q, k, v, do, abc, 600, 40), 1e-10)


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_gradgradcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TILE_QUERIES", 2)
    monkeypatch.setattr(tuning, "TILE_KEYS", 2)
    q, k, v, _ = inputs(1, (2, 1), 3, 5, 2)
    assert torch.autograd.gradcheck(lambda *x: windowed_attention(*x, 4, implementation=name), (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *x: windowed_attention(*x, 4, implementation=name), (q, k, v))


def test_inner_gradient_gradcheck() -> None:
    """With cached keys as constants, through a forward pass whose o and lse depend on the inputs too."""
    q, k, v, do = inputs(1, (2, 1), 3, 5, 2)

    def inner(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Tensor, ...]:
        o, lse = attention_forward(q, k, v, 4, None, "tiled")
        return attention_backward(
            q, k, v, o, lse, do * o, None, 2, 4, None, "tiled"
        )  # do depends on o, as an inner loss's does

    assert torch.autograd.gradcheck(inner, (q, k, v, do))


@pytest.mark.parametrize("name", ["reference", "tiled"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.03)])
def test_lower_precision_stays_close(name: str, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v, do = inputs(2, (4, 2), 300, 700, 32, dtype=dtype)
    abc = directions(q, k, 300)
    ours = two_orders(q, k, v, do, abc, 300, 250, name)
    assert all(x.dtype == dtype for x in ours)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, do)]
    assert_same(ours, two_orders_of_reference(*wide, tuple(x.double() for x in abc), 300, 250), tolerance)


def test_accepts_strided_inputs() -> None:
    """Heads split off the last dimension, and a gradient that is one number expanded."""
    x = draw(2, 9, 3, 4, 8)
    q, k, v = x.permute(2, 0, 3, 1, 4)
    results = []
    for f in (reference, lambda *a: windowed_attention(*a, implementation="tiled"), windowed_attention):
        (dx,) = torch.autograd.grad(f(q, k, v, 5).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), x)[0])
    assert_same(results[1:], [results[0]] * 2, 1e-12)


def loss(f: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return f(q, k, v, 4).square().sum()


def inner_step(forward: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A step on q along its gradient, and the loss after it: what an inner loop does."""
    (dq,) = torch.autograd.grad(loss(forward, q, k, v), q, create_graph=True)
    return loss(forward, q - 0.1 * dq, k, v)


def test_differentiates_an_inner_step() -> None:
    q, k, v, _ = inputs(2, (4, 2), 7, 11, 4)
    results = []
    for f in (reference, windowed_attention):
        for x in (q, k, v):
            x.grad = None
        inner_step(f, q, k, v).backward()
        results.append([x.grad for x in (q, k, v)])
    assert_same(*results, 1e-12)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, COMPILER])])
def test_compiles_in_one_graph(backend: str) -> None:
    q, k, v, do = inputs(1, (2, 1), 7, 11, 4)
    compiled = torch.compile(lambda q, k, v: windowed_attention(q, k, v, 4).sin(), fullgraph=True, backend=backend)
    theirs = torch.autograd.grad(reference(q, k, v, 4).sin(), (q, k, v), do)
    assert_same(list(torch.autograd.grad(compiled(q, k, v), (q, k, v), do)), list(theirs), 1e-12)

    def inner(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Tensor:
        o, lse = attention_forward(q, k, v, 4, None, "auto")
        dq, dk, dv = attention_backward(q, k, v, o, lse, do, None, 7, 4, None, "auto")
        return (q - dq).square().sum() + (dk * dv).sum() + o.sum()

    out = torch.compile(inner, fullgraph=True, backend=backend)(q, k, v, do)
    assert_same(
        list(torch.autograd.grad(out, (q, k, v, do))),
        list(torch.autograd.grad(inner(q, k, v, do), (q, k, v, do))),
        1e-12,
    )


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_opcheck(name: str) -> None:
    q, k, v, do = inputs(2, (4, 2), 5, 9, 4)
    o, lse = (x.detach() for x in attention_forward(q, k, v, 4, None, name))
    abc = directions(q, k, 5)
    torch.library.opcheck(attention_forward, (q, k, v, None, None, name))
    strided = [x.detach().mT.contiguous().mT.requires_grad_() for x in (q, k, v, do)]
    torch.library.opcheck(attention_forward, (*strided[:3], 3, torch.tensor(1, dtype=torch.int32), name))
    for dlse in (None, torch.ones_like(lse, requires_grad=True)):
        torch.library.opcheck(attention_backward, (*strided[:3], o, lse, strided[3], dlse, 5, 4, None, name))
    # No test of its gradients: it has none.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    plain = [x.detach() for x in (q, k, v, o, lse, do, lse, *abc)]
    torch.library.opcheck(attention_double_backward, (*plain, 5, 4, None, name), test_utils=utils)


def test_third_order_is_refused() -> None:
    q, k, v, _ = inputs(1, (1, 1), 3, 3, 4)
    (dq,) = torch.autograd.grad(loss(windowed_attention, q, k, v), q, create_graph=True)
    (ddq,) = torch.autograd.grad(dq.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second order"):
        ddq.sum().backward()


def test_works_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt_e2e.ops.implementations.HAS_TRITON", False)
    q, k, v, _ = inputs(1, (1, 1), 3, 5, 16, dtype=torch.float32)
    windowed_attention(q, k, v)
    with pytest.raises(ValueError, match="package triton"):
        windowed_attention(q, k, v, implementation="triton")


def test_refuses_bad_arguments() -> None:
    q, k, v, _ = inputs(1, (2, 2), 3, 5, 4)
    for arguments, message in (
        (
            dict(implementation="fast"),
            "unknown implementation 'fast': it must be one of auto, reference, tiled, triton",
        ),
        (dict(implementation="triton"), "implementation 'triton' needs"),
        (dict(window=0), "must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            windowed_attention(q, k, v, **arguments)  # type: ignore[arg-type]
    for bad in ((k, q, q), (q, k[:, :1], v), (q[:, :1], k, v)):
        with pytest.raises(ValueError, match="keys and values must have"):
            windowed_attention(*bad)


@pytest.mark.parametrize(("queries", "keys", "window"), [(4096, 4096, 256), (512, 16384, None)])
def test_tiled_memory_is_linear(queries: int, keys: int, window: int | None) -> None:
    """No tensor is larger than the inputs or a tile, at any of the three levels."""
    q, k, v, do = (x.detach() for x in inputs(1, (2, 1), queries, keys, 16, dtype=torch.float32))
    abc = directions(q, k, queries)
    view = KeyView(window or keys, num_new_keys=queries)
    with Largest() as largest:
        o, lse = tiled.forward(q, k, v, view)
        attended = Attended(q, k, v, o, lse)
        tiled.backward(attended, do, lse, view)
        tiled.double_backward(attended, do, lse, abc, view)
    assert largest.elements <= max(k.numel(), q.numel(), 2 * tuning.TILE_QUERIES * tuning.TILE_KEYS)


@CUDA
@pytest.mark.parametrize("name", ["tiled", "triton"])
@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_on_a_gpu(name: str, width: int, dtype: torch.dtype, tolerance: float) -> None:
    for (queries, keys, num_new_keys), window, heads in itertools.product(
        ((1024, 1024, 1024), (300, 2000, 300), (77, 200, 100)), (None, 1, 515), ((2, 2), (4, 1))
    ):
        q, k, v, do = inputs(2, heads, queries, keys, width, dtype=dtype, device="cuda")  # type: ignore[arg-type]
        abc = directions(q, k, num_new_keys)
        ours = two_orders(q, k, v, do, abc, num_new_keys, window, name)
        wide = [x.detach().double().requires_grad_() for x in (q, k, v, do)]
        assert_same(
            ours, two_orders_of_reference(*wide, tuple(x.double() for x in abc), num_new_keys, window), tolerance
        )
