"""Where derivatives end, and the plain definitions, which go on."""

from collections.abc import Callable

import pytest
import torch
from helpers import small_model
from torch import Tensor

from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.ops.attention import inner_loop_attention
from ttt_e2e.ops.clipped_step import clipped_step
from ttt_e2e.ops.derivatives import definitions
from ttt_e2e.ops.elementwise import cross_entropy, glu, rms_norm
from ttt_e2e.ops.short_convolution import short_convolution

F64 = torch.float64


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64).requires_grad_()


def norm(x: Tensor) -> Tensor:
    y, vjp = rms_norm(x, torch.ones(4, dtype=F64), 1e-6)
    return vjp(y.sin())


def gate(x: Tensor) -> Tensor:
    y, vjp = glu(x, "silu")
    return vjp(y.sin())


def gelu(x: Tensor) -> Tensor:
    y, vjp = glu(x, "gelu_pytorch_tanh")
    return vjp(y.sin())


def loss(x: Tensor) -> Tensor:
    nll, vjp = cross_entropy(x, torch.ones(x.shape[:-1], dtype=torch.long))
    return vjp(nll.sin())


def attend(x: Tensor) -> Tensor:
    y, vjp = inner_loop_attention(x[None], x[None].cos(), x[None].sin(), 2)
    return vjp(y.sin())[0]


def convolve(x: Tensor) -> Tensor:
    return short_convolution(x, x.sum((0, 1))[:, None].expand(-1, 2), None, None)[0]


def step(x: Tensor) -> Tensor:
    return clipped_step([x], [x.cos()], 1.0, 0.5)[0][0]


@pytest.mark.parametrize("function", [norm, gate, gelu, loss, attend, convolve, step])
def test_a_derivative_that_is_not_written_out_is_an_error_and_not_wrong(function: Callable[[Tensor], Tensor]) -> None:
    """`torch.autograd.grad` would leave out what lies behind it; inside `definitions` all derivatives are right."""
    x = draw(2, 3, 4)
    [once] = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="not written out"):
        torch.autograd.grad(once.square().sum(), x)
    with definitions():
        assert torch.autograd.gradgradcheck(function, (x,))
        torch.testing.assert_close(torch.autograd.grad(function(x).square().sum(), x)[0], once.detach())


@pytest.mark.parametrize("recompute", ["none", "mini-batch", "sqrt"])
def test_a_second_outer_derivative_is_an_error_and_not_wrong(recompute: str) -> None:
    model = small_model(F64)
    text = torch.randint(50, (1, 16), generator=torch.Generator().manual_seed(0))
    parameters = [p for name, p in model.named_parameters() if ".fast." in name]
    out = sequence_loss(model, text, dtype=F64, activation_checkpointing=recompute)  # type: ignore[arg-type]
    once = torch.autograd.grad(out.loss, parameters, create_graph=True)
    with pytest.raises(NotImplementedError, match="not written out"):
        torch.autograd.grad(sum(g.square().sum() for g in once), parameters)
