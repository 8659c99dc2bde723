"""The definition of Mamba 2's recurrence: with S the state, a matrix for each head,

S_t = exp(dt_t a) S_{t-1} + dt_t x_t b_t^T,  y_t = S_t c_t
"""

import torch
from torch import Tensor


def ssd_reference(
    x_BTHP: Tensor, dt_BTH: Tensor, a_H: Tensor, b_BTGN: Tensor, c_BTGN: Tensor, state_BHPN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition of `ssd`."""
    if state_BHPN is None:
        state_BHPN = dt_BTH.new_zeros(x_BTHP.shape[0], *x_BTHP.shape[2:], b_BTGN.shape[-1])
    outputs = [x_BTHP[:, :0]]
    for t in range(x_BTHP.shape[1]):
        x, dt, b, c = (z[:, t : t + 1] for z in (x_BTHP, dt_BTH, b_BTGN, c_BTGN))
        y_B1HP, state_BHPN = ssd_step(x, dt, a_H, b, c, state_BHPN)
        outputs.append(y_B1HP)
    return torch.cat(outputs, 1), state_BHPN


def ssd_step(
    x_B1HP: Tensor, dt_B1H: Tensor, a_H: Tensor, b_B1GN: Tensor, c_B1GN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: its output [B, 1, H, P] in x's dtype, and the state after it."""
    share = x_B1HP.shape[2] // b_B1GN.shape[2]
    b_BHN, c_BHN = (t.squeeze(1).to(state_BHPN.dtype).repeat_interleave(share, 1) for t in (b_B1GN, c_B1GN))
    dt_BH = dt_B1H.squeeze(1)
    x_BHP = x_B1HP.squeeze(1) * dt_BH[..., None]
    decayed_BHPN = state_BHPN * (dt_BH * a_H).exp()[..., None, None]
    state_BHPN = torch.addcmul(decayed_BHPN, x_BHP[..., None], b_BHN[:, :, None])
    y_BHP = (state_BHPN @ c_BHN[..., None]).squeeze(-1)
    return y_BHP.to(x_B1HP.dtype)[:, None], state_BHPN
