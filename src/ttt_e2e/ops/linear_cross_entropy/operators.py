"""The operators of the linear cross-entropy, each in several implementations. Each one's derivative is the next."""

from typing import Any

import torch
from torch import Tensor

from ttt_e2e.ops.elementwise import accumulation_dtype
from ttt_e2e.ops.implementations import triton_serves
from ttt_e2e.ops.linear_cross_entropy.capped import CappedTiled
from ttt_e2e.ops.linear_cross_entropy.reference import Reference
from ttt_e2e.ops.linear_cross_entropy.tiled import Tiled


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, cap: float | None = None, implementation: str = "auto"
) -> Tensor:
    """-log softmax(x @ weight.T)[target] of every token, without a tensor of tokens x vocabulary.

    Args:
        x_ND: Hidden states [..., D] in float32, float64, bfloat16 or float16. The matrix products are in this dtype.
        weight_VD: The head's matrix [V, D], in x's dtype or another, such as float32 where x is bfloat16.
        targets_N: The true tokens [...], int64, each in [0, V). "reference" raises an error on one outside; the others
            return NaN as its loss.
        cap: every logit becomes cap * tanh(logit / cap); None for no cap.
        implementation: "reference" forms all logits; "tiled" is PyTorch, on any device; "triton" needs CUDA, and has no
            cap. "auto" takes triton on CUDA if it is installed and there is no cap, else tiled.

    Returns:
        The losses [...], in float32 (float64 if x is), not reduced: give masked tokens a weight of zero.

    Raises:
        ValueError: If the implementation is unknown or cannot run here, or shapes and dtypes do not fit together.

    Differentiable twice in x and weight, also under `torch.compile(fullgraph=True)`; a third derivative raises
    NotImplementedError. A gradient has the dtype of its tensor and is summed in float32. Beyond inputs and results,
    tiled and triton hold at most `tuning.LOGITS_AT_ONCE` logits, whatever N and V, and float32 sums of x's size.

    Example:
        >>> x = torch.randn(2, 5, 16, requires_grad=True)
        >>> weight, targets = torch.randn(1000, 16), torch.randint(1000, (2, 5))
        >>> loss = linear_cross_entropy(x, weight, targets).mean()
        >>> (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        >>> dx.square().sum().backward()
    """
    if weight_VD.dim() != 2 or x_ND.shape[-1] != weight_VD.shape[1]:
        raise ValueError(f"x {list(x_ND.shape)} and weight {list(weight_VD.shape)} must be [..., D] and [V, D]")
    if targets_N.shape != x_ND.shape[:-1]:
        raise ValueError(f"targets {list(targets_N.shape)} must have one entry per row of x {list(x_ND.shape)}")
    if targets_N.dtype != torch.int64:
        raise ValueError(f"targets must be int64, not {targets_N.dtype}")
    if not (x_ND.is_floating_point() and weight_VD.is_floating_point()):
        raise ValueError(f"x and weight must be floating point, not {x_ND.dtype} and {weight_VD.dtype}")
    x, targets = x_ND.reshape(-1, x_ND.shape[-1]), targets_N.reshape(-1)
    return cross_entropy_forward(x, weight_VD, targets, implementation, cap)[0].view(targets_N.shape)


@torch.library.custom_op("ttt_e2e::cross_entropy_forward", mutates_args=())
def cross_entropy_forward(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, implementation: str, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The losses [N] for x [N, D], unchecked, and the logits' logsumexp [N], which takes no gradient."""
    return _choose(implementation, x_ND, cap).forward(x_ND, weight_VD, targets_N)


@torch.library.custom_op("ttt_e2e::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    lse_N: Tensor,
    g_N: Tensor,
    need_weight: bool,
    implementation: str,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of sum(g * losses) in x [N, D] and in weight [V, D], the latter an empty tensor if not needed."""
    return _choose(implementation, x_ND, cap).backward(x_ND, weight_VD, targets_N, lse_N, g_N, need_weight)


@torch.library.custom_op("ttt_e2e::cross_entropy_double_backward", mutates_args=())
def cross_entropy_double_backward(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    lse_N: Tensor,
    g_N: Tensor,
    a_ND: Tensor,
    c_VD: Tensor,
    implementation: str,
    cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of <dx, a> + <dweight, c> in x [N, D], weight [V, D] and g [N]; an empty c stands for zeros."""
    return _choose(implementation, x_ND, cap).double_backward(x_ND, weight_VD, targets_N, lse_N, g_N, a_ND, c_VD)


def _choose(implementation: str, x_ND: Tensor, cap: float | None) -> Any:
    """What has the `forward`, `backward` and `double_backward` that serve x."""
    served = triton_serves(x_ND, implementation)
    if implementation == "reference":
        return Reference(cap)
    if cap is not None:
        if implementation == "triton":
            raise ValueError("the Triton kernels have no cap; use implementation='auto' or 'tiled'")
        return CappedTiled(cap)
    if implementation == "triton" or (implementation == "auto" and served and x_ND.is_cuda):
        from ttt_e2e.ops.linear_cross_entropy.triton import TritonTiled

        return TritonTiled()
    return Tiled()


# The shapes of the outputs, for tracing.


@cross_entropy_forward.register_fake
def _(x_ND: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    nll_N = x_ND.new_empty(x_ND.shape[0], dtype=accumulation_dtype(x_ND.dtype))
    return nll_N, torch.empty_like(nll_N)


@cross_entropy_backward.register_fake
def _(x_ND: Tensor, weight_VD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_weight = rest[3]
    return x_ND.new_empty(x_ND.shape), weight_VD.new_empty(weight_VD.shape if need_weight else 0)


@cross_entropy_double_backward.register_fake
def _(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    gg_N = x_ND.new_empty(x_ND.shape[0], dtype=accumulation_dtype(x_ND.dtype))
    return x_ND.new_empty(x_ND.shape), weight_VD.new_empty(weight_VD.shape), gg_N


# The derivatives.


def _save_forward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x_ND, weight_VD, targets_N, *ctx.settings = inputs
    ctx.save_for_backward(x_ND, weight_VD, targets_N, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate_forward(ctx: Any, g_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    need_weight = ctx.needs_input_grad[1]
    dx_ND, dweight_VD = cross_entropy_backward(*ctx.saved_tensors, g_N, need_weight, *ctx.settings)
    return dx_ND, dweight_VD if need_weight else None, None, None, None


def _save_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, implementation, cap = inputs
    ctx.settings = implementation, cap
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)  # zeros for c would cost as much as any other c


def _differentiate_backward(ctx: Any, a_ND: Tensor | None, c_VD: Tensor | None) -> tuple[Tensor | None, ...]:
    x_ND, weight_VD, *rest = ctx.saved_tensors
    a_ND = torch.zeros_like(x_ND) if a_ND is None else a_ND
    c_VD = weight_VD.new_empty(0) if c_VD is None else c_VD
    gx_ND, gweight_VD, gg_N = cross_entropy_double_backward(x_ND, weight_VD, *rest, a_ND, c_VD, *ctx.settings)
    return gx_ND, gweight_VD, None, None, gg_N, None, None, None


def _differentiate_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("linear_cross_entropy has derivatives of first and second order only")


cross_entropy_forward.register_autograd(_differentiate_forward, setup_context=_save_forward)
cross_entropy_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)
cross_entropy_double_backward.register_autograd(_differentiate_double_backward)
