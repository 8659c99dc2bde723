"""The memory of TTT-KVB and Titans: an MLP per head that keeps learning to map keys to values while it reads.

The loss of a token is |f(k; W) - v|^2 / 2, f being a SwiGLU MLP; keys, queries and values have root mean square 1 in
every head. The tokens come in mini-batches of b. All gradients of a mini-batch are taken at the weights W at its start,
and all its tokens are read with those; the update follows when the mini-batch is complete. In the running sums of
Titans (arXiv 2501.00663, equations 13 and 14),

    S_t = eta_t S_(t-1) - theta_t grad loss_t(W)        M_t = keep_t M_(t-1) + S_t        (keep = 1 - alpha)

everything is linear in the gradients, so a mini-batch needs no loop over its tokens: both sums at its end are one
gradient each, of losses weighted token by token. Plain gradient descent is the case eta = 0 and keep = 1.

The step that the model chooses, between 0 and `memory.lr`, is divided by b (K + rho_t). There rho_t =
|grad loss_t|^2 / |f(k_t) - v_t|^2 is the curvature along the token's residual: about 2 K in a new memory, and more
where training has aligned the weights with the keys. It keeps the memory from diverging (docs/log.md has the
measurements); K keeps the step finite where the weights are close to zero. b equal tokens add up to one step, so a text
that repeats one token is safe too.

Shapes: B sequences, H heads, N = B H, T tokens, D hidden size, K head dimension, F hidden width, E = 2 F.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.model.counting import product_operations
from ttt_e2e.ops.elementwise import accumulation_dtype, glu, rms_norm
from ttt_e2e.ops.fast_mlp import FastWeights
from ttt_e2e.ops.linear import batched_linear, linear, weight_gradient


class Memory(nn.Module):
    """The initial weights of every head's MLP, learned through the updates that follow."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        heads, hidden, width = config.num_attention_heads, config.memory.intermediate_size, config.head_dim
        self.w_in = nn.Parameter(torch.empty(heads, 2 * hidden, width))
        self.w_out = nn.Parameter(torch.empty(heads, width, hidden))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw both matrices at the scale that preserves the mean square, whatever `initializer_range` is.

        The gradient of each matrix is a multiple of the other one: at the usual 0.02 nothing would be learned.
        """
        with torch.no_grad():
            for weight in (self.w_in, self.w_out):
                weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)

    def start(self, batch: int, dtype: torch.dtype) -> FastWeights:
        """The initial weights for `batch` sequences, [N, E, K] and [N, K, F], for tokens in `dtype`."""
        weights = (w.to(accumulation_dtype(dtype)) for w in (self.w_in, self.w_out))
        return FastWeights(*(w.expand(batch, -1, -1, -1).flatten(0, 1) for w in weights))


class ScanCoefficients(NamedTuple):
    """The coefficients of a mini-batch's gradients and of the old sums M and S in the new ones."""

    in_weights: Tensor  # [..., T]: minus every token's gradient, in M
    in_momentum: Tensor  # [..., T]: minus every token's gradient, in S
    weights: Tensor  # [...]: the old M, in the new M
    carried: Tensor  # [...]: the old S, in the new M
    momentum: Tensor  # [...]: the old S, in the new S


def scan_coefficients(theta: Tensor, eta: Tensor, keep: Tensor) -> ScanCoefficients:
    """The running sums of Titans over a mini-batch in closed form; theta, eta and keep are [..., T].

    Sums and products along the tokens are formed by doubling, without quotients or logarithms: factors of 0 are safe.
    """
    # The factors of t + 1 at t, and 1 at the end.
    next_eta, next_keep = (_shift(x, 1, 1.0) for x in (eta, keep))
    kept, carried, distance = next_keep, next_eta, 1
    while distance < theta.shape[-1]:  # kept_t = product of keep_s over s > t
        kept = kept * _shift(kept, distance, 1.0)
        distance *= 2
    total, distance = kept, 1
    while distance < theta.shape[-1]:  # carried_t the same of eta, and total_t = kept_t + eta_(t+1) total_(t+1)
        total = total + carried * _shift(total, distance, 0.0)
        carried = carried * _shift(carried, distance, 1.0)
        distance *= 2
    first = eta[..., 0]
    of_old = (keep[..., 0] * kept[..., 0], first * total[..., 0], first * carried[..., 0])
    return ScanCoefficients(theta * total, theta * carried, *of_old)


