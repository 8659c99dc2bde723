"""An MLP with weights of its own for every sequence, and its gradient written out: what learns at test time.

Shapes: B sequences (or sequences times heads), T tokens, D width, F hidden width, E = 2 F.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ttt_e2e.ops.elementwise import swiglu
from ttt_e2e.ops.linear import batched_linear, weight_gradient


class FastWeights(NamedTuple):
    """An MLP's weights, every sequence's own, in float32."""

    w_in_BED: Tensor  # E = 2 F: gate and value side by side
    w_out_BDF: Tensor


FastPull = Callable[[Tensor, bool], tuple[Tensor | None, FastWeights]]


def fast_mlp(x_BTD: Tensor, fast: FastWeights) -> tuple[Tensor, FastPull]:
    """SwiGLU with every sequence's own weights.

    Its pull also gives the gradient of the weights, and that of x only if it is told to.
    """
    w_in_BED, w_out_BDF = (w.to(x_BTD.dtype) for w in fast)
    y_BTF, pull_swiglu = swiglu(batched_linear(x_BTD, w_in_BED))

    def pull(g_BTD: Tensor, below: bool) -> tuple[Tensor | None, FastWeights]:
        dh_BTE = pull_swiglu(g_BTD @ w_out_BDF)
        gradient = FastWeights(weight_gradient(dh_BTE, x_BTD), weight_gradient(g_BTD, y_BTF))
        return dh_BTE @ w_in_BED if below else None, FastWeights(*(g.to(fast.w_in_BED.dtype) for g in gradient))

    return batched_linear(y_BTF, w_out_BDF), pull
