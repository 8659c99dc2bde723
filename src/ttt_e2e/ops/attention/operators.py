"""Causal attention, windowed or full, that can be differentiated twice, its memory linear at all three levels.

`windowed_attention` is the function to call. Below it lie three operators, which a caller that writes its own inner
gradient may use directly:

- `attention_forward`: the outputs, and per row the logarithm of the softmax's denominator;
- `attention_backward`: the gradients of <o, do>. With `own` < S it is an inner gradient: only the last `own` keys are
  variables, the earlier (cached) ones are constants;
- `attention_double_backward`: the gradients of <dq, a> + <dk, b> + <dv, c>, of all keys and of `do`.

Each operator's derivative is the next one; the third has none. All of them keep q, k, v, o and the row statistics and
compute the softmax again from these, so nothing of size T x S outlives a call, nor is it ever formed except by the
implementation "plain".

With P the softmax of scale q k^T over the keys that a query sees, and D = rowsum(do o):

    dP = do v^T     dS = P (dP - D)     dq = scale dS k     dk = scale dS^T q     dv = P^T do

(dq, dk, dv) is the gradient of <do, o>, so <dq, a> + <dk, b> + <dv, c> is <do, o'>, o' being the derivative of o along
(a, b, c). Hence the gradient of `do` is o' itself, and the gradients of q, k and v are the derivatives of dq, dk and dv
along (a, b, c) at constant `do` (the Hessian is symmetric). Everything is the tangent of a line above:

    X = S' = scale (a k^T + q b^T)      E = rowsum(P X)               P' = P (X - E)
    gdo = o' = P' v + P c               w = D' = rowsum(do gdo)       G = dS' = (X - E) dS + P (do c^T - w)
    gq = scale (G k + dS b)             gk = scale (G^T q + dS^T a)   gv = P'^T do

The formulas take o and the row statistics as functions of q, k and v, so neither receives a gradient of its own.

Shapes: B sequences, T queries, S keys (the last T of them at the queries' own positions), H query heads, G key/value
heads, K head width.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ttt_e2e.ops import HAS_TRITON
from ttt_e2e.ops.attention import tiled
from ttt_e2e.ops.elementwise import accumulation_dtype

IMPLEMENTATIONS = ("auto", "plain", "tiled", "triton")

# Up to this many scores (B H T S), "auto" materialises them. Measured on a CPU in float32: up to here plain is as
# fast as tiled or a little faster; beyond, tiled is faster, the more the larger.
PLAIN_SCORES = 2**15


def windowed_attention(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, window: int | None = None, *, implementation: str = "auto"
) -> Tensor:
    """Causal softmax attention of T queries over S >= T keys; differentiable twice, in linear memory.

    Query i stands at key S - T + i and sees the last `window` keys up to its own, all of them if `window` is None. The
    scores are scaled by K ** -0.5. H may be a multiple of G: query head h then reads key head h // (H / G).

    Args:
        q_BHTK: Queries [B, H, T, K].
        k_BGSK: Keys [B, G, S, K], of the queries' dtype and device.
        v_BGSK: Values, shaped as the keys.
        window: How many keys a query sees, its own included.
        implementation: "plain" materialises [B, H, T, S] and is the reference; "tiled" works tile by tile in PyTorch,
            on any device and in any dtype; "triton" runs Triton kernels, on CUDA, in float32, bfloat16 and float16, for
            K up to 256, fastest where K is a power of two. "auto" takes triton where it can serve, else plain up to
            `PLAIN_SCORES` scores and tiled beyond them.

    Returns:
        [B, H, T, K], in the queries' dtype. Sums are accumulated in float32, or in float64 for float64 inputs.

    Raises:
        ValueError: If the shapes do not fit together, the window is not positive, or the implementation is unknown or
            cannot serve these tensors.

    Memory: forward, backward and the backward of the backward each hold their inputs and outputs, a few numbers per
    query, and a fixed number of tiles ("tiled", "triton"). Derivatives of third order are refused.

    Works under `torch.compile(fullgraph=True)` and `torch.func.grad`, `vjp` and `vmap`.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 5, 16, requires_grad=True) for _ in range(3))
        >>> out = windowed_attention(q, k, v, window=3)
        >>> (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        >>> dq.square().sum().backward()  # q.grad, k.grad and v.grad: derivatives of second order
        >>> k.grad.shape
        torch.Size([1, 2, 5, 16])
    """
    if window is not None and window < 1:
        raise ValueError(f"a window holds at least the query's own key, so it is 1 or more, not {window}")
    if k_BGSK.shape != v_BGSK.shape or q_BHTK.shape[2] > k_BGSK.shape[2] or q_BHTK.shape[1] % k_BGSK.shape[1]:
        raise ValueError(
            "keys and values must have one shape, at least as many positions as the queries, and a number of heads that"
            f" divides theirs: got {[tuple(x.shape) for x in (q_BHTK, k_BGSK, v_BGSK)]}"
        )
    return _call(attention_forward, q_BHTK, k_BGSK, v_BGSK, window, None, implementation)[0]


@torch.library.custom_op("ttt_e2e::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, empty: Tensor | None, implementation: str
) -> tuple[Tensor, Tensor]:
    """Attention and its row statistic: o [B, H, T, K], and the scores' logsumexp [B, H, T], which takes no gradient.

    The statistic is float32, or float64 for float64 inputs. Arguments as in `windowed_attention`, unchecked, and
    `empty`: how many of the first keys are none yet and seen by no query, a 0-dim int32 tensor (None: all are keys). A
    cache of fixed size fills up from its end, and a captured graph can be run again while it does.
    """
    return _serve(implementation, q, k).forward(q, k, v, _reach(window, k), empty)


@torch.library.custom_op("ttt_e2e::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    own: int,
    window: int | None,
    empty: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <o, do>: dq [B, H, T, K], and dk, dv [B, G, own, K] of the last `own` keys alone.

    `o` and `lse` are what `attention_forward` returned for q, k, v and window. Differentiable once more, in q, k, v and
    do; what o and lse contribute as functions of q, k and v is contained therein, so they get no gradient themselves.
    """
    return _serve(implementation, q, k).backward(q, k, v, o, lse, do, own, _reach(window, k), empty)


@torch.library.custom_op("ttt_e2e::attention_double_backward", mutates_args=())
def attention_double_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    a: Tensor,
    b_own: Tensor,
    c_own: Tensor,
    own: int,
    window: int | None,
    empty: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of <dq, a> + <dk, b> + <dv, c>: gq [B, H, T, K], gk and gv [B, G, S, K], gdo [B, H, T, K].

    a [B, H, T, K] and b, c [B, G, own, K] belong to what `attention_backward` returned; gk and gv cover all keys, the
    cached ones included. Not differentiable.
    """
    serve = _serve(implementation, q, k)
    return serve.double_backward(q, k, v, o, lse, do, a, b_own, c_own, own, _reach(window, k), empty)


def _reach(window: int | None, k_BGSK: Tensor) -> int:
    """The window as a number of keys that are there."""
    return k_BGSK.shape[2] if window is None else min(window, k_BGSK.shape[2])


def _serve(implementation: str, q_BHTK: Tensor, k_BGSK: Tensor) -> Any:
    """The module that serves these tensors, with its `forward`, `backward` and `double_backward`."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    refusal = _triton_refusal(q_BHTK)
    if implementation == "triton" and refusal:
        raise ValueError(f"implementation 'triton' {refusal}")
    if implementation == "triton" or (implementation == "auto" and not refusal and q_BHTK.is_cuda):
        from ttt_e2e.ops.attention import triton

        return triton
    small = q_BHTK.shape[:3].numel() * k_BGSK.shape[2] <= PLAIN_SCORES
    if implementation == "plain" or (implementation == "auto" and small):
        return SimpleNamespace(forward=_forward, backward=_backward, double_backward=_double_backward)
    return tiled


def _triton_refusal(q_BHTK: Tensor) -> str | None:
    """Why the Triton kernels cannot serve these queries; None if they can."""
    if not HAS_TRITON:
        return "needs the package triton, which is not installed"
    if not q_BHTK.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs tensors on a CUDA device, not on {q_BHTK.device.type}"
    if q_BHTK.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"needs float32, bfloat16 or float16, not {q_BHTK.dtype}"
    if q_BHTK.shape[3] > 256:
        return f"needs a head width of at most 256, not {q_BHTK.shape[3]}"
    return None


# The operators' outputs as shapes, for tracing.


@attention_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, empty: Tensor | None, implementation: str
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


@attention_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    own: int,
    window: int | None,
    empty: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    own_shape = (*k.shape[:2], own, k.shape[3])
    return q.new_empty(q.shape), k.new_empty(own_shape), k.new_empty(own_shape)


@attention_double_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    a: Tensor,
    b_own: Tensor,
    c_own: Tensor,
    own: int,
    window: int | None,
    empty: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape), q.new_empty(q.shape)


