"""The gated delta rule (arXiv 2412.06464): a memory S that forgets, and corrects what it holds.

    S_t = exp(g_t) S_{t-1} + k_t u_t^T,  u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t),  o_t = S_t^T q_t

Over many tokens it works in chunks. Within a chunk, with G the running sum of g from its start and S the memory there,
the corrections u solve a triangular system:

    (1 + L) U = R,  L_ij = beta_i exp(G_i - G_j) k_i.k_j for j < i,  R_i = beta_i (v_i - exp(G_i) S^T k_i)

Everything that does not depend on S, the inverse of 1 + L included, is computed for all chunks at once. The loop over
chunks holds three matrix products. No exponent is ever positive. On a GPU, flash-linear-attention's kernels do this.

Shapes: B sequences, T tokens, H key heads, E value heads per key head, A = H E value heads, K key width, V value width,
N chunks, C tokens of a chunk (second index: c), M = N B A matrices of a batched product, P = B A of them in one chunk.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_e2e.config.schema import Kernels
from ttt_e2e.ops.elementwise import accumulation_dtype
from ttt_e2e.ops.fused import Fused

CHUNK = 32  # the fastest of 16, 32 and 64 on a CPU, forward and backward, at K = V = 32 to 128
RECURRENT = 64  # up to so many tokens without gradients, a kernel that goes token by token is the faster one


def gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTAV: Tensor,
    g_BTA: Tensor,
    beta_BTA: Tensor,
    state_BAKV: Tensor | None,
    kernels: Kernels = "torch",
) -> tuple[Tensor, Tensor]:
    """What the memory answers to every q, [B, T, A, V] in v's dtype, and the memory after the last token.

    Value heads a E to a E + E - 1 share the queries and keys of head a. g is the log of the decay, at most 0; beta in
    [0, 1] is the share of the error that is corrected. Queries and keys are taken as they are: scale and normalise them
    before. The state is float32, or float64 if v is; None is a memory of zeros.

    kernels: "torch" computes in the state's dtype on any device; "auto" takes flash-linear-attention for 16-bit inputs
    on a GPU if it is installed (its float32 products are TF32 ones), "fused" always.
    Raises UserError if kernels is "fused" and flash-linear-attention is not installed or the inputs are not on a GPU.
    """
    library = _library_for(v_BTAV, kernels)
    if library is not None:
        return _by_library(library, q_BTHK, k_BTHK, v_BTAV, g_BTA, beta_BTA, state_BAKV)
    dtype = accumulation_dtype(v_BTAV.dtype)
    if state_BAKV is None:
        state_BAKV = v_BTAV.new_zeros(*v_BTAV.shape[::2], k_BTHK.shape[3], v_BTAV.shape[3], dtype=dtype)
    rule = _step if v_BTAV.shape[1] == 1 else _chunked
    inputs = (x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTAV, g_BTA, beta_BTA, state_BAKV))
    o_BTAV, state_BAKV = rule(*inputs)
    return o_BTAV.to(v_BTAV.dtype), state_BAKV


def gated_delta_rule_reference(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTAV: Tensor, g_BTA: Tensor, beta_BTA: Tensor, state_BAKV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The plain twin of `gated_delta_rule`: the recurrence, token by token."""
    share = v_BTAV.shape[2] // k_BTHK.shape[2]
    q_BTAK, k_BTAK = (x.repeat_interleave(share, 2) for x in (q_BTHK, k_BTHK))
    s_BAKV = torch.zeros_like(k_BTAK[:, 0, :, :, None] * v_BTAV[:, 0, :, None]) if state_BAKV is None else state_BAKV
    outputs = []
    for t in range(v_BTAV.shape[1]):
        s_BAKV = s_BAKV * g_BTA[:, t, :, None, None].exp()
        error_BAV = v_BTAV[:, t] - torch.einsum("bakv,bak->bav", s_BAKV, k_BTAK[:, t])
        s_BAKV = s_BAKV + k_BTAK[:, t, :, :, None] * (beta_BTA[:, t, :, None] * error_BAV)[:, :, None]
        outputs.append(torch.einsum("bakv,bak->bav", s_BAKV, q_BTAK[:, t]))
    return torch.stack(outputs, 1), s_BAKV


