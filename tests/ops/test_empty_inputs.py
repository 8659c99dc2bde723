"""No sequences, no tokens: the empty result and its empty gradient, and the state that was there, or one sentence."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops_helpers import draw
from torch import Tensor

from ttt_e2e.ops.attention import Sink, inner_loop_attention, sdpa, windowed_attention
from ttt_e2e.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_reference
from ttt_e2e.ops.linear_cross_entropy import linear_cross_entropy
from ttt_e2e.ops.short_convolution import short_convolution, short_convolution_reference
from ttt_e2e.ops.ssd import ssd, ssd_reference

EMPTY = [(0, 5), (2, 0), (0, 0)]
Inputs = tuple[list[Tensor], Tensor]  # arguments, of which those that require a gradient take one; and a state


def delta_rule(batch: int, tokens: int, dtype: torch.dtype) -> Inputs:
    q, k = (draw(batch, tokens, 2, 4, dtype=dtype, seed=i) for i in (0, 1))
    v, beta = draw(batch, tokens, 4, 3, dtype=dtype), draw(batch, tokens, 4, dtype=dtype)
    return [q, k, v, -beta.detach().abs(), beta.detach().sigmoid()], draw(batch, 4, 4, 3, dtype=torch.float64)


def state_space(batch: int, tokens: int, dtype: torch.dtype) -> Inputs:
    dt, rates = draw(batch, tokens, 4).detach().abs(), -draw(4).detach().abs()
    b, c = (draw(batch, tokens, 2, 5, dtype=dtype, seed=i) for i in (0, 1))
    return [draw(batch, tokens, 4, 3, dtype=dtype), dt, rates, b, c], draw(batch, 4, 3, 5)


def convolution(batch: int, tokens: int, dtype: torch.dtype) -> Inputs:
    inputs = [draw(batch, tokens, 6, dtype=dtype), draw(6, 4, dtype=dtype), draw(6, dtype=dtype)]
    return inputs, draw(batch, 3, 6, dtype=dtype)


RECURRENT = [
    (gated_delta_rule, delta_rule, 2),
    (gated_delta_rule_reference, delta_rule, 2),
    (ssd, state_space, 0),
    (ssd_reference, state_space, 0),
    (short_convolution, convolution, 0),
    (short_convolution_reference, convolution, 0),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "tokens"), EMPTY)
@pytest.mark.parametrize(("operator", "make", "shape_of"), RECURRENT, ids=lambda x: getattr(x, "__name__", ""))
def test_recurrent_operators_return_their_state(
    operator: Callable[..., tuple[Tensor, Tensor]],
    make: Callable[..., Inputs],
    shape_of: int,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
) -> None:
    inputs, state = make(batch, tokens, dtype)
    for before in (state, None):
        y, after = operator(*inputs, before)
        assert y.shape == inputs[shape_of].shape and y.dtype == dtype
        torch.testing.assert_close(after, torch.zeros_like(state) if before is None else state, check_dtype=False)
        wanted = [x for x in inputs if x.requires_grad]
        grads = torch.autograd.grad(y.sum() + after.sum(), wanted, allow_unused=True, materialize_grads=True)
        assert all(grad.shape == x.shape and not grad.any() for grad, x in zip(grads, wanted, strict=True))


def windowed(name: str) -> Callable[..., Tensor]:
    return functools.partial(windowed_attention, implementation=name)


def inner_loop(*inputs: Any, **options: Any) -> Tensor:
    """Attention and its vjp in one value, which has the derivatives of both."""
    q, k, _ = inputs[:3]
    o, vjp = inner_loop_attention(*inputs, **options)
    grads = vjp(torch.ones_like(o))
    assert [grad.shape for grad in grads] == [q.shape, *[(*k.shape[:2], q.shape[2], k.shape[3])] * 2]
    return o + sum(grad.sum() for grad in grads)


@pytest.mark.parametrize(
    ("operator", "orders"),
    [
        *((windowed(name), 2) for name in ("reference", "tiled", "auto")),
        (sdpa, 1),
        (inner_loop, 1),
    ],
    ids=["reference", "tiled", "auto", "sdpa", "inner_loop"],
)
@pytest.mark.parametrize("with_sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 5), (0, 2, 5), (2, 0, 0), (2, 0, 5), (0, 0, 5)])
def test_attention_of_nothing_is_nothing(
    operator: Callable[..., Tensor],
    orders: int,
    with_sink: bool,
    heads: int,
    window: int | None,
    batch: int,
    queries: int,
    keys: int,
) -> None:
    """Without sequences, and without queries, whether or not there are keys: as every formula of the reference says."""
    q, k, v = draw(batch, 2, queries, 4), *(draw(batch, heads, keys, 4, seed=i) for i in (1, 2))
    logit, value = draw(2, dtype=torch.float32), draw(heads, 4, dtype=torch.float32)
    o = operator(q, k, v, window, sink=Sink(logit, value) if with_sink else None)
    assert o.shape == q.shape
    inputs, outputs = (q, k, v, logit, value), [o]
    for order in range(orders):
        grads = torch.autograd.grad(
            sum(x.square().sum() for x in outputs),
            inputs,
            create_graph=order + 1 < orders,
            allow_unused=True,
            materialize_grads=True,
        )
        assert [x.shape for x in grads] == [x.shape for x in inputs] and not any(x.any() for x in grads)
        outputs = [grad for grad in grads if grad.requires_grad]
        if not outputs:
            return


@pytest.mark.parametrize("implementation", ["auto", "reference", "tiled"])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0)])
def test_cross_entropy_of_nothing_is_nothing(implementation: str, shape: tuple[int, ...]) -> None:
    x, weight, targets = draw(*shape, 4), draw(9, 4), torch.zeros(shape, dtype=torch.int64)
    loss = linear_cross_entropy(x, weight, targets, implementation=implementation)
    assert loss.shape == shape
    first = torch.autograd.grad(loss.sum(), (x, weight), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight), allow_unused=True)
    assert [g.shape for g in first] == [x.shape, weight.shape] and not first[1].any()
    assert all(g is None or not g.any() for g in second)
