"""An MLP with weights of its own for every sequence, and its gradient written out: what learns at test time.

A sequence has whole matrices of its own (`fast_mlp`), or only the two factors of an addition to matrices that all
sequences share (`low_rank_mlp`), which is far less to keep.

Shapes: B sequences (or sequences times heads), T tokens, D width, F hidden width, E = 2 F, R rank. I and O are the
inputs and outputs of either matrix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ttt_e2e.ops.elementwise import swiglu
from ttt_e2e.ops.linear import Factors, batched_linear, linear, pull_linear


class FastWeights(NamedTuple):
    """An MLP's weights, every sequence's own, in float32."""

    w_in_BED: Tensor  # E = 2 F: gate and value side by side
    w_out_BDF: Tensor


class LowRankWeights(NamedTuple):
    """The factors of what is added to an MLP's weights, every sequence's own, in float32: W becomes W + up @ down."""

    up_in_BER: Tensor
    down_in_BRD: Tensor
    up_out_BDR: Tensor
    down_out_BRF: Tensor


Weights = FastWeights | LowRankWeights
FastPull = Callable[[Tensor, bool], tuple[Tensor | None, tuple[Factors, ...]]]


def fast_mlp(x_BTD: Tensor, fast: FastWeights) -> tuple[Tensor, FastPull]:
    """SwiGLU with every sequence's own weights.

    Its pull also gives the gradients of the weights, as factors, and that of x only if it is told to.
    """
    w_in_BED, w_out_BDF = (w.to(x_BTD.dtype) for w in fast)
    y_BTF, pull_swiglu = swiglu(batched_linear(x_BTD, w_in_BED))

    def pull(g_BTD: Tensor, below: bool) -> tuple[Tensor | None, tuple[Factors, ...]]:
        dh_BTE = pull_swiglu(g_BTD @ w_out_BDF)
        return dh_BTE @ w_in_BED if below else None, (Factors(dh_BTE, x_BTD), Factors(g_BTD, y_BTF))

    return batched_linear(y_BTF, w_out_BDF), pull


def low_rank_mlp(x_BTD: Tensor, fast: LowRankWeights, w_in_ED: Tensor, w_out_DF: Tensor) -> tuple[Tensor, FastPull]:
    """SwiGLU whose two matrices are the given ones and every sequence's own addition to them.

    Its pull is that of `fast_mlp`, the given matrices being constants. No sequence's sum is ever formed.
    """
    up_in_BER, down_in_BRD, up_out_BDR, down_out_BRF = (w.to(x_BTD.dtype) for w in fast)
    h_BTE, pull_in = _low_rank_linear(x_BTD, w_in_ED, up_in_BER, down_in_BRD)
    y_BTF, pull_swiglu = swiglu(h_BTE)
    out_BTD, pull_out = _low_rank_linear(y_BTF, w_out_DF, up_out_BDR, down_out_BRF)

    def pull(g_BTD: Tensor, below: bool) -> tuple[Tensor | None, tuple[Factors, ...]]:
        dy_BTF, *of_out = pull_out(g_BTD, True)
        dx_BTD, *of_in = pull_in(pull_swiglu(dy_BTF), below)
        return dx_BTD, (*of_in, *of_out)

    return out_BTD, pull


def _low_rank_linear(
    x_BTI: Tensor, w_OI: Tensor, up_BOR: Tensor, down_BRI: Tensor
) -> tuple[Tensor, Callable[[Tensor, bool], tuple[Any, Factors, Factors]]]:
    """x @ (w + up @ down)^T for every sequence, [B, T, O], and the pull to x (None if not `below`), up and down."""
    z_BTR = batched_linear(x_BTI, down_BRI)

    def pull(g_BTO: Tensor, below: bool) -> tuple[Any, Factors, Factors]:
        dz_BTR = g_BTO @ up_BOR
        dx_BTI = pull_linear(g_BTO, w_OI) + dz_BTR @ down_BRI if below else None
        return dx_BTI, Factors(g_BTO, z_BTR), Factors(dz_BTR, x_BTI)

    return linear(x_BTI, w_OI) + batched_linear(z_BTR, up_BOR), pull
