"""The linear cross-entropy as a walk over chunks of vocabulary and tokens: a bounded number of logits at any time.

The outer loop is over the vocabulary, so that each row of the weight is brought to x's dtype once, a chunk at a time,
and the weight's gradient needs a float32 sum for one chunk only. The sums for x, as large as x, stay in memory
throughout.

Shapes: n tokens and v words of a chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ttt_e2e.ops import tuning
from ttt_e2e.ops.elementwise import accumulation_dtype


class Tiled:
    """`forward`, `backward` and `double_backward` as in `reference.py`, chunk by chunk.

    The private methods are the work on a chunk of logits z [n, v] between the matrix products; `triton.py` has its own.
    They may overwrite z. `at` [n] is the target's column in the chunk, or anything outside [0, v) if the target is
    in another. Statistics are in float32 (float64 if z is).
    """

    def forward(self, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """The losses [N] and the logits' logsumexp [N]."""
        sizes = chunk_sizes(len(x_ND), len(weight_VD), tuning.LOGITS_AT_ONCE)
        lse_N = x_ND.new_full((len(x_ND),), -torch.inf, dtype=accumulation_dtype(x_ND.dtype))
        target_N = torch.full_like(lse_N, torch.nan)  # stays NaN where a target is not a token
        for words in _slices(len(weight_VD), sizes[1]):
            w_vD = weight_VD[words].to(x_ND.dtype)
            for tokens in _slices(len(x_ND), sizes[0]):
                at_n = targets_N[tokens] - words.start
                self._add_to_lse(x_ND[tokens] @ w_vD.T, at_n, lse_N[tokens], target_N[tokens])
        return lse_N - target_N, lse_N

    def backward(
        self, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, lse_N: Tensor, g_N: Tensor, need_weight: bool
    ) -> tuple[Tensor, Tensor]:
        """Gradients dx [N, D] and dW [V, D], the latter empty if not needed."""
        sizes = chunk_sizes(len(x_ND), len(weight_VD), tuning.LOGITS_AT_ONCE)
        dx_ND = torch.zeros_like(x_ND, dtype=lse_N.dtype, memory_format=torch.contiguous_format)
        dweight_VD = weight_VD.new_empty(weight_VD.shape if need_weight else 0)
        for words in _slices(len(weight_VD), sizes[1]):
            w_vD = weight_VD[words].to(x_ND.dtype)
            dw_vD = torch.zeros_like(w_vD, dtype=lse_N.dtype)
            for tokens in _slices(len(x_ND), sizes[0]):
                x_nD, at_n = x_ND[tokens], targets_N[tokens] - words.start
                dz_nv = self._gradient(x_nD @ w_vD.T, at_n, lse_N[tokens], g_N[tokens])
                _add_product(dx_ND[tokens], dz_nv, w_vD)
                if need_weight:
                    _add_product(dw_vD, dz_nv.T, x_nD)
                del dz_nv  # before the next chunk's logits
            if need_weight:
                dweight_VD[words] = dw_vD
        return dx_ND.to(x_ND.dtype), dweight_VD

    def double_backward(
        self, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, lse_N: Tensor, g_N: Tensor, a_ND: Tensor, c_VD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients gx [N, D], gW [V, D] and gg [N]; an empty c stands for zeros."""
        sizes = chunk_sizes(len(x_ND), len(weight_VD), tuning.LOGITS_AT_ONCE // 2)  # z and z'
        has_c = c_VD.numel() > 0

        def logits(x_nD: Tensor, a_nD: Tensor, w_vD: Tensor, c_vD: Tensor) -> tuple[Tensor, Tensor]:
            tangent_nv = a_nD @ w_vD.T
            return x_nD @ w_vD.T, tangent_nv.addmm_(x_nD, c_vD.T) if has_c else tangent_nv

        # First walk: rowsum(p z').
        mean_N = torch.zeros_like(lse_N)
        target_N = torch.full_like(lse_N, torch.nan)
        for words in _slices(len(weight_VD), sizes[1]):
            w_vD, c_vD = weight_VD[words].to(x_ND.dtype), c_VD[words].to(x_ND.dtype)
            for tokens in _slices(len(x_ND), sizes[0]):
                z_nv, tangent_nv = logits(x_ND[tokens], a_ND[tokens], w_vD, c_vD)
                at_n = targets_N[tokens] - words.start
                self._add_to_mean(z_nv, tangent_nv, at_n, lse_N[tokens], mean_N[tokens], target_N[tokens])
                del z_nv, tangent_nv

        # Second walk: the gradients.
        gx_ND = torch.zeros_like(x_ND, dtype=lse_N.dtype, memory_format=torch.contiguous_format)
        gweight_VD = weight_VD.new_empty(weight_VD.shape)
        for words in _slices(len(weight_VD), sizes[1]):
            w_vD, c_vD = weight_VD[words].to(x_ND.dtype), c_VD[words].to(x_ND.dtype)
            gw_vD = torch.zeros_like(w_vD, dtype=lse_N.dtype)
            for tokens in _slices(len(x_ND), sizes[0]):
                x_nD, a_nD, at_n = x_ND[tokens], a_ND[tokens], targets_N[tokens] - words.start
                dz_nv, dz_tangent_nv = self._gradient_and_tangent(
                    *logits(x_nD, a_nD, w_vD, c_vD), at_n, lse_N[tokens], g_N[tokens], mean_N[tokens]
                )
                _add_product(gx_ND[tokens], dz_tangent_nv, w_vD)
                if has_c:
                    _add_product(gx_ND[tokens], dz_nv, c_vD)
                _add_product(gw_vD, dz_tangent_nv.T, x_nD)
                _add_product(gw_vD, dz_nv.T, a_nD)
                del dz_nv, dz_tangent_nv
            gweight_VD[words] = gw_vD
        return gx_ND.to(x_ND.dtype), gweight_VD, mean_N - target_N

    def _add_to_lse(self, z_nv: Tensor, at_n: Tensor, lse_n: Tensor, target_n: Tensor) -> None:
        """Add the chunk to the logsumexp, and copy the logit of each target that is here to `target`."""
        z_nv = z_nv.to(lse_n.dtype)
        _copy_target(z_nv, at_n, target_n)
        maximum_n1 = z_nv.amax(1, keepdim=True)
        total_n = z_nv.sub_(maximum_n1).exp_().sum(1)
        torch.logaddexp(lse_n, total_n.log_().add_(maximum_n1[:, 0]), out=lse_n)

    def _gradient(self, z_nv: Tensor, at_n: Tensor, lse_n: Tensor, g_n: Tensor) -> Tensor:
        """dz = g (p - onehot), in z's dtype."""
        dtype = z_nv.dtype
        p_nv = z_nv.to(lse_n.dtype).sub_(lse_n[:, None]).exp_()
        return _minus_one_hot_(p_nv, at_n).mul_(g_n[:, None]).to(dtype)

    def _add_to_mean(
        self, z_nv: Tensor, tangent_nv: Tensor, at_n: Tensor, lse_n: Tensor, mean_n: Tensor, target_n: Tensor
    ) -> None:
        """Add rowsum(p z') to the mean, and copy the z' of each target that is here to `target`."""
        _copy_target(tangent_nv, at_n, target_n)
        p_nv = z_nv.to(lse_n.dtype).sub_(lse_n[:, None]).exp_()
        mean_n.add_(p_nv.mul_(tangent_nv).sum(1))

    def _gradient_and_tangent(
        self, z_nv: Tensor, tangent_nv: Tensor, at_n: Tensor, lse_n: Tensor, g_n: Tensor, mean_n: Tensor
    ) -> tuple[Tensor, Tensor]:
        """dz = g (p - onehot) and dz' = g p (z' - mean), in z's dtype."""
        dtype = z_nv.dtype
        p_nv = z_nv.to(lse_n.dtype).sub_(lse_n[:, None]).exp_()
        dz_tangent_nv = tangent_nv.to(lse_n.dtype).sub_(mean_n[:, None]).mul_(p_nv).mul_(g_n[:, None])
        return _minus_one_hot_(p_nv, at_n).mul_(g_n[:, None]).to(dtype), dz_tangent_nv.to(dtype)


def chunk_sizes(tokens: int, vocabulary: int, logits: int) -> tuple[int, int]:
    """Tokens and words of a chunk of at most `logits` logits: about square, so that matrix products have long sides.

    Wider if there are few tokens, taller if the vocabulary is small; powers of two, which suit aligned loads.
    """
    side = 1 << (logits.bit_length() - 1) // 2
    n = min(max(side, logits // vocabulary), 1 << max(tokens - 1, 0).bit_length())
    return n, logits // n


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where the total may have more precision than a and b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def _columns(at_n: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Whether each target is in the chunk, and a column that can be read in any case, without waiting for a GPU."""
    return (at_n >= 0) & (at_n < width), at_n.clamp(0, width - 1)[:, None]


def _copy_target(z_nv: Tensor, at_n: Tensor, target_n: Tensor) -> None:
    here_n, column_n1 = _columns(at_n, z_nv.shape[1])
    target_n.copy_(torch.where(here_n, z_nv.gather(1, column_n1)[:, 0], target_n))


def _minus_one_hot_(p_nv: Tensor, at_n: Tensor) -> Tensor:
    here_n, column_n1 = _columns(at_n, p_nv.shape[1])
    return p_nv.scatter_add_(1, column_n1, -here_n[:, None].to(p_nv.dtype))
