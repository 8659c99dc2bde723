"""The state space duality of Mamba 2 ("Transformers are SSMs", arXiv 2405.21060): a recurrence done in matrix products.

Every head keeps a matrix S that decays by one factor per token and takes in an outer product:

    S_t = exp(dt_t a) S_{t-1} + dt_t x_t b_t^T ,      y_t = S_t c_t .

In chunks of tokens (section 6 of the paper) a token's output has two parts: from the tokens of its own chunk, as
attention with scores c_i . b_j and the decay between the two in place of a softmax; and from the state that stood
before the chunk. Only the states at the chunks' ends are computed one after the other. Decays are differences of sums
of dt a, which are never positive where they are exponentiated, so nothing overflows.

Matrix products are in x's dtype, decays and states in float32 (float64 if x is).

Shapes: B sequences, T tokens, H heads, P head width, G groups of R heads that share b and c, N state width, Z chunks of
Q tokens.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ttt_e2e.config.schema import Kernels
from ttt_e2e.ops.fused import Fused

CHUNK = 64  # the fastest of 32, 64, 128 and 256 on a CPU, forward and backward, at P = 64 and N = 128
FUSED_CHUNK = 256  # for mamba-ssm's kernel: the default of its own Mamba 2 layer

Kernel = Callable[..., Any]  # mamba-ssm's mamba_chunk_scan_combined


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    state_BHPN: Tensor | None,
    chunk: int = CHUNK,
    kernels: Kernels = "torch",
) -> tuple[Tensor, Tensor]:
    """The outputs y_BTHP in x's dtype and the state after the last token, of any number of tokens.

    dt is not negative and a not positive, both in float32 (or float64). None stands for a state of zeros.

    kernels: "torch" is PyTorch on any device; "auto" takes mamba-ssm's kernel for 16-bit inputs on a GPU if it is
    installed (its float32 products are TF32 ones), "fused" always. A single token is PyTorch's in any case.
    Raises UserError if kernels is "fused" and mamba-ssm is not installed or the inputs are not on a GPU.
    """
    kernel = _kernel_for(x_BTHP, kernels)
    batch, tokens, heads, width = x_BTHP.shape
    if state_BHPN is None:
        state_BHPN = dt_BTH.new_zeros(batch, heads, width, b_BTGN.shape[-1])
    if tokens == 1:
        return _step(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, state_BHPN)
    if kernel is not None:
        y_BTHP, state_BHPN = kernel(
            x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, FUSED_CHUNK, initial_states=state_BHPN, return_final_states=True
        )
        return y_BTHP, state_BHPN
    # Inside, the heads of a group lie side by side: with what they share, they make one matrix product.
    groups = b_BTGN.shape[2]
    x_BTGRP, dt_BTGR = x_BTHP.unflatten(2, (groups, -1)), dt_BTH.unflatten(2, (groups, -1))
    state_BGNRP = state_BHPN.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3)
    a_GR = a_H.unflatten(0, (groups, -1))
    outputs = []
    whole = tokens - tokens % chunk  # the rest is a shorter chunk of its own
    for start, stop, length in ((0, whole, chunk), (whole, tokens, tokens - whole)):
        if start < stop:
            x, dt, b, c = (t[:, start:stop].unflatten(1, (-1, length)) for t in (x_BTGRP, dt_BTGR, b_BTGN, c_BTGN))
            y_BTGRP, state_BGNRP = _chunks(x, dt, b, c, a_GR, state_BGNRP)
            outputs.append(y_BTGRP)
    y_BTHP = (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)).flatten(2, 3)
    return y_BTHP, state_BGNRP.permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()


def ssd_reference(
    x_BTHP: Tensor, dt_BTH: Tensor, a_H: Tensor, b_BTGN: Tensor, c_BTGN: Tensor, state_BHPN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The literal recurrence, token by token: the twin of `ssd`."""
    if state_BHPN is None:
        state_BHPN = dt_BTH.new_zeros(*x_BTHP[:, 0].shape, b_BTGN.shape[-1])
    outputs = []
    for t in range(x_BTHP.shape[1]):
        at_t = slice(t, t + 1)
        y_B1HP, state_BHPN = _step(x_BTHP[:, at_t], dt_BTH[:, at_t], a_H, b_BTGN[:, at_t], c_BTGN[:, at_t], state_BHPN)
        outputs.append(y_B1HP)
    return torch.cat(outputs, 1), state_BHPN


