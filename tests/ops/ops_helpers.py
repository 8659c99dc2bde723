"""Inputs and comparisons that the tests of operators share."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ttt_e2e.ops.attention import Sink
from ttt_e2e.ops.attention.operators import (
    attention_backward,
    attention_forward,
)


def reference(q: Tensor, k: Tensor, v: Tensor, window: int | None, num_empty_slots: int = 0) -> Tensor:
    """Scores, a mask, a softmax: differentiable any number of times."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    at_S = torch.arange(k.shape[2], device=q.device)
    distance_TS = at_S[-q.shape[2] :, None] - at_S
    hidden_TS = (
        (distance_TS < 0) | (distance_TS >= (k.shape[2] if window is None else window)) | (at_S < num_empty_slots)
    )
    return (q @ k.mT * q.shape[3] ** -0.5).masked_fill(hidden_TS, -torch.inf).softmax(-1) @ v


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(device, dtype).requires_grad_()


def inputs(
    batch: int, heads: tuple[int, int], queries: int, keys: int, width: int, seed: int = 0, **kind: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and a gradient of the output."""
    q, do = (draw(batch, heads[0], queries, width, seed=seed + i, **kind) for i in (0, 1))  # type: ignore[arg-type]
    k, v = (draw(batch, heads[1], keys, width, seed=seed + i, **kind) for i in (2, 3))  # type: ignore[arg-type]
    return q, k, v, do


def two_orders_of_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    abc: tuple[Tensor, ...],
    num_new_keys: int,
    window: int | None,
    num_empty_slots: int = 0,
) -> list[Tensor]:
    """o, its gradients where all but the last keys are constant, and the gradients of their product with a, b and c."""
    k_cached, k_own = k.split([k.shape[2] - num_new_keys, num_new_keys], 2)
    v_cached, v_own = v.split([v.shape[2] - num_new_keys, num_new_keys], 2)
    o = reference(q, torch.cat([k_cached, k_own], 2), torch.cat([v_cached, v_own], 2), window, num_empty_slots)
    first = torch.autograd.grad(o, (q, k_own, v_own), do, create_graph=True)
    second = torch.autograd.grad(first, (q, k, v, do), abc, allow_unused=True, materialize_grads=True)
    return [o, *first, *second]


def two_orders(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    abc: tuple[Tensor, ...],
    num_new_keys: int,
    window: int | None,
    name: str,
    num_empty_slots: int | None = None,
) -> list[Tensor]:
    """Like `two_orders_of_reference`, by the operators, the third through autograd of the second."""
    slots = None if num_empty_slots is None else torch.tensor(num_empty_slots, dtype=torch.int32, device=q.device)
    o, lse = attention_forward(q, k, v, window, slots, name)
    first = attention_backward(q, k, v, o, lse, do, None, num_new_keys, window, slots, name)
    second = torch.autograd.grad(first, (q, k, v, do), abc, retain_graph=True)
    return [o, *first, *second]


def draw_sink(heads: tuple[int, int], width: int, seed: int = 0, **kind: object) -> Sink:
    logit_H, value_GK = draw(heads[0], seed=seed + 10, **kind), draw(heads[1], width, seed=seed + 11, **kind)  # type: ignore[arg-type]
    return Sink(logit_H, value_GK)


def literal_with_sink(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, sink: Sink, first_key: int = 0, cap: float | None = None
) -> Tensor:
    """Attention with a sink, query by query, head by head. first_key: the first key that holds something."""
    offset, groups = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    rows = []
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        g, last = h // groups, offset + i
        first = first_key if window is None else max(first_key, last - window + 1)
        scores, values = k[b, g, first : last + 1] @ q[b, h, i] * q.shape[3] ** -0.5, v[b, g, first : last + 1]
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        if first > first_key:  # the first key has left the window
            scores = torch.cat((scores, sink.logit_H[h, None]))
            values = torch.cat((values, sink.value_GK[g, None]))
        rows.append(scores.softmax(0) @ values)
    return torch.stack(rows).view_as(q)


def two_orders_with_sink(y: Tensor, variables: tuple[Tensor, ...], do: Tensor) -> list[Tensor]:
    """y, its gradients, and the gradients of a quadratic function of these."""
    how = dict(allow_unused=True, materialize_grads=True)
    first = torch.autograd.grad(y, variables, do, create_graph=True, **how)  # type: ignore[arg-type]
    total = sum(((g + 0.5) ** 2).sum() for g in first)
    return [y, *first, *torch.autograd.grad(total, (*variables, do), **how)]  # type: ignore[arg-type]


def directions(q: Tensor, k: Tensor, num_new_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """a, b, c: gradients of dq, dk and dv."""
    generator = torch.Generator().manual_seed(7)
    shapes = (q.shape, (*k.shape[:2], num_new_keys, k.shape[3]), (*k.shape[:2], num_new_keys, k.shape[3]))
    a, b, c = (torch.randn(s, generator=generator, dtype=torch.float64).to(q.device, q.dtype) for s in shapes)
    return a, b, c


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    """Equal up to `tolerance` of each tensor's largest entry (of 1, for smaller ones)."""
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape
        scale = max(1.0, y.abs().max().item())
        torch.testing.assert_close(x.double(), y.double(), rtol=0, atol=tolerance * scale)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest storage that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


CASES = {
    "whole text": dict(queries=23, keys=23, window=None, num_new_keys=23),
    "window": dict(queries=23, keys=23, window=5, num_new_keys=23),
    "window 1": dict(queries=6, keys=9, window=1, num_new_keys=6),
    "window beyond the text": dict(queries=7, keys=12, window=100, num_new_keys=7),
    "one query": dict(queries=1, keys=19, window=None, num_new_keys=1),
    "one query, one key": dict(queries=1, keys=1, window=3, num_new_keys=1),
    "cached keys": dict(queries=9, keys=40, window=17, num_new_keys=9),
    "cached keys, all new": dict(queries=9, keys=40, window=None, num_new_keys=40),
    "fewer new keys than queries": dict(queries=13, keys=21, window=8, num_new_keys=4),
    "more new keys than queries": dict(queries=5, keys=21, window=8, num_new_keys=11),
}

EMPTY_SLOTS = [(9, 40, 9, 17, 5), (9, 40, 9, 17, 31), (9, 40, 9, None, 20), (7, 21, 11, 30, 10), (5, 5, 5, 3, 0)]
