"""The gated delta rule (arXiv 2412.06464): a memory that decays, and corrects what it holds for a key.

`reference.py` is the recurrence, token by token; `chunked.py` computes it in chunks of tokens; on a GPU,
flash-linear-attention's kernels do, if it is installed.

Shapes: B sequences, T tokens, H key heads, E value heads per key head, A = H E value heads, K key dimension, V value
dimension.
"""

import torch
from torch import Tensor

from ttt_e2e.ops import tuning
from ttt_e2e.ops.elementwise import accumulation_dtype
from ttt_e2e.ops.gated_delta_rule.chunked import delta_rule_chunked, delta_rule_step
from ttt_e2e.ops.gated_delta_rule.reference import gated_delta_rule_reference
from ttt_e2e.ops.kernel_library import KernelLibrary, Kernels

__all__ = ["LIBRARY", "gated_delta_rule", "gated_delta_rule_reference"]

LIBRARY = KernelLibrary(
    package="flash-linear-attention",
    extra="fla",
    mixer="Gated DeltaNet",
    module="fla.ops.gated_delta_rule",
    functions=("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
)


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
        q_BTHK, k_BTHK: Queries and keys, scaled and normalised by the caller.
        v_BTAV: Values. Value heads h E to h E + E - 1 share the queries and keys of head h.
        g_BTA: Logarithm of the decay, at most 0.
        beta_BTA: Share of the error that is corrected, in [0, 1].
        state_BAKV: The memory before the first token, float32 (float64 if v is); None for zeros.
        kernels: "torch" computes in the state's dtype on any device. "auto" takes flash-linear-attention for 16-bit
            inputs on a GPU if it is installed, "fused" always (it multiplies float32 in TF32).

    Returns:
        [B, T, A, V] in v's dtype, and [B, A, K, V] as the state.

    Raises UserError as `KernelLibrary.choose` does.
    """
    dtype = accumulation_dtype(v_BTAV.dtype)
    functions = LIBRARY.choose(kernels, v_BTAV)
    if functions is not None and v_BTAV.numel():
        chunk_rule, recurrent_rule = functions
        # The recurrent kernel has no derivative.
        recurrent = v_BTAV.shape[1] <= tuning.DELTA_RULE_RECURRENT_TOKENS and not torch.is_grad_enabled()
        return (recurrent_rule if recurrent else chunk_rule)(
            q=q_BTHK.to(v_BTAV.dtype),
            k=k_BTHK.to(v_BTAV.dtype),
            v=v_BTAV,
            g=g_BTA.to(dtype),
            beta=beta_BTA.to(dtype),
            scale=1.0,
            initial_state=state_BAKV,
            output_final_state=True,
        )
    if state_BAKV is None:
        state_BAKV = v_BTAV.new_zeros(*v_BTAV.shape[::2], k_BTHK.shape[3], v_BTAV.shape[3], dtype=dtype)
    if v_BTAV.numel() == 0:  # no sequences, or no tokens
        return v_BTAV.clone(), state_BAKV
    rule = delta_rule_step if v_BTAV.shape[1] == 1 else delta_rule_chunked
    o_BTAV, state_BAKV = rule(*(x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTAV, g_BTA, beta_BTA, state_BAKV)))
    return o_BTAV.to(v_BTAV.dtype), state_BAKV
