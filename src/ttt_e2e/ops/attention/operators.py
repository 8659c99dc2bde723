"""The operators of attention, each in several implementations, and `windowed_attention` on top of them.

- `attention_forward`: the outputs and, for every query, the logsumexp of its scores.
- `attention_backward`: the gradients of <o, do> + <lse, dlse> in q and in the last `num_new_keys` keys and values. With
  fewer new keys than S it is an inner gradient, to which the cached keys are constants.
- `attention_double_backward`: the gradients of <dq, a> + <dk, b> + <dv, c> in q, all keys and values, `do` and `dlse`.

A sink is added to the outputs by means of the logsumexp (`sink.py`), so that the operators know nothing of it.

Each operator's derivative is the next one; the third has none. They keep q, k, v, o and the logsumexp and compute the
softmax again from these, so that nothing of size T x S outlives a call. Only "reference" forms such a matrix at all.
"""

from typing import Any

import torch
from torch import Tensor

from ttt_e2e.ops import tuning
from ttt_e2e.ops.attention import reference, tiled
from ttt_e2e.ops.attention.mask import Attended, KeyView
from ttt_e2e.ops.attention.sink import Sink, add_sink, seen_sink
from ttt_e2e.ops.elementwise import accumulation_dtype
from ttt_e2e.ops.implementations import triton_serves


