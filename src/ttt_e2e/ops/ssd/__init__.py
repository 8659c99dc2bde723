"""The state space duality of Mamba 2 (SSD, arXiv 2405.21060): a recurrence computed in matrix products.

`reference.py` is the recurrence, token by token; `chunked.py` computes it in chunks of tokens. On a GPU, mamba-ssm's
kernel does it, if that package is installed.

Matrix products are in x's dtype, decays and states in float32 (float64 if x is).

Shapes: B sequences, T tokens, H heads, P head dimension, G groups of R heads that share b and c, N state size, Z chunks
of Q tokens.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ttt_e2e.ops import tuning
from ttt_e2e.ops.kernel_library import KernelLibrary, Kernels
from ttt_e2e.ops.ssd.chunked import ssd_chunked
from ttt_e2e.ops.ssd.reference import ssd_reference, ssd_step

__all__ = ["Kernel", "check_kernels", "find_kernel", "ssd", "ssd_reference"]

Kernel = Callable[..., Any]  # mamba-ssm's mamba_chunk_scan_combined


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    state_BHPN: Tensor | None,
    chunk: int | None = None,
    kernels: Kernels = "torch",
) -> tuple[Tensor, Tensor]:
    """The outputs of any number of tokens, and the state after the last one.

    Args:
        x_BTHP: Inputs.
        dt_BTH: Step sizes, not negative, float32 (or float64).
        a_H: Decay rates, not positive, float32 (or float64).
        b_BTGN: Directions in which the state takes in the inputs.
        c_BTGN: Directions in which the state is read.
        state_BHPN: The state before the first token; None for zeros.
        chunk: Tokens of a chunk in PyTorch; None for `tuning.SSD_CHUNK`.
        kernels: "torch" is PyTorch on any device. "auto" takes mamba-ssm's kernel for 16-bit inputs on a GPU if it is
            installed, "fused" always (it multiplies float32 in TF32). PyTorch computes a single token in any case.

    Returns:
        [B, T, H, P] in x's dtype, and [B, H, P, N].

    Raises:
        UserError: If kernels is "fused" and mamba-ssm is not installed or the inputs are not on a GPU.
    """
    kernel = _kernel_for(x_BTHP, kernels)
    batch, tokens, heads, width = x_BTHP.shape
    if state_BHPN is None:
        state_BHPN = dt_BTH.new_zeros(batch, heads, width, b_BTGN.shape[-1])
    inputs = (x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN)
    if tokens == 1:
        return ssd_step(*inputs, state_BHPN)
    if kernel is not None:
        return kernel(*inputs, tuning.SSD_KERNEL_CHUNK, initial_states=state_BHPN, return_final_states=True)
    return ssd_chunked(*inputs, state_BHPN, chunk)


_MAMBA = KernelLibrary("mamba-ssm", "Mamba 2", "mamba")


@functools.cache
def find_kernel() -> Kernel | None:
    """mamba-ssm's kernel, or None if the package is not installed."""
    try:
        return importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    except ImportError:
        return None


def check_kernels(kernels: Kernels) -> None:
    """Raise UserError if `kernels` requires mamba-ssm and it is not installed."""
    _MAMBA.check(kernels, find_kernel())


def _kernel_for(x: Tensor, kernels: Kernels) -> Kernel | None:
    """The kernel if it is to compute this."""
    return _MAMBA.choose(kernels, x, find_kernel)
