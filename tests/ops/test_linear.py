"""Linear layers with a weight for every sequence."""

import pytest
import torch

from ttt_e2e.ops.linear import batched_linear, weight_gradient


@pytest.mark.parametrize("batch", [1, 2])
def test_gradgradcheck(batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, 3, 4), (batch, 5, 4), (batch, 3, 5)
    x, w, g = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    torch.testing.assert_close(batched_linear(x, w), torch.einsum("btd,bed->bte", x, w))
    torch.testing.assert_close(weight_gradient(g, x), torch.einsum("bte,btd->bed", g, x))
    inputs = tuple(t.requires_grad_() for t in (x, w, g))
    for f in (lambda x, w, g: batched_linear(x, w), lambda x, w, g: weight_gradient(g, x)):
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)
    assert weight_gradient(g, x).is_contiguous()
    assert torch.autograd.grad(batched_linear(x, w).sum(), w)[0].is_contiguous()
