"""The gated delta rule (arXiv 2412.06464): a memory that decays, and corrects what it holds for a key.

`reference.py` is the recurrence, token by token; `chunked.py` computes it in chunks of tokens. On a GPU,
flash-linear-attention's kernels do it, if that package is installed.

Shapes: B sequences, T tokens, H key heads, E value heads per key head, A = H E value heads, K key dimension, V value
dimension.
"""

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ttt_e2e.ops import tuning
from ttt_e2e.ops.elementwise import accumulation_dtype
from ttt_e2e.ops.gated_delta_rule.chunked import delta_rule_chunked, delta_rule_step
from ttt_e2e.ops.gated_delta_rule.reference import gated_delta_rule_reference
from ttt_e2e.ops.kernel_library import KernelLibrary, Kernels

__all__ = ["Library", "check_kernels", "find_library", "gated_delta_rule", "gated_delta_rule_reference"]


def gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTAV: Tensor,
    g_BTA: Tensor,
    beta_BTA: Tensor,
    state_BAKV: Tensor | None,
    kernels: Kernels = "torch",
) -> tuple[Tensor, Tensor]:
    """The memory's output for every query, and the memory after the last token.

    Args:
        q_BTHK: Queries. Scale and normalise queries and keys before: they are not changed here.
        k_BTHK: Keys.
        v_BTAV: Values. Value heads h E to h E + E - 1 share the queries and keys of head h.
        g_BTA: Logarithm of the decay, at most 0.
        beta_BTA: Share of the error that is corrected, in [0, 1].
        state_BAKV: The memory before the first token, float32 (float64 if v is); None for zeros.
        kernels: "torch" computes in the state's dtype on any device. "auto" takes flash-linear-attention for 16-bit
            inputs on a GPU if it is installed, "fused" always (it multiplies float32 in TF32).

    Returns:
        [B, T, A, V] in v's dtype, and [B, A, K, V] as the state.

    Raises:
        UserError: If kernels is "fused" and flash-linear-attention is not installed or the inputs are not on a GPU.
    """
    library = _library_for(v_BTAV, kernels)
    if library is not None:
        return _by_library(library, q_BTHK, k_BTHK, v_BTAV, g_BTA, beta_BTA, state_BAKV)
    dtype = accumulation_dtype(v_BTAV.dtype)
    if state_BAKV is None:
        state_BAKV = v_BTAV.new_zeros(*v_BTAV.shape[::2], k_BTHK.shape[3], v_BTAV.shape[3], dtype=dtype)
    rule = delta_rule_step if v_BTAV.shape[1] == 1 else delta_rule_chunked
    o_BTAV, state_BAKV = rule(*(x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTAV, g_BTA, beta_BTA, state_BAKV)))
    return o_BTAV.to(v_BTAV.dtype), state_BAKV


_FLA = KernelLibrary("flash-linear-attention", "Gated DeltaNet", "fla")


class Library(NamedTuple):
    """flash-linear-attention's two functions, by their names in its package `fla.ops.gated_delta_rule`."""

    chunk_gated_delta_rule: Callable[..., tuple[Tensor, Tensor]]
    fused_recurrent_gated_delta_rule: Callable[..., tuple[Tensor, Tensor]]


@functools.cache
def find_library() -> Library | None:
    """The functions, or None if the package is not installed or cannot be imported."""
    try:
        module = importlib.import_module("fla.ops.gated_delta_rule")
        return Library(*(getattr(module, name) for name in Library._fields))
    except (ImportError, AttributeError):
        return None


def check_kernels(kernels: Kernels) -> None:
    """Raise UserError if `kernels` requires flash-linear-attention and it is not installed."""
    _FLA.check(kernels, find_library())


def _library_for(v_BTAV: Tensor, kernels: Kernels) -> Library | None:
    """The library if it is to compute this."""
    return _FLA.choose(kernels, v_BTAV, find_library)


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
    recurrent = v_BTAV.shape[1] <= tuning.DELTA_RULE_RECURRENT_TOKENS and not torch.is_grad_enabled()
    rule = library.fused_recurrent_gated_delta_rule if recurrent else library.chunk_gated_delta_rule
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