# Their derivatives.


def _save_forward(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, ctx.window, empty, ctx.implementation = inputs
    ctx.save_for_backward(q, k, v, *output, empty)
    ctx.mark_non_differentiable(output[1])


def _differentiate_forward(ctx: Any, do: Tensor, _: Tensor) -> tuple:
    q, k, v, o, lse, empty = ctx.saved_tensors
    gradients = _call(attention_backward, q, k, v, o, lse, do, k.shape[2], ctx.window, empty, ctx.implementation)
    return *gradients, None, None, None


def _save_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.own, ctx.window, empty, ctx.implementation = inputs
    ctx.save_for_backward(*tensors, empty)


def _differentiate_backward(ctx: Any, a: Tensor, b_own: Tensor, c_own: Tensor) -> tuple:
    *tensors, empty = ctx.saved_tensors
    arguments = (*tensors, a, b_own, c_own, ctx.own, ctx.window, empty, ctx.implementation)
    gq, gk, gv, gdo = _call(attention_double_backward, *arguments)
    return gq, gk, gv, None, None, gdo, None, None, None, None


def _save_double_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    pass


def _differentiate_double_backward(ctx: Any, *gradients: Tensor) -> tuple:
    raise NotImplementedError("windowed attention has derivatives of first and second order only")


attention_forward.register_autograd(_differentiate_forward, setup_context=_save_forward)
attention_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)
attention_double_backward.register_autograd(_differentiate_double_backward, setup_context=_save_double_backward)


