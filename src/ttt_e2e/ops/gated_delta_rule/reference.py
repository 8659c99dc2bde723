"""The definition of the gated delta rule: with S the memory, a matrix for each value head,

S_t = exp(g_t) S_{t-1} + k_t u_t^T,  u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t),  o_t = S_t^T q_t
"""

import torch
from torch import Tensor


def gated_delta_rule_reference(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTAV: Tensor, g_BTA: Tensor, beta_BTA: Tensor, state_BAKV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition of `gated_delta_rule`, for inputs of one dtype."""
    share = v_BTAV.shape[2] // k_BTHK.shape[2]
    q_BTAK, k_BTAK = (x.repeat_interleave(share, 2) for x in (q_BTHK, k_BTHK))
    s_BAKV = state_BAKV
    if s_BAKV is None:
        s_BAKV = v_BTAV.new_zeros(*v_BTAV.shape[::2], k_BTHK.shape[3], v_BTAV.shape[3])
    outputs = [v_BTAV[:, :0]]
    for t in range(v_BTAV.shape[1]):
        s_BAKV = s_BAKV * g_BTA[:, t, :, None, None].exp()
        error_BAV = v_BTAV[:, t] - torch.einsum("bakv,bak->bav", s_BAKV, k_BTAK[:, t])
        s_BAKV = s_BAKV + k_BTAK[:, t, :, :, None] * (beta_BTA[:, t, :, None] * error_BAV)[:, :, None]
        outputs.append(torch.einsum("bakv,bak->bav", s_BAKV, q_BTAK[:, t])[:, None])
    return torch.cat(outputs, 1), s_BAKV
