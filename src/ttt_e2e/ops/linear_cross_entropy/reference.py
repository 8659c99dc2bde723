"""The definition of the linear cross-entropy, its gradients and the gradients of these, on all logits [N, V].

With z = x W^T and p = softmax(z), for one cotangent g per token:

    dz = g (p - onehot)             dx = dz W            dW = dz^T x

The double backward is the tangent of these along x' = a and W' = c, the cotangents of dx and dW (the Hessian is
symmetric, so the gradient of <dx, a> + <dW, c> is that tangent):

    z' = a W^T + x c^T              p' = p (z' - rowsum(p z'))                  dz' = g p'
    gx = dz' W + dz c               gW = dz'^T x + dz^T a                       gg = rowsum((p - onehot) z')

The logsumexp is a function of x and W whose effect these contain: it takes no gradient itself.

With a cap, u = x W^T and z = cap tanh(u / cap), of slope s = 1 - (z / cap)^2. Then u' takes the place of z' in the
first equation, and the products with W, c, x and a are of du and du' in place of dz and dz':

    z' = s u'                       du = s dz                                   du' = s dz' - 2 z z' dz / cap^2
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_e2e.ops.elementwise import accumulation_dtype


class Reference:
    """The three functions, for logits with a cap or without one (None)."""

    def __init__(self, cap: float | None = None):
        self.cap = cap

    def forward(self, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """The losses [N] and the logits' logsumexp [N]."""
        z_NV, _ = self._logits(x_ND, weight_VD)
        lse_N = z_NV.logsumexp(1)
        return lse_N - z_NV.gather(1, targets_N[:, None])[:, 0], lse_N

    def backward(
        self, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, lse_N: Tensor, g_N: Tensor, need_weight: bool
    ) -> tuple[Tensor, Tensor]:
        """Gradients dx [N, D] and dW [V, D], the latter empty if not needed."""
        z_NV, slope_NV = self._logits(x_ND, weight_VD)
        _, error_NV = _errors(z_NV, targets_N, lse_N)
        du_NV = (slope_NV * g_N[:, None] * error_NV).to(x_ND.dtype)
        dweight_VD = (du_NV.T @ x_ND).to(weight_VD.dtype) if need_weight else weight_VD.new_empty(0)
        return du_NV @ weight_VD.to(x_ND.dtype), dweight_VD

    def double_backward(
        self, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, lse_N: Tensor, g_N: Tensor, a_ND: Tensor, c_VD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients gx [N, D], gW [V, D] and gg [N]; an empty c stands for zeros."""
        dtype = x_ND.dtype
        w_VD = weight_VD.to(dtype)
        c_VD = c_VD.to(dtype) if c_VD.numel() else torch.zeros_like(w_VD)
        z_NV, slope_NV = self._logits(x_ND, weight_VD)
        p_NV, error_NV = _errors(z_NV, targets_N, lse_N)
        tangent_NV = slope_NV * (a_ND @ w_VD.T + x_ND @ c_VD.T).to(p_NV.dtype)  # z'
        mean_N1 = (p_NV * tangent_NV).sum(1, keepdim=True)
        dz_NV = g_N[:, None] * error_NV
        du_tangent_NV = slope_NV * g_N[:, None] * p_NV * (tangent_NV - mean_N1)
        if self.cap is not None:
            du_tangent_NV = du_tangent_NV - 2 / self.cap**2 * z_NV * tangent_NV * dz_NV
        du_NV, du_tangent_NV = (slope_NV * dz_NV).to(dtype), du_tangent_NV.to(dtype)
        return (
            du_tangent_NV @ w_VD + du_NV @ c_VD,
            (du_tangent_NV.T @ x_ND + du_NV.T @ a_ND).to(weight_VD.dtype),
            (error_NV * tangent_NV).sum(1),
        )

    def _logits(self, x_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor | float]:
        """z, and its slope as a function of x W^T."""
        u_NV = F.linear(x_ND, weight_VD.to(x_ND.dtype)).to(accumulation_dtype(x_ND.dtype))
        if self.cap is None:
            return u_NV, 1.0
        z_NV = self.cap * torch.tanh(u_NV / self.cap)
        return z_NV, 1 - (z_NV / self.cap).square()


def _errors(z_NV: Tensor, targets_N: Tensor, lse_N: Tensor) -> tuple[Tensor, Tensor]:
    """p and p - onehot."""
    p_NV = (z_NV - lse_N[:, None]).exp()
    return p_NV, p_NV.scatter_add(1, targets_N[:, None], p_NV.new_full((), -1).expand(len(targets_N), 1))
