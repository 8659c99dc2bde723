"""No sequences, no tokens: the empty result and its empty gradient, and the state that was there, or one sentence."""

from collections.abc import Callable

import pytest
import torch
from ops_helpers import draw
from torch import Tensor

from ttt_e2e.ops.attention import inner_loop_attention, sdpa, windowed_attention
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


@pytest.mark.parametrize("operator", [windowed_attention, sdpa, inner_loop_attention])
@pytest.mark.parametrize(("batch", "tokens"), EMPTY)
@pytest.mark.parametrize("window", [None, 3])
def test_attention_of_nothing_is_nothing(
    operator: Callable[..., Tensor], batch: int, tokens: int, window: int | None
) -> None:
    q, k, v = (draw(batch, 2, tokens, 4, seed=i) for i in range(3))
    o = operator(q, k, v, window)
    o = o[0] if isinstance(o, tuple) else o
    assert o.shape == q.shape
    grads = torch.autograd.grad(o.sum(), (q, k, v), allow_unused=True, materialize_grads=True)
    assert [grad.shape for grad in grads] == [q.shape] * 3


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
