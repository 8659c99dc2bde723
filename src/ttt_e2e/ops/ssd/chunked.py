"""Mamba 2's recurrence in chunks of tokens ("Transformers are SSMs", arXiv 2405.21060, section 6).

A token's output has two parts: one from the tokens of its own chunk, as attention with scores c_i . b_j and the decay
between the two tokens in place of a softmax; and one from the state before the chunk. Only the states between chunks
are computed one after the other. Decays are differences of sums of dt a, never positive where they are exponentiated,
so nothing overflows.
"""

import torch
from torch import Tensor

from ttt_e2e.ops import tuning


def ssd_chunked(
    x_BTHP: Tensor, dt_BTH: Tensor, a_H: Tensor, b_BTGN: Tensor, c_BTGN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """The outputs [B, T, H, P] and the state after the last token, in chunks of `tuning.SSD_CHUNK` tokens."""
    chunk = tuning.SSD_CHUNK
    # Inside, the heads of a group are adjacent: with what they share, they make one matrix product.
    groups, tokens = b_BTGN.shape[2], x_BTHP.shape[1]
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
