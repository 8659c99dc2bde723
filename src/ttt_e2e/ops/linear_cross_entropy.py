"""Cross-entropy from hidden states and the head's matrix, differentiable twice, without holding all logits.

Three implementations give the same numbers: `plain` holds every logit and is the reference; `tiled` walks over chunks
of tokens and vocabulary in ordinary PyTorch; `triton` is the same walk with the work between the matrix products
fused. None keeps logits from forward to backward: what lasts is one logsumexp per token.

With z = x W^T and p = softmax(z), for one cotangent g per token:

    dz = g (p - onehot)             dx = dz W            dW = dz^T x

The double backward is the tangent of these along x' = a and W' = c, the cotangents of dx and dW (the Hessian is
symmetric, so the gradient of <dx, a> + <dW, c> is that tangent):

    z' = a W^T + x c^T              p' = p (z' - rowsum(p z'))                  dz' = g p'
    gx = dz' W + dz c               gW = dz'^T x + dz^T a                       gg = rowsum((p - onehot) z')

The logsumexp L is a function of x and W whose effect these contain: no gradient passes through L itself.

Shapes: N tokens, D width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_e2e.ops import HAS_TRITON
from ttt_e2e.ops import linear_cross_entropy_tiled as tiled
from ttt_e2e.ops.elementwise import accumulation_dtype

IMPLEMENTATIONS = ("auto", "plain", "tiled", "triton")

# Up to here `auto` takes `plain`: 4 MiB of logits in float32 are less than one chunk of the others.
PLAIN_LOGITS = 2**20


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, implementation: str = "auto") -> Tensor:
    """-log softmax(x @ weight.T)[target] of every token, without a tensor of tokens x vocabulary.

    Args:
        x_ND: hidden states [..., D] in float32, float64, bfloat16 or float16. The matrix products are in this dtype.
        weight_VD: the head's matrix [V, D], in x's dtype or another, such as float32 where x is bfloat16.
        targets_N: the true tokens [...] as int64, each in [0, V). One outside is an error from `plain`; from the
            others, which never look at the targets as a whole, its loss is NaN.
        implementation: "plain", "tiled", "triton" (CUDA only), or "auto", the default: plain where all logits are few,
            else triton on CUDA if it is installed, else tiled.

    Returns:
        The losses [...], in float32 (float64 if x is), not reduced: give masked tokens a weight of zero.

    Differentiable twice in x and weight, in eager mode, in `torch.compile(fullgraph=True)` and under `torch.func.grad`;
    a third derivative raises NotImplementedError. A gradient has the dtype of its tensor and is summed in float32.

    Memory beyond inputs and results: tiled and triton hold at most `linear_cross_entropy_tiled.LOGITS_AT_ONCE` logits,
    whatever N and V, and sums in float32 of x's size; plain holds N x V logits, several times.

    Raises:
        ValueError: an unknown implementation, one that cannot run here, or shapes and dtypes that do not fit.

    Example:
        >>> x = torch.randn(2, 5, 16, requires_grad=True)
        >>> weight, targets = torch.randn(1000, 16), torch.randint(1000, (2, 5))
        >>> loss = linear_cross_entropy(x, weight, targets).mean()
        >>> (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        >>> dx.square().sum().backward()
    """
    if weight_VD.dim() != 2 or x_ND.shape[-1] != weight_VD.shape[1]:
        raise ValueError(f"x {list(x_ND.shape)} and weight {list(weight_VD.shape)} must be [..., D] and [V, D].")
    if targets_N.shape != x_ND.shape[:-1]:
        raise ValueError(f"targets {list(targets_N.shape)} must have one entry per row of x {list(x_ND.shape)}.")
    if targets_N.dtype != torch.int64:
        raise ValueError(f"targets must be int64, not {targets_N.dtype}.")
    if not (x_ND.is_floating_point() and weight_VD.is_floating_point()):
        raise ValueError(f"x and weight must be floating point, not {x_ND.dtype} and {weight_VD.dtype}.")
    _check_implementation(implementation, x_ND.device.type)
    nll_N, _ = _call(
        cross_entropy_forward, x_ND.reshape(-1, x_ND.shape[-1]), weight_VD, targets_N.reshape(-1), implementation
    )
    return nll_N.view(targets_N.shape)


@torch.library.custom_op("ttt_e2e::cross_entropy_forward", mutates_args=())
def cross_entropy_forward(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, implementation: str
) -> tuple[Tensor, Tensor]:
    """The losses [N] of `linear_cross_entropy` for x [N, D], and the logsumexp [N] that `cross_entropy_backward` needs.

    The logsumexp takes no gradient.
    """
    pieces = _pieces(implementation, x_ND, weight_VD)
    if pieces is None:
        return _plain_forward(x_ND, weight_VD, targets_N)
    return tiled.forward(x_ND, weight_VD, targets_N, pieces)


@torch.library.custom_op("ttt_e2e::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    lse_N: Tensor,
    g_N: Tensor,
    need_weight: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """The gradient of sum(g * nll) in x [N, D] and in weight [V, D]; the latter is an empty tensor if not needed."""
    pieces = _pieces(implementation, x_ND, weight_VD)
    if pieces is None:
        return _plain_backward(x_ND, weight_VD, targets_N, lse_N, g_N, need_weight)
    return tiled.backward(x_ND, weight_VD, targets_N, lse_N, g_N, need_weight, pieces)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of <dx, a> + <dweight, c> in x [N, D], weight [V, D] and g [N]; an empty c stands for zero."""
    pieces = _pieces(implementation, x_ND, weight_VD)
    if pieces is None:
        return _plain_double_backward(x_ND, weight_VD, targets_N, lse_N, g_N, a_ND, c_VD)
    return tiled.double_backward(x_ND, weight_VD, targets_N, lse_N, g_N, a_ND, c_VD, pieces)


def _check_implementation(implementation: str, device: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"Unknown implementation {implementation!r}: it must be one of {', '.join(IMPLEMENTATIONS)}.")
    if implementation == "triton" and not HAS_TRITON:
        raise ValueError("The implementation 'triton' needs the package triton, which is not installed.")
    if implementation == "triton" and device != "cuda" and not _triton().INTERPRETED:
        raise ValueError(f"The implementation 'triton' runs on CUDA only, not on {device}.")


def _pieces(implementation: str, x_ND: Tensor, weight_VD: Tensor) -> tiled.Pieces | None:
    """What an implementation does between the matrix products of the walk over chunks; None stands for plain."""
    _check_implementation(implementation, x_ND.device.type)
    if implementation == "auto" and x_ND.shape[0] * weight_VD.shape[0] <= PLAIN_LOGITS:
        implementation = "plain"
    if implementation == "auto":
        implementation = "triton" if x_ND.is_cuda and HAS_TRITON else "tiled"
    if implementation == "plain":
        return None
    return _triton().PIECES if implementation == "triton" else tiled.PIECES


def _triton() -> Any:
    # Only here: the package works without Triton.
    from ttt_e2e.ops import linear_cross_entropy_triton

    return linear_cross_entropy_triton


def _plain_logits(x_ND: Tensor, weight_VD: Tensor) -> Tensor:
    return F.linear(x_ND, weight_VD.to(x_ND.dtype)).to(accumulation_dtype(x_ND.dtype))


def _plain_forward(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    z_NV = _plain_logits(x_ND, weight_VD)
    lse_N = z_NV.logsumexp(1)
    return lse_N - z_NV.gather(1, targets_N[:, None])[:, 0], lse_N


def _plain_errors(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, lse_N: Tensor) -> tuple[Tensor, Tensor]:
    """p and p - onehot."""
    p_NV = (_plain_logits(x_ND, weight_VD) - lse_N[:, None]).exp()
    return p_NV, p_NV.scatter_add(1, targets_N[:, None], p_NV.new_full((), -1).expand(len(targets_N), 1))


def _plain_backward(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, lse_N: Tensor, g_N: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor]:
    _, error_NV = _plain_errors(x_ND, weight_VD, targets_N, lse_N)
    dz_NV = (g_N[:, None] * error_NV).to(x_ND.dtype)
    dweight_VD = (dz_NV.T @ x_ND).to(weight_VD.dtype) if need_weight else weight_VD.new_empty(0)
    return dz_NV @ weight_VD.to(x_ND.dtype), dweight_VD


def _plain_double_backward(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, lse_N: Tensor, g_N: Tensor, a_ND: Tensor, c_VD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x_ND.dtype
    w_VD = weight_VD.to(dtype)
    c_VD = c_VD.to(dtype) if c_VD.numel() else torch.zeros_like(w_VD)
    p_NV, error_NV = _plain_errors(x_ND, weight_VD, targets_N, lse_N)
    tangent_NV = (a_ND @ w_VD.T + x_ND @ c_VD.T).to(p_NV.dtype)  # z'
    mean_N1 = (p_NV * tangent_NV).sum(1, keepdim=True)
    dz_NV = (g_N[:, None] * error_NV).to(dtype)
    bend_NV = (g_N[:, None] * p_NV * (tangent_NV - mean_N1)).to(dtype)  # dz'
    return (
        bend_NV @ w_VD + dz_NV @ c_VD,
        (bend_NV.T @ x_ND + dz_NV.T @ a_ND).to(weight_VD.dtype),
        (error_NV * tangent_NV).sum(1),
    )


@cross_entropy_forward.register_fake
def _(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    nll_N = x_ND.new_empty(x_ND.shape[0], dtype=accumulation_dtype(x_ND.dtype))
    return nll_N, torch.empty_like(nll_N)


@cross_entropy_backward.register_fake
def _(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    lse_N: Tensor,
    g_N: Tensor,
    need_weight: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    return x_ND.new_empty(x_ND.shape), weight_VD.new_empty(weight_VD.shape if need_weight else 0)


@cross_entropy_double_backward.register_fake
def _(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    lse_N: Tensor,
    g_N: Tensor,
    a_ND: Tensor,
    c_VD: Tensor,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return x_ND.new_empty(x_ND.shape), weight_VD.new_empty(weight_VD.shape), g_N.new_empty(g_N.shape)


def _forward_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x_ND, weight_VD, targets_N, ctx.implementation = inputs
    ctx.save_for_backward(x_ND, weight_VD, targets_N, output[1])
    ctx.mark_non_differentiable(output[1])


def _forward_backward(ctx: Any, g_N: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
    need_weight = ctx.needs_input_grad[1]
    dx_ND, dweight_VD = _call(cross_entropy_backward, *ctx.saved_tensors, g_N, need_weight, ctx.implementation)
    return dx_ND, dweight_VD if need_weight else None, None, None


def _backward_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.need_weight, ctx.implementation = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)  # zeros for c would cost as much as any other c


def _backward_backward(ctx: Any, a_ND: Tensor | None, c_VD: Tensor | None) -> tuple[Tensor | None, ...]:
    x_ND, weight_VD, targets_N, lse_N, g_N = ctx.saved_tensors
    if a_ND is None:
        a_ND = torch.zeros_like(x_ND)
    if c_VD is None:
        c_VD = weight_VD.new_empty(0)
    gx_ND, gweight_VD, gg_N = _call(
        cross_entropy_double_backward, x_ND, weight_VD, targets_N, lse_N, g_N, a_ND, c_VD, ctx.implementation
    )
    return gx_ND, gweight_VD, None, None, gg_N, None, None


def _third_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("linear_cross_entropy has a first and a second derivative, but no third.")


def _call(op: Any, *args: Any) -> Any:
    """An operator, also under `torch.func`, whose transforms do not take what `register_autograd` makes of it."""
    if torch._C._are_functorch_transforms_active():
        return _FUNCTIONS[op].apply(*args)
    return op(*args)


_FUNCTIONS: dict[Any, type[torch.autograd.Function]] = {}
for _op, _context, _backward in (
    (cross_entropy_forward, _forward_context, _forward_backward),
    (cross_entropy_backward, _backward_context, _backward_backward),
    (cross_entropy_double_backward, lambda ctx, inputs, output: None, _third_derivative),
):
    _op.register_autograd(_backward, setup_context=_context)
    _methods = {"forward": _op, "setup_context": _context, "backward": _backward}
    _methods = {name: staticmethod(method) for name, method in _methods.items()}
    _FUNCTIONS[_op] = type("LinearCrossEntropy", (torch.autograd.Function,), _methods)
