"""The MLP that learns at test time: fast weights for every sequence, and its gradient written out.

A sequence has whole matrices of its own (`fast_mlp`), or only the two factors of an addition to matrices that all
sequences share (`low_rank_mlp`), which takes far less memory.

Shapes: B sequences (or sequences times heads), T tokens, D hidden size, F intermediate size, E = 2 F, R rank. I and O
are the inputs and outputs of either matrix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ttt_e2e.ops.elementwise import glu
from ttt_e2e.ops.linear import OuterProductFactors, batched_linear, linear, linear_vjp


class FastWeights(NamedTuple):
    """The weights of an MLP for every sequence, in float32."""

    w_in_BED: Tensor  # E = 2 F: gate and value side by side
    w_out_BDF: Tensor


class LowRankWeights(NamedTuple):
    """The factors of an addition to an MLP's weights for every sequence, in float32: W becomes W + up @ down."""

    up_in_BER: Tensor
    down_in_BRD: Tensor
    up_out_BDR: Tensor
    down_out_BRF: Tensor


Weights = FastWeights | LowRankWeights
FastVjp = Callable[[Tensor, bool], tuple[Tensor | None, tuple[OuterProductFactors, ...]]]


def fast_mlp(x_BTD: Tensor, fast: FastWeights, activation: str = "silu") -> tuple[Tensor, FastVjp]:
    """A gated MLP with weights for every sequence, [B, T, D], and its vjp; see `elementwise.glu` for the activation.

    The vjp takes a gradient of the output, and whether the gradient of x is needed. It returns that gradient (or None)
    and the gradients of both weights as factors.
    """
    w_in_BED, w_out_BDF = (w.to(x_BTD.dtype) for w in fast)
    y_BTF, glu_vjp = glu(batched_linear(x_BTD, w_in_BED), activation)

    def vjp(g_BTD: Tensor, need_x: bool) -> tuple[Tensor | None, tuple[OuterProductFactors, ...]]:
        dh_BTE = glu_vjp(g_BTD @ w_out_BDF)
        return dh_BTE @ w_in_BED if need_x else None, (
            OuterProductFactors(dh_BTE, x_BTD),
            OuterProductFactors(g_BTD, y_BTF),
        )

    return batched_linear(y_BTF, w_out_BDF), vjp


def low_rank_mlp(
    x_BTD: Tensor, fast: LowRankWeights, w_in_ED: Tensor, w_out_DF: Tensor, activation: str = "silu"
) -> tuple[Tensor, FastVjp]:
    """A gated MLP with shared matrices and an addition of low rank for every sequence, [B, T, D], and its vjp.

    The vjp is like that of `fast_mlp`, with the gradients of the four factors; the shared matrices are constants to it.
    The sum of a matrix and an addition is never formed.
    """
    up_in_BER, down_in_BRD, up_out_BDR, down_out_BRF = (w.to(x_BTD.dtype) for w in fast)
    h_BTE, in_vjp = _low_rank_linear(x_BTD, w_in_ED, up_in_BER, down_in_BRD)
    y_BTF, glu_vjp = glu(h_BTE, activation)
    out_BTD, out_vjp = _low_rank_linear(y_BTF, w_out_DF, up_out_BDR, down_out_BRF)

    def vjp(g_BTD: Tensor, need_x: bool) -> tuple[Tensor | None, tuple[OuterProductFactors, ...]]:
        dy_BTF, *of_out = out_vjp(g_BTD, True)
        dx_BTD, *of_in = in_vjp(glu_vjp(dy_BTF), need_x)
        return dx_BTD, (*of_in, *of_out)

    return out_BTD, vjp


def _low_rank_linear(
    x_BTI: Tensor, w_OI: Tensor, up_BOR: Tensor, down_BRI: Tensor
) -> tuple[Tensor, Callable[[Tensor, bool], tuple[Any, OuterProductFactors, OuterProductFactors]]]:
    """x @ (w + up @ down)^T for every sequence, [B, T, O], and the vjp to x (None if not needed), up and down."""
    z_BTR = batched_linear(x_BTI, down_BRI)

    def vjp(g_BTO: Tensor, need_x: bool) -> tuple[Any, OuterProductFactors, OuterProductFactors]:
        dz_BTR = g_BTO @ up_BOR
        dx_BTI = linear_vjp(g_BTO, w_OI) + dz_BTR @ down_BRI if need_x else None
        return dx_BTI, OuterProductFactors(g_BTO, z_BTR), OuterProductFactors(dz_BTR, x_BTI)

    return linear(x_BTI, w_OI) + batched_linear(z_BTR, up_BOR), vjp
