"""The element-wise functions against their definitions, with first and second derivatives, in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ttt_e2e.ops import elementwise as ops
from ttt_e2e.ops.elementwise import Vjp

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(lambda shape: [*shape[:-1], 2 * shape[-1]])


def angles(x: Tensor) -> tuple[Tensor, Tensor]:
    angle = torch.arange(x.shape[-1] // 2, dtype=x.dtype) + 0.5
    return angle.cos(), angle.sin()


def norm_weight(x: Tensor) -> Tensor:
    return torch.linspace(-0.5, 2, x.shape[-1], dtype=x.dtype)


def some_targets(x: Tensor) -> Tensor:
    return (torch.arange(x[..., 0].numel()) % x.shape[-1]).view(x.shape[:-1])


# Every function of one tensor, with its vjp, and its definition.
PAIRS: dict[str, Callable[[Tensor, bool], tuple[Tensor, Vjp]]] = {
    "rms_norm": lambda x, plain: (ops.rms_norm_reference if plain else ops.rms_norm)(x, norm_weight(x), 1e-3),
    **{
        name: lambda x, plain, name=name: (ops.glu_reference if plain else ops.glu)(x, name) for name in ops.ACTIVATIONS
    },
    "softcap": lambda x, plain: ops.softcap(x, 0.8),
    "rotate": lambda x, plain: (ops.rotate_reference if plain else ops.rotate)(x, *angles(x)),
    "cross_entropy": lambda x, plain: (ops.cross_entropy_reference if plain else ops.cross_entropy)(x, some_targets(x)),
}


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**31))
def test_equals_reference(name: str, shape: list[int], seed: int) -> None:
    """Value, vjp and gradient, and the gradients of the vjp, against autograd's own gradient of the definition."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    g = torch.randn(PAIRS[name](x, True)[0].shape, generator=generator, dtype=torch.float64, requires_grad=True)
    a = torch.randn(shape, generator=generator, dtype=torch.float64)

    def derivatives(y: Tensor, dx: Tensor) -> list[Tensor]:
        return [
            y,
            dx,
            *torch.autograd.grad(dx, (x, g), a, retain_graph=True, allow_unused=True, materialize_grads=True),
        ]

    y, _ = PAIRS[name](x, True)
    expected = derivatives(y, torch.autograd.grad(y, x, g, create_graph=True)[0])
    for plain in (True, False):
        y, vjp = PAIRS[name](x, plain)
        for dx in (vjp(g), torch.autograd.grad(y, x, g, create_graph=True)[0]):
            for ours, theirs in zip(derivatives(y, dx), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PAIRS)
def test_gradgradcheck(name: str) -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: PAIRS[name](x, False)[0], x)
    assert torch.autograd.gradgradcheck(lambda x: PAIRS[name](x, False)[0], x)


@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 4)])
def test_rms_norm_weight_gradcheck(shape: tuple[int, ...]) -> None:
    """Through the value and through the vjp."""
    generator = torch.Generator().manual_seed(0)
    x, g, w = (torch.randn(s, dtype=torch.float64, generator=generator) for s in (shape, shape, shape[-2:]))

    def both(w: Tensor) -> Tensor:
        y, vjp = ops.rms_norm(x, w, 1e-3)
        return torch.cat((y, vjp(g)))

    assert torch.autograd.gradcheck(both, w.requires_grad_())