# The transforms of torch.func do not take the derivative of a custom operator, but they take that of a Function.


def _call(op: Any, *args: Any) -> Any:
    """op(*args), under the transforms of torch.func through the operator's Function."""
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    return _FUNCTIONS[op].apply(*args) if transformed else op(*args)


def _function(op: Any, save: Callable, differentiate: Callable) -> Any:
    """The operator as a Function with the same derivative; under vmap, the mapped dimension joins B."""

    def mapped(info: Any, in_dims: tuple, *args: Any) -> tuple:
        def join(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor) or x.dim() == 0:
                return x
            return (x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

        outputs = _call(op, *map(join, args, in_dims))
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0,) * len(outputs)

    parts = dict(forward=op, setup_context=save, backward=differentiate, vmap=mapped)
    return type(f"_{op._name}", (torch.autograd.Function,), {name: staticmethod(f) for name, f in parts.items()})


_FUNCTIONS = {
    attention_forward: _function(attention_forward, _save_forward, _differentiate_forward),
    attention_backward: _function(attention_backward, _save_backward, _differentiate_backward),
    attention_double_backward: _function(
        attention_double_backward, _save_double_backward, _differentiate_double_backward
    ),
}


# The plain implementation: the formulas above as they stand, on [B, H, T, S].


def _forward(q: Tensor, k: Tensor, v: Tensor, window: int, empty: Tensor | None) -> tuple[Tensor, Tensor]:
    q_BHTK, k_BHSK, v_BHSK = _widen(q, k, v)
    scores_BHTS = _scores(q_BHTK, k_BHSK, window, empty)
    return (scores_BHTS.softmax(-1) @ v_BHSK).to(q.dtype), scores_BHTS.logsumexp(-1)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    own: int,
    window: int,
    empty: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q_BHTK, k_BHSK, v_BHSK, o_BHTK, do_BHTK = _widen(q, k, v, o, do)
    scale = q.shape[3] ** -0.5
    p = (_scores(q_BHTK, k_BHSK, window, empty) - lse[..., None]).exp()
    ds = p * (do_BHTK @ v_BHSK.mT - (do_BHTK * o_BHTK).sum(-1, keepdim=True))
    dk_BHOK = scale * ds[..., -own:].mT @ q_BHTK
    dv_BHOK = p[..., -own:].mT @ do_BHTK
    return (scale * ds @ k_BHSK).to(q.dtype), _narrow(dk_BHOK, k), _narrow(dv_BHOK, v)


