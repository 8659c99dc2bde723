"""The end of the derivatives that are written out, and the plain definitions, which go on."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

_definitions = ContextVar("definitions", default=False)


def wants_definition() -> bool:
    """Whether an operator is to be its plain definition: for a compiler, which fuses it, or inside `definitions`."""
    return is_compiling() or _definitions.get()


@contextmanager
def definitions() -> Iterator[None]:
    """Inside the block, operators are their plain definitions, which autograd differentiates any number of times."""
    token = _definitions.set(True)
    try:
        yield
    finally:
        _definitions.reset(token)


def last_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a Function's `backward` one that has no derivative: asking for it raises NotImplementedError.

    PyTorch's `once_differentiable` raises an error for `Tensor.backward` only. For `torch.autograd.grad` it leaves out
    what lies behind it, so that the result is wrong without a word.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return outputs
        given = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        return tuple(_End.apply(x, *given) if isinstance(x, Tensor) and given else x for x in outputs)

    return wrapper


class _End(torch.autograd.Function):
    """x, as a function of everything that it was computed from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            "This derivative is not written out; inside ttt_e2e.ops.derivatives.definitions() autograd finds it."
        )