_FUSED = Fused("Mamba 2", "mamba-ssm", "mamba")


@functools.cache
def find_kernel() -> Kernel | None:
    """mamba-ssm's kernel, or None if it is not installed."""
    try:
        return importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    except ImportError:
        return None


def check_kernels(kernels: Kernels) -> None:
    """Raise UserError if `kernels` demands mamba-ssm and it is not there."""
    _FUSED.check(kernels, find_kernel())


def _kernel_for(x: Tensor, kernels: Kernels) -> Kernel | None:
    """The kernel if it is to compute this."""
    return _FUSED.choose(kernels, x, find_kernel)


def _step(
    x_B1HP: Tensor, dt_B1H: Tensor, a_H: Tensor, b_B1GN: Tensor, c_B1GN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence as it is written above."""
    share = x_B1HP.shape[2] // b_B1GN.shape[2]
    b_BHN, c_BHN = (t.squeeze(1).to(state_BHPN.dtype).repeat_interleave(share, 1) for t in (b_B1GN, c_B1GN))
    dt_BH = dt_B1H.squeeze(1)
    x_BHP = x_B1HP.squeeze(1) * dt_BH[..., None]
    decayed_BHPN = state_BHPN * (dt_BH * a_H).exp()[..., None, None]
    state_BHPN = torch.addcmul(decayed_BHPN, x_BHP[..., None], b_BHN[:, :, None])
    y_BHP = (state_BHPN @ c_BHN[..., None]).squeeze(-1)
    return y_BHP.to(x_B1HP.dtype)[:, None], state_BHPN


def _chunks(
    x_BZQGRP: Tensor, dt_BZQGR: Tensor, b_BZQGN: Tensor, c_BZQGN: Tensor, a_GR: Tensor, state_BGNRP: Tensor
) -> tuple[Tensor, Tensor]:
    """Whole chunks: the outputs [B, T, G, R, P], and the state after the last chunk."""
    dtype, (heads, width) = x_BZQGRP.dtype, x_BZQGRP.shape[-2:]
    x_BZQGRP = (x_BZQGRP * dt_BZQGR[..., None]).to(dtype)
    total_BZQGR = (dt_BZQGR * a_GR).cumsum(2)  # the log of the decay from before the chunk up to each token
    b_BZGQN, c_BZGQN = b_BZQGN.transpose(2, 3), c_BZQGN.transpose(2, 3)

    # From the tokens of the chunk.
    total_BZGRQ = total_BZQGR.permute(0, 1, 3, 4, 2)
    length = total_BZGRQ.shape[-1]
    future_QQ = torch.ones(length, length, dtype=torch.bool, device=total_BZGRQ.device).triu(1)
    decay_BZGRQQ = (total_BZGRQ[..., :, None] - total_BZGRQ[..., None, :]).masked_fill(future_QQ, -torch.inf).exp()
    scores_BZGRQQ = ((c_BZGQN @ b_BZGQN.mT)[:, :, :, None] * decay_BZGRQQ).to(dtype)
    own_BZGRQP = scores_BZGRQQ @ x_BZQGRP.permute(0, 1, 3, 4, 2, 5)

    # What each chunk adds to the state, and the state before each chunk.
    rest_BZQGR = (total_BZQGR[:, :, -1:] - total_BZQGR).exp()
    x_late_BZGQJ = (x_BZQGRP * rest_BZQGR[..., None]).to(dtype).flatten(-2).transpose(2, 3)
    added_BZGNRP = (b_BZGQN.mT @ x_late_BZGQJ).unflatten(-1, (heads, width))
    before = []
    for added_BGNRP, all_BGR in zip(added_BZGNRP.unbind(1), total_BZQGR[:, :, -1].exp().unbind(1), strict=True):
        before.append(state_BGNRP)
        state_BGNRP = torch.addcmul(added_BGNRP, state_BGNRP, all_BGR[:, :, None, :, None])

    # From the state before the chunk.
    before_BZGNJ = torch.stack(before, 1).flatten(-2).to(dtype)
    early_BZQGRP = (c_BZGQN @ before_BZGNJ).transpose(2, 3).unflatten(-1, (heads, width))
    y_BZQGRP = torch.addcmul(own_BZGRQP.permute(0, 1, 4, 2, 3, 5), early_BZQGRP, total_BZQGR.exp()[..., None])
    return y_BZQGRP.to(dtype).flatten(1, 2), state_BGNRP