def windowed_attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    window: int | None = None,
    *,
    sink: Sink | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Causal softmax attention of T queries over S >= T keys; differentiable twice, in linear memory.

    Query i is at the position of key S - T + i. The scores are scaled by K ** -0.5. H may be a multiple of G: query
    head h then reads key head h // (H / G).

    Args:
        q_BHTK: Queries [B, H, T, K].
        k_BGSK: Keys [B, G, S, K], of the queries' dtype and device.
        v_BGSK: Values, shaped as the keys.
        window: Number of keys that a query sees, its own included; None for all up to its own position.
        sink: What queries see in place of the first key when that has left their window; None for nothing.
        implementation: "reference" forms [B, H, T, S]; "tiled" works tile by tile in PyTorch, on any device and in any
            dtype; "triton" runs Triton kernels on CUDA, in float32, bfloat16 and float16, for K up to 256, fastest
            where K is a power of two. "auto" takes triton where it can serve, else reference up to
            `tuning.REFERENCE_SCORES` scores and tiled beyond.

    Returns:
        [B, H, T, K], in the queries' dtype. Sums are accumulated in float32, or in float64 for float64 inputs.

    Raises:
        ValueError: If the shapes do not fit together, the window is not positive, or the implementation is unknown or
            cannot serve these tensors.

    Beyond inputs and outputs, "tiled" and "triton" hold a few numbers per query and a fixed number of tiles, in both
    backward passes too. A third derivative raises NotImplementedError. Works under `torch.compile(fullgraph=True)`.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 5, 16, requires_grad=True) for _ in range(3))
        >>> out = windowed_attention(q, k, v, window=3)
        >>> (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        >>> dq.square().sum().backward()  # q.grad, k.grad and v.grad: derivatives of second order
        >>> k.grad.shape
        torch.Size([1, 2, 5, 16])
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, the query's own key, not {window}")
    if k_BGSK.shape != v_BGSK.shape or q_BHTK.shape[2] > k_BGSK.shape[2] or q_BHTK.shape[1] % k_BGSK.shape[1]:
        raise ValueError(
            "keys and values must have the same shape, at least as many positions as the queries, and a number of "
            f"heads that divides the queries': got {[tuple(x.shape) for x in (q_BHTK, k_BGSK, v_BGSK)]}"
        )
    o_BHTK, lse_BHT = attention_forward(q_BHTK, k_BGSK, v_BGSK, window, None, implementation)
    seen = seen_sink(sink, q_BHTK, k_BGSK, window)
    return o_BHTK if seen is None else add_sink(o_BHTK, lse_BHT, seen)[0]


@torch.library.custom_op("ttt_e2e::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, num_empty_slots: Tensor | None, implementation: str
) -> tuple[Tensor, Tensor]:
    """Attention o [B, H, T, K], and the scores' logsumexp [B, H, T].

    Arguments as in `inner_loop_attention`, unchecked. `num_empty_slots` is a tensor so that a captured graph can be run
    again while a cache of fixed size fills up.
    """
    return _choose(implementation, q, k).forward(q, k, v, _view(k, window, num_empty_slots))


@torch.library.custom_op("ttt_e2e::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    num_new_keys: int,
    window: int | None,
    num_empty_slots: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <o, do> + <lse, dlse> in q, and in the last N = `num_new_keys` keys and values.

    They are dq [B, H, T, K] and dk, dv [B, G, N, K]. `dlse` [B, H, T] may be None, which stands for zeros.

    Differentiable once more, in q, k, v, do and dlse. The effect of `o` and `lse`, which `attention_forward` returned,
    as functions of q, k and v is contained in that derivative, so they take no gradient.
    """
    view = _view(k, window, num_empty_slots, num_new_keys)
    return _choose(implementation, q, k).backward(Attended(q, k, v, o, lse), do, dlse, view)


@torch.library.custom_op("ttt_e2e::attention_double_backward", mutates_args=())
def attention_double_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    num_new_keys: int,
    window: int | None,
    num_empty_slots: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of <dq, a> + <dk, b> + <dv, c> in q, k, v, do and dlse.

    They are gq [B, H, T, K], gk and gv [B, G, S, K], gdo [B, H, T, K] and gdlse [B, H, T]. a [B, H, T, K] and b, c
    [B, G, N, K] are the gradients of what `attention_backward` returned. Not differentiable.
    """
    view = _view(k, window, num_empty_slots, num_new_keys)
    return _choose(implementation, q, k).double_backward(Attended(q, k, v, o, lse), do, dlse, (a, b, c), view)


def _view(k_BGSK: Tensor, window: int | None, num_empty_slots: Tensor | None, num_new_keys: int = 0) -> KeyView:
    num_keys = k_BGSK.shape[2]
    return KeyView(num_keys if window is None else min(window, num_keys), num_empty_slots, num_new_keys)


def _choose(implementation: str, q_BHTK: Tensor, k_BGSK: Tensor) -> Any:
    """The module whose `forward`, `backward` and `double_backward` serve these tensors."""
    unsupported = None
    if q_BHTK.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        unsupported = f"float32, bfloat16 or float16, not {q_BHTK.dtype}"
    elif q_BHTK.shape[3] > 256:
        unsupported = f"a head dimension of at most 256, not {q_BHTK.shape[3]}"
    served = triton_serves(q_BHTK, implementation, unsupported)
    if implementation == "triton" or (implementation == "auto" and served and q_BHTK.is_cuda):
        from ttt_e2e.ops.attention import triton

        return triton
    small = q_BHTK.shape[:3].numel() * k_BGSK.shape[2] <= tuning.REFERENCE_SCORES
    return reference if implementation == "reference" or (implementation == "auto" and small) else tiled


# The shapes of the outputs, for tracing.


@attention_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


@attention_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    num_new_keys: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    new_shape = (*k.shape[:2], num_new_keys, k.shape[3])
    return q.new_empty(q.shape), k.new_empty(new_shape), k.new_empty(new_shape)


@attention_double_backward.register_fake
def _(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, ...]:
    gdlse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape), q.new_empty(q.shape), gdlse


# The derivatives.


def _save_forward(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, ctx.window, num_empty_slots, ctx.implementation = inputs
    ctx.save_for_backward(q, k, v, *output, num_empty_slots)


def _differentiate_forward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple:
    q, k, v, o, lse, num_empty_slots = ctx.saved_tensors
    settings = (k.shape[2], ctx.window, num_empty_slots, ctx.implementation)
    return *attention_backward(q, k, v, o, lse, do, dlse, *settings), None, None, None


def _save_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.num_new_keys, ctx.window, num_empty_slots, ctx.implementation = inputs
    ctx.save_for_backward(*tensors, num_empty_slots)


def _differentiate_backward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> tuple:
    *tensors, num_empty_slots = ctx.saved_tensors
    settings = (ctx.num_new_keys, ctx.window, num_empty_slots, ctx.implementation)
    gq, gk, gv, gdo, gdlse = attention_double_backward(*tensors, a, b, c, *settings)
    return gq, gk, gv, None, None, gdo, None if tensors[6] is None else gdlse, None, None, None, None


def _differentiate_double_backward(ctx: Any, *gradients: Tensor) -> tuple:
    raise NotImplementedError("attention has derivatives of first and second order only")


attention_forward.register_autograd(_differentiate_forward, setup_context=_save_forward)
attention_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)
attention_double_backward.register_autograd(_differentiate_double_backward)
