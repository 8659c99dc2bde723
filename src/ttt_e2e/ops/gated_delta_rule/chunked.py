"""The gated delta rule in chunks of tokens.

Within a chunk, with G the running sum of g from its start and S the memory there, the corrections u solve a triangular
system:

    (1 + L) U = R,  L_ij = beta_i exp(G_i - G_j) k_i.k_j for j < i,  R_i = beta_i (v_i - exp(G_i) S^T k_i)

Everything that does not depend on S, the inverse of 1 + L included, is computed for all chunks at once; the loop over
chunks holds three matrix products. No exponent is ever positive.

Shapes: N chunks, C tokens of a chunk (as a second index: c), M = N B A matrices of a batched product, P = B A of them
in one chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_e2e.ops import tuning


def delta_rule_step(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTAV: Tensor, g_BTA: Tensor, beta_BTA: Tensor, s_BAKV: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence for T = 1."""
    share = v_BTAV.shape[2] // k_BTHK.shape[2]
    q_BA1K, k_BA1K = (x.transpose(1, 2).repeat_interleave(share, 1) for x in (q_BTHK, k_BTHK))
    v_BA1V, g_BA1, beta_BA1 = (x.transpose(1, 2) for x in (v_BTAV, g_BTA, beta_BTA))
    s_BAKV = s_BAKV * g_BA1[..., None].exp()
    u_BA1V = beta_BA1[..., None] * (v_BA1V - k_BA1K @ s_BAKV)
    s_BAKV = s_BAKV + k_BA1K.mT * u_BA1V
    return (q_BA1K @ s_BAKV).transpose(1, 2), s_BAKV


def delta_rule_chunked(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTAV: Tensor, g_BTA: Tensor, beta_BTA: Tensor, s_BAKV: Tensor
) -> tuple[Tensor, Tensor]:
    """The rule in chunks of equal length, at most `tuning.DELTA_RULE_CHUNK` tokens each."""
    tokens, heads = k_BTHK.shape[1:3]
    q_NBH1CK, k_NBH1CK, v_NBHECV, g_NBHEC, beta_NBHEC = (
        _in_chunks(x, heads) for x in (q_BTHK, k_BTHK, v_BTAV, g_BTA, beta_BTA)
    )
    length = g_NBHEC.shape[-1]
    sum_NBHEC = g_NBHEC.cumsum(-1)
    decay_NBHEC1 = sum_NBHEC.exp()[..., None]
    future_Cc = torch.ones(length, length, dtype=torch.bool, device=g_BTA.device).triu(1)
    ratio_NBHECc = (sum_NBHEC[..., None] - sum_NBHEC[..., None, :]).masked_fill_(future_Cc, -torch.inf).exp_()

    # What does not depend on the memory. The solver reads neither L's diagonal nor what is above it.
    seen_NBHECc = (q_NBH1CK @ k_NBH1CK.mT) * ratio_NBHECc
    l_NBHECc = (k_NBH1CK @ k_NBH1CK.mT) * (ratio_NBHECc * beta_NBHEC[..., None])
    one_Cc = torch.eye(length, dtype=l_NBHECc.dtype, device=l_NBHECc.device)
    inverse_NBHECc = torch.linalg.solve_triangular(l_NBHECc, one_Cc, upper=False, unitriangular=True)
    q_NBHECK = q_NBH1CK * decay_NBHEC1
    k_in_NBHECK = k_NBH1CK * (decay_NBHEC1 * beta_NBHEC[..., None])
    k_out_NBHECK = k_NBH1CK * (sum_NBHEC[..., -1:] - sum_NBHEC).exp()[..., None]
    v_NBHECV = v_NBHECV * beta_NBHEC[..., None]

    s_PKV, starts, corrections = s_BAKV.flatten(0, 1), [], []
    per_chunk = (x.flatten(1, 3).unbind() for x in (v_NBHECV, k_in_NBHECK, inverse_NBHECc, k_out_NBHECK))
    decays = decay_NBHEC1[..., -1:, :].flatten(1, 3).unbind()
    for v_PCV, k_in_PCK, inverse_PCc, k_out_PCK, decay_P11 in zip(*per_chunk, decays, strict=True):
        starts.append(s_PKV)
        u_PCV = inverse_PCc @ torch.baddbmm(v_PCV, k_in_PCK, s_PKV, alpha=-1)
        corrections.append(u_PCV)
        s_PKV = torch.baddbmm(s_PKV * decay_P11, k_out_PCK.mT, u_PCV)

    o_MCV = q_NBHECK.flatten(0, 3) @ torch.cat(starts)
    o_MCV = torch.baddbmm(o_MCV, seen_NBHECc.flatten(0, 3), torch.cat(corrections))
    o_NBACV = o_MCV.unflatten(0, (-1, *s_BAKV.shape[:2]))
    o_BTAV = o_NBACV.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :tokens]
    return o_BTAV, s_PKV.unflatten(0, s_BAKV.shape[:2])


def _in_chunks(x_BTA: Tensor, heads: int) -> Tensor:
    """[B, T, A, ...] as contiguous [N, B, H, E, C, ...], padded with zeros: tokens that change nothing."""
    tokens = x_BTA.shape[1]
    count = -(-tokens // tuning.DELTA_RULE_CHUNK)
    length = -(-tokens // count)
    if tokens < count * length:
        x_BTA = F.pad(x_BTA, (0, 0) * (x_BTA.dim() - 2) + (0, count * length - tokens))
    x_BNCHE = x_BTA.unflatten(2, (heads, -1)).unflatten(1, (count, length))
    return x_BNCHE.movedim((1, 0, 3, 4, 2), (0, 1, 2, 3, 4)).contiguous()