def _shift(x: Tensor, distance: int, fill: float) -> Tensor:
    """x_(t + distance) at t, `fill` beyond the end."""
    return F.pad(x[..., distance:], (0, distance), value=fill)


def gradients(fast: FastWeights, k_NTK: Tensor, v_NTK: Tensor, *shares_NT: Tensor) -> list[FastWeights]:
    """sum_t share_t / (K + rho_t) grad loss_t, for each of the shares; differentiable in all inputs, rho included.

    It repeats `fast_mlp`'s vjp, because rho needs every token's own gradient.
    """
    w_in_NEK, w_out_NKF = (w.to(k_NTK.dtype) for w in fast)
    y_NTF, glu_vjp = glu(batched_linear(k_NTK, w_in_NEK), "silu")
    residual_NTK = batched_linear(y_NTF, w_out_NKF) - v_NTK
    dh_NTE = glu_vjp(residual_NTK @ w_out_NKF)
    k_NT, y_NT, residual_NT, dh_NT = (_square(x) for x in (k_NTK, y_NTF, residual_NTK, dh_NTE))
    rho_NT = (residual_NT * y_NT + dh_NT * k_NT) / (residual_NT + 1e-12)
    found = []
    for share_NT in shares_NT:
        step_NT1 = (share_NT / (k_NTK.shape[-1] + rho_NT))[..., None].to(k_NTK.dtype)
        gradient = weight_gradient(dh_NTE * step_NT1, k_NTK), weight_gradient(residual_NTK * step_NT1, y_NTF)
        found.append(FastWeights(*(g.to(fast.w_in_BED.dtype) for g in gradient)))
    return found


def _square(x: Tensor) -> Tensor:
    """|x|^2 over the last dimension, in the accumulation dtype."""
    return x.to(accumulation_dtype(x.dtype)).square().sum(-1)


def split_lengths(pending: int, length: int, mini_batch: int) -> list[int]:
    """How the next `length` tokens split into mini-batches, of which the first already has `pending` tokens."""
    first = min(length, mini_batch - pending)
    full, last = divmod(length - first, mini_batch)
    return [first, *[mini_batch] * full, *([last] if last else [])]


def project(x_BTD: Tensor, weight: Tensor, config: ModelConfig) -> list[Tensor]:
    """Project x with every H K rows of `weight`, to heads of root mean square 1: a list of [N, T, K]."""
    x_BTJK = linear(x_BTD, weight).unflatten(-1, (-1, config.head_dim))
    unit_BTJK, _ = rms_norm(x_BTJK, x_BTD.new_ones(()), config.rms_norm_eps)
    return [x_BTHK.transpose(1, 2).flatten(0, 1) for x_BTHK in unit_BTJK.split(config.num_attention_heads, 2)]


def merge_heads(x_NTK: Tensor, weight_K: Tensor, config: ModelConfig) -> Tensor:
    """The outputs of every head's memory, normalised per head and concatenated: [B, T, H K]."""
    x_BTHK = x_NTK.unflatten(0, (-1, config.num_attention_heads)).transpose(1, 2)
    return rms_norm(x_BTHK, weight_K, config.rms_norm_eps)[0].flatten(2)


def memory_operations(config: ModelConfig) -> tuple[int, int]:
    """For one token: reading the memory, and the gradient of its weights for a loss at what was read."""
    read = product_operations(1, config.hidden_size, 3 * config.memory.intermediate_size)
    return read, read + product_operations(1, config.hidden_size, config.memory.intermediate_size)
