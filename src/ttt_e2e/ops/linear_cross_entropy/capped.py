"""`Tiled` for logits that are capped, z = cap tanh(u / cap) with u = x W^T; `reference.py` has the formulas."""

from torch import Tensor

from ttt_e2e.ops.elementwise import softcap
from ttt_e2e.ops.linear_cross_entropy.tiled import Tiled


class CappedTiled(Tiled):
    """`Tiled` with the cap between its matrix products and its work on the logits; it holds a few more buffers."""

    def __init__(self, cap: float):
        self.cap = cap

    def _add_to_lse(self, z_nv: Tensor, at_n: Tensor, lse_n: Tensor, target_n: Tensor) -> None:
        super()._add_to_lse(softcap(z_nv.to(lse_n.dtype), self.cap)[0], at_n, lse_n, target_n)

    def _gradient(self, z_nv: Tensor, at_n: Tensor, lse_n: Tensor, g_n: Tensor) -> Tensor:
        capped_nv, vjp = softcap(z_nv.to(lse_n.dtype), self.cap)
        return vjp(super()._gradient(capped_nv, at_n, lse_n, g_n)).to(z_nv.dtype)

    def _add_to_mean(
        self, z_nv: Tensor, tangent_nv: Tensor, at_n: Tensor, lse_n: Tensor, mean_n: Tensor, target_n: Tensor
    ) -> None:
        capped_nv, vjp = softcap(z_nv.to(lse_n.dtype), self.cap)
        super()._add_to_mean(capped_nv, vjp(tangent_nv), at_n, lse_n, mean_n, target_n)

    def _gradient_and_tangent(
        self, z_nv: Tensor, tangent_nv: Tensor, at_n: Tensor, lse_n: Tensor, g_n: Tensor, mean_n: Tensor
    ) -> tuple[Tensor, Tensor]:
        capped_nv, vjp = softcap(z_nv.to(lse_n.dtype), self.cap)
        tangent_nv = vjp(tangent_nv)
        bend_nv = capped_nv * tangent_nv * (-2 / self.cap**2)  # the tangent of the cap's slope
        dz_nv, dz_tangent_nv = super()._gradient_and_tangent(capped_nv, tangent_nv, at_n, lse_n, g_n, mean_n)
        return vjp(dz_nv).to(z_nv.dtype), (vjp(dz_tangent_nv) + dz_nv * bend_nv).to(z_nv.dtype)
