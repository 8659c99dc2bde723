"""The state space duality of Mamba 2 (SSD, arXiv 2405.21060): a recurrence computed in matrix products.

`reference.py` is the recurrence, token by token; `chunked.py` computes it in chunks of tokens; on a GPU, mamba-ssm's
kernel does, if it is installed. Matrix products are in x's dtype, decays and states in float32 (float64 if x is).

Shapes: B sequences, T tokens, H heads, P head dimension, G groups of R heads that share b and c, N state size, Z chunks
of Q tokens.
"""

from torch import Tensor

from ttt_e2e.ops import tuning
from ttt_e2e.ops.kernel_library import KernelLibrary, Kernels
from ttt_e2e.ops.ssd.chunked import ssd_chunked
from ttt_e2e.ops.ssd.reference import ssd_reference, ssd_step

__all__ = ["LIBRARY", "ssd", "ssd_reference"]

LIBRARY = KernelLibrary(
    package="mamba-ssm",
    extra="mamba",
    mixer="Mamba 2",
    module="mamba_ssm.ops.triton.ssd_combined",
    functions=("mamba_chunk_scan_combined",),
)


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    state_BHPN: Tensor | None,
    kernels: Kernels = "torch",
) -> tuple[Tensor, Tensor]:
    """The outputs of any number of tokens, and the state after the last one.

    Args:
        x_BTHP: Inputs.
        dt_BTH: Step sizes, not negative, float32 (or float64).
        a_H: Decay rates, not positive, float32 (or float64).
        b_BTGN, c_BTGN: Directions in which the state takes in the inputs, and is read.
        state_BHPN: The state before the first token; None for zeros.
        kernels: "torch" is PyTorch on any device. "auto" takes mamba-ssm's kernel for 16-bit inputs on a GPU if it is
            installed, "fused" always (it multiplies float32 in TF32). PyTorch computes a single token in any case.

    Returns:
        [B, T, H, P] in x's dtype, and [B, H, P, N].

    Raises UserError as `KernelLibrary.choose` does.
    """
    functions = LIBRARY.choose(kernels, x_BTHP)
    if state_BHPN is None:
        state_BHPN = dt_BTH.new_zeros(x_BTHP.shape[0], *x_BTHP.shape[2:], b_BTGN.shape[-1])
    if x_BTHP.numel() == 0:  # no sequences, or no tokens
        return x_BTHP.clone(), state_BHPN
    inputs = (x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN)
    if x_BTHP.shape[1] == 1:
        return ssd_step(*inputs, state_BHPN)
    if functions is not None:
        return functions[0](*inputs, tuning.SSD_KERNEL_CHUNK, initial_states=state_BHPN, return_final_states=True)
    return ssd_chunked(*inputs, state_BHPN)