def _step(
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


def _chunked(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTAV: Tensor, g_BTA: Tensor, beta_BTA: Tensor, s_BAKV: Tensor
) -> tuple[Tensor, Tensor]:
    """The rule in chunks of equal length, at most CHUNK tokens each."""
    tokens, heads = k_BTHK.shape[1:3]
    q_NBH1CK, k_NBH1CK, v_NBHECV, g_NBHEC, beta_NBHEC = (
        _in_chunks(x, heads) for x in (q_BTHK, k_BTHK, v_BTAV, g_BTA, beta_BTA)
    )
    length = g_NBHEC.shape[-1]
    sum_NBHEC = g_NBHEC.cumsum(-1)
    decay_NBHEC1 = sum_NBHEC.exp()[..., None]
    future_Cc = torch.ones(length, length, dtype=torch.bool, device=g_BTA.device).triu(1)
    ratio_NBHECc = (sum_NBHEC[..., None] - sum_NBHEC[..., None, :]).masked_fill_(future_Cc, -torch.inf).exp_()

    # What does not depend on the memory. The solver does not read L's diagonal and what lies above it.
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
    """[B, T, A, ...] as [N, B, H, E, C, ...], lying in memory so. Tokens of zeros, which change nothing, fill it up."""
    tokens = x_BTA.shape[1]
    count = -(-tokens // CHUNK)
    length = -(-tokens // count)
    if tokens < count * length:
        x_BTA = F.pad(x_BTA, (0, 0) * (x_BTA.dim() - 2) + (0, count * length - tokens))
    x_BNCHE = x_BTA.unflatten(2, (heads, -1)).unflatten(1, (count, length))
    return x_BNCHE.movedim((1, 0, 3, 4, 2), (0, 1, 2, 3, 4)).contiguous()


# -- flash-linear-attention --------------------------------------------------------------------------------------------


_FUSED = Fused("Gated DeltaNet", "flash-linear-attention", "fla")


class Library(NamedTuple):
    """flash-linear-attention's two functions, by their names in its package `fla.ops.gated_delta_rule`, 0.6."""

    chunk_gated_delta_rule: Callable[..., tuple[Tensor, Tensor]]
    fused_recurrent_gated_delta_rule: Callable[..., tuple[Tensor, Tensor]]


@cache
def find_library() -> Library | None:
    """The functions, or None where the package is not installed or cannot be imported."""
    try:
        module = importlib.import_module("fla.ops.gated_delta_rule")
        return Library(*(getattr(module, name) for name in Library._fields))
    except (ImportError, AttributeError):
        return None


def check_kernels(kernels: Kernels) -> None:
    """Raise UserError if `kernels` demands flash-linear-attention and it is not there."""
    _FUSED.check(kernels, find_library())


def _library_for(v_BTAV: Tensor, kernels: Kernels) -> Library | None:
    """The library if it is to compute this."""
    return _FUSED.choose(kernels, v_BTAV, find_library)


def _by_library(
    library: Library,
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTAV: Tensor,
    g_BTA: Tensor,
    beta_BTA: Tensor,
    state_BAKV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # The recurrent kernel has no derivative.
    short = v_BTAV.shape[1] <= RECURRENT and not torch.is_grad_enabled()
    rule = library.fused_recurrent_gated_delta_rule if short else library.chunk_gated_delta_rule
    return rule(
        q=q_BTHK.to(v_BTAV.dtype),
        k=k_BTHK.to(v_BTAV.dtype),
        v=v_BTAV,
        g=g_BTA.to(accumulation_dtype(v_BTAV.dtype)),
        beta=beta_BTA.to(accumulation_dtype(v_BTAV.dtype)),
        scale=1.0,
        initial_state=state_BAKV,
        output_final_state=True,
    )
