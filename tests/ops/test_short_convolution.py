"""The short convolution against PyTorch's own, in one piece and in many."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ttt_e2e.ops import tuning
from ttt_e2e.ops.short_convolution import short_convolution, short_convolution_reference

F64 = torch.float64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype).requires_grad_()


def inputs(batch: int, tokens: int, channels: int, width: int, bias: bool = True) -> list[Tensor | None]:
    """x, weight, bias and state."""
    return [
        draw(batch, tokens, channels, seed=1),
        draw(channels, width, seed=2),
        draw(channels, seed=3) if bias else None,
        draw(batch, width - 1, channels, seed=4),
    ]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("batch", "tokens", "width"), [(2, 9, 4), (1, 1, 4), (3, 2, 5), (2, 6, 1)])
def test_equals_conv1d(batch: int, tokens: int, width: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "CONVOLUTION_BLOCK", 30)
    x, weight, b, state = args = inputs(batch, tokens, 5, width, bias)
    assert x is not None and weight is not None and state is not None
    expected = F.silu(F.conv1d(torch.cat((state, x), 1).mT, weight[:, None], b, groups=5).mT)
    leaves = [t for t in args if t is not None and t.numel()]
    g = draw(batch, tokens, 5, seed=5)
    grads = torch.autograd.grad(expected, leaves, g)
    for function in (short_convolution, short_convolution_reference):
        y, after = function(x, weight, b, state)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(after, torch.cat((state, x), 1)[:, tokens:])
        for ours, theirs in zip(torch.autograd.grad(y, leaves, g), grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradcheck_through_the_state() -> None:
    assert torch.autograd.gradcheck(short_convolution, inputs(2, 3, 2, 3))


@settings(max_examples=30, deadline=None)
@given(pieces=st.lists(st.integers(1, 9), min_size=1, max_size=8), width=st.integers(1, 5))
def test_any_split_gives_the_same(pieces: list[int], width: int) -> None:
    x, weight, bias, _ = inputs(2, sum(pieces), 3, width)
    assert x is not None and weight is not None
    whole, last = short_convolution(x, weight, bias, None)
    state, parts = None, []
    for piece in x.split(pieces, 1):
        before = None if state is None else state.clone()
        y, after = short_convolution(piece, weight, bias, state)
        assert state is None or torch.equal(state, before)  # the state that was handed in is as it was
        state = after
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("tokens", [1, 50])
def test_bfloat16_stays_close(tokens: int) -> None:
    x, weight, bias, state = (t.detach().float() for t in inputs(2, tokens, 8, 4) if t is not None)
    exact, _ = short_convolution(x, weight, bias, state)
    y, after = short_convolution(x.bfloat16(), weight, bias, state.bfloat16())
    assert y.dtype == after.dtype == torch.bfloat16
    assert (y - exact).norm() < 1e-2 * exact.norm()


def test_state_owns_its_memory() -> None:
    x, weight, bias, _ = inputs(1, 100, 4, 4)
    assert x is not None and weight is not None
    with torch.no_grad():
        _, state = short_convolution(x, weight, bias, None)
    assert state.untyped_storage().nbytes() == state.nbytes