def _double_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    a: Tensor,
    b_own: Tensor,
    c_own: Tensor,
    own: int,
    window: int,
    empty: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cached = k.shape[2] - own
    b, c = (torch.nn.functional.pad(x, (0, 0, cached, 0)) for x in (b_own, c_own))  # constants have no tangent
    q_BHTK, k_BHSK, v_BHSK, o_BHTK, do_BHTK, a_BHTK, b_BHSK, c_BHSK = _widen(q, k, v, o, do, a, b, c)
    scale = q.shape[3] ** -0.5
    p = (_scores(q_BHTK, k_BHSK, window, empty) - lse[..., None]).exp()
    ds = p * (do_BHTK @ v_BHSK.mT - (do_BHTK * o_BHTK).sum(-1, keepdim=True))
    x = scale * (a_BHTK @ k_BHSK.mT + q_BHTK @ b_BHSK.mT)
    x = x - (p * x).sum(-1, keepdim=True)
    gdo_BHTK = (p * x) @ v_BHSK + p @ c_BHSK
    w = (do_BHTK * gdo_BHTK).sum(-1, keepdim=True)
    g = x * ds + p * (do_BHTK @ c_BHSK.mT - w)
    gq_BHTK = scale * (g @ k_BHSK + ds @ b_BHSK)
    gk_BHSK = scale * (g.mT @ q_BHTK + ds.mT @ a_BHTK)
    gv_BHSK = (p * x).mT @ do_BHTK
    return gq_BHTK.to(q.dtype), _narrow(gk_BHSK, k), _narrow(gv_BHSK, v), gdo_BHTK.to(q.dtype)


def _widen(q_BHTK: Tensor, *tensors: Tensor) -> list[Tensor]:
    """All tensors in float32 or float64 and with H heads."""
    widened = [x.to(accumulation_dtype(x.dtype)) for x in (q_BHTK, *tensors)]
    return [x.repeat_interleave(q_BHTK.shape[1] // x.shape[1], 1) for x in widened]


def _narrow(x_BHSK: Tensor, like_BGSK: Tensor) -> Tensor:
    """The sum over the query heads that share a key head, in the keys' dtype."""
    return x_BHSK.unflatten(1, (like_BGSK.shape[1], -1)).sum(2).to(like_BGSK.dtype)


def _scores(q_BHTK: Tensor, k_BHSK: Tensor, window: int, empty: Tensor | None) -> Tensor:
    """[B, H, T, S], minus infinity where a query does not see a key."""
    at_S = torch.arange(k_BHSK.shape[2], device=q_BHTK.device)
    distance_TS = at_S[-q_BHTK.shape[2] :, None] - at_S
    hidden_TS = (distance_TS < 0) | (distance_TS >= window)
    if empty is not None:
        hidden_TS = hidden_TS | (at_S < empty)
    return (q_BHTK.shape[3] ** -0.5 * q_BHTK @ k_BHSK.mT).masked_fill(hidden_TS, -torch.inf)
