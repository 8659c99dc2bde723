"""Mamba 2's recurrence in chunks against the recurrence token by token, and flash-linear-attention's."""

import pytest
import torch
from ops_helpers import assert_same
from torch import Tensor

from ttt_e2e.ops import tuning
from ttt_e2e.ops.ssd import ssd, ssd_reference

F64 = torch.float64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def ssd_inputs(tokens: int, groups: int = 2, seed: int = 0, dtype: torch.dtype = F64) -> list[Tensor]:
    """x, dt, a, b, c and a state, at two sequences of four heads."""
    wide = F64 if dtype == F64 else torch.float32
    return [
        draw(2, tokens, 4, 3, seed=seed, dtype=dtype),
        draw(2, tokens, 4, seed=seed + 1, dtype=wide).exp(),
        -draw(4, seed=seed + 2, dtype=wide).exp(),
        draw(2, tokens, groups, 5, seed=seed + 3, dtype=dtype),
        draw(2, tokens, groups, 5, seed=seed + 4, dtype=dtype),
        draw(2, 4, 3, 5, seed=seed + 5, dtype=wide),
    ]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 24])
def test_chunks_equal_the_recurrence(monkeypatch: pytest.MonkeyPatch, tokens: int, start: bool, groups: int) -> None:
    """Outputs, state and gradients, with and without a state to start from."""
    monkeypatch.setattr(tuning, "SSD_CHUNK", 8)
    inputs = [t.requires_grad_() for t in ssd_inputs(tokens, groups)]
    args = [*inputs[:5], inputs[5] if start else None]
    leaves = inputs if start else inputs[:5]
    g = [draw(2, tokens, 4, 3, seed=8), draw(2, 4, 3, 5, seed=9)]
    ours, reference = ssd(*args), ssd_reference(*args)
    assert_same(ours, reference, 1e-9)
    assert_same(torch.autograd.grad(ours, leaves, g), torch.autograd.grad(reference, leaves, g), 1e-9)


def test_decays_of_any_strength_equal_the_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    """From no decay at all to one that leaves nothing."""
    monkeypatch.setattr(tuning, "SSD_CHUNK", 8)
    x, _, a, b, c, state = ssd_inputs(24)
    dt = torch.tensor([0.0, 1e-12, 1.0, 1e6], dtype=F64)[torch.randint(4, (2, 24, 4), generator=torch.manual_seed(0))]
    args = [t.requires_grad_() for t in (x, dt, a, b, c, state)]
    ours, reference = ssd(*args), ssd_reference(*args)
    assert_same(ours, reference, 1e-9)
    g = [draw(2, 24, 4, 3, seed=8), draw(2, 4, 3, 5, seed=9)]
    assert_same(torch.autograd.grad(ours, args, g), torch.autograd.grad(reference, args, g), 1e-9)


@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_equals_flash_linear_attention(tokens: int) -> None:
    """Outputs, state and gradients of its plain simple gated linear attention, which is the same recurrence."""
    naive = pytest.importorskip("fla.ops.simple_gla.naive")
    inputs = [t.requires_grad_() for t in ssd_inputs(tokens, groups=2, dtype=torch.float32)]
    ours = ssd(*inputs)
    direction = draw(2, tokens, 4, 3, seed=8, dtype=torch.float32)
    gradients = torch.autograd.grad(ours[0], inputs, direction)
    for function in (naive.naive_recurrent_simple_gla, naive.naive_chunk_simple_gla):
        x, dt, a, b, c, state = inputs
        b, c = (t.repeat_interleave(2, 2) for t in (b, c))
        v, g = x * dt[..., None], dt * a
        y, last = function(q=c, k=b, v=v, g=g, scale=1.0, initial_state=state.mT, output_final_state=True)
        assert_same(ours, (y, last.mT), 1e-5)
        assert_same(gradients, torch.autograd.grad(y, inputs, direction), 1e-5)
