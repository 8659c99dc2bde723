"""The definition of attention, its gradients and the gradients of these, on whole matrices [B, H, T, S].

With P the softmax of scale q k^T over the keys that a query sees, and D = rowsum(do o):

    dP = do v^T     dS = P (dP - D)     dq = scale dS k     dk = scale dS^T q     dv = P^T do

(dq, dk, dv) is the gradient of <do, o>, so <dq, a> + <dk, b> + <dv, c> is <do, o'>, o' being the derivative of o along
(a, b, c). Hence the gradient of `do` is o' itself, and the gradients of q, k and v are the derivatives of dq, dk and dv
along (a, b, c) at constant `do`, since the Hessian is symmetric. Each is the tangent of a line above:

    X = S' = scale (a k^T + q b^T)      E = rowsum(P X)               P' = P (X - E)
    gdo = o' = P' v + P c               w = D' = rowsum(do gdo)       G = dS' = (X - E) dS + P (do c^T - w)
    gq = scale (G k + dS b)             gk = scale (G^T q + dS^T a)   gv = P'^T do

The formulas take o and the rows' logsumexp l as functions of q, k and v. A gradient dl of l adds P dl to dS, so it
makes D = rowsum(do o) - dl; its own gradient is gdl = l' = E.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_e2e.ops.attention.mask import Attended, KeyView, Tangents, hidden_keys
from ttt_e2e.ops.elementwise import accumulation_dtype


def forward(q: Tensor, k: Tensor, v: Tensor, view: KeyView) -> tuple[Tensor, Tensor]:
    """Attention o [B, H, T, K] and the scores' logsumexp [B, H, T]."""
    q_BHTK, k_BHSK, v_BHSK = _widen(q, k, v)
    scores_BHTS = _scores(q_BHTK, k_BHSK, view)
    return (scores_BHTS.softmax(-1) @ v_BHSK).to(q.dtype), scores_BHTS.logsumexp(-1)


def backward(attended: Attended, do: Tensor, dlse: Tensor | None, view: KeyView) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq [B, H, T, K] and dk, dv [B, G, N, K]."""
    q, k, v, o, lse = attended
    q_BHTK, k_BHSK, v_BHSK, o_BHTK, do_BHTK = _widen(q, k, v, o, do)
    scale = q.shape[3] ** -0.5
    p = (_scores(q_BHTK, k_BHSK, view) - lse[..., None]).exp()
    ds = p * (do_BHTK @ v_BHSK.mT - _delta(do_BHTK, o_BHTK, dlse))
    cached = k.shape[2] - view.num_new_keys
    dk_BHNK = scale * ds[..., cached:].mT @ q_BHTK
    dv_BHNK = p[..., cached:].mT @ do_BHTK
    return (scale * ds @ k_BHSK).to(q.dtype), _narrow(dk_BHNK, k), _narrow(dv_BHNK, v)


def double_backward(
    attended: Attended, do: Tensor, dlse: Tensor | None, tangents: Tangents, view: KeyView
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients gq [B, H, T, K], gk and gv [B, G, S, K], gdo [B, H, T, K], gdlse [B, H, T]."""
    (q, k, v, o, lse), (a, b, c) = attended, tangents
    b, c = (F.pad(x, (0, 0, k.shape[2] - view.num_new_keys, 0)) for x in (b, c))  # constants have no tangent
    q_BHTK, k_BHSK, v_BHSK, o_BHTK, do_BHTK, a_BHTK, b_BHSK, c_BHSK = _widen(q, k, v, o, do, a, b, c)
    scale = q.shape[3] ** -0.5
    p = (_scores(q_BHTK, k_BHSK, view) - lse[..., None]).exp()
    ds = p * (do_BHTK @ v_BHSK.mT - _delta(do_BHTK, o_BHTK, dlse))
    x = scale * (a_BHTK @ k_BHSK.mT + q_BHTK @ b_BHSK.mT)
    e = (p * x).sum(-1, keepdim=True)
    x = x - e
    gdo_BHTK = (p * x) @ v_BHSK + p @ c_BHSK
    w = (do_BHTK * gdo_BHTK).sum(-1, keepdim=True)
    g = x * ds + p * (do_BHTK @ c_BHSK.mT - w)
    gq_BHTK = scale * (g @ k_BHSK + ds @ b_BHSK)
    gk_BHSK = scale * (g.mT @ q_BHTK + ds.mT @ a_BHTK)
    gv_BHSK = (p * x).mT @ do_BHTK
    return gq_BHTK.to(q.dtype), _narrow(gk_BHSK, k), _narrow(gv_BHSK, v), gdo_BHTK.to(q.dtype), e[..., 0]


def _delta(do_BHTK: Tensor, o_BHTK: Tensor, dlse: Tensor | None) -> Tensor:
    """D, [B, H, T, 1]."""
    delta_BHT1 = (do_BHTK * o_BHTK).sum(-1, keepdim=True)
    return delta_BHT1 if dlse is None else delta_BHT1 - dlse[..., None]


def _widen(q_BHTK: Tensor, *tensors: Tensor) -> list[Tensor]:
    """All tensors in float32 (float64 if they are), with H heads."""
    widened = [x.to(accumulation_dtype(x.dtype)) for x in (q_BHTK, *tensors)]
    return [x.repeat_interleave(q_BHTK.shape[1] // x.shape[1], 1) for x in widened]


def _narrow(x_BHSK: Tensor, like_BGSK: Tensor) -> Tensor:
    """The sum over the query heads that share a key head, in the keys' dtype."""
    return x_BHSK.unflatten(1, (like_BGSK.shape[1], -1)).sum(2).to(like_BGSK.dtype)


def _scores(q_BHTK: Tensor, k_BHSK: Tensor, view: KeyView) -> Tensor:
    """[B, H, T, S], minus infinity where a query does not see a key."""
    key_S = torch.arange(k_BHSK.shape[2], device=q_BHTK.device)
    query_T = key_S[k_BHSK.shape[2] - q_BHTK.shape[2] :]
    hidden_TS = hidden_keys(query_T, key_S, view.window, view.num_empty_slots)
    return (q_BHTK.shape[3] ** -0.5 * q_BHTK @ k_BHSK.mT).masked_fill(hidden_TS, -torch.inf)
