"""The implementations that an operator may have, and whether Triton's can run."""

import importlib.util
import os

from torch import Tensor

IMPLEMENTATIONS = ("auto", "reference", "tiled", "triton")

# Triton takes a while to import, and the package works without it.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def triton_serves(x: Tensor, implementation: str, unsupported: str | None = None) -> bool:
    """Whether Triton kernels can serve the tensor x; in Triton's interpreter they also serve tensors on a CPU.

    `unsupported` says what else they would need of x. Raises ValueError if the implementation is unknown, or is
    "triton" and cannot serve x.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}: it must be one of {', '.join(IMPLEMENTATIONS)}")
    obstacle = unsupported
    if not HAS_TRITON:
        obstacle = "the package triton, which is not installed"
    elif not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        obstacle = f"tensors on a CUDA device, not on {x.device.type}"
    if implementation == "triton" and obstacle:
        raise ValueError(f"implementation 'triton' needs {obstacle}")
    return obstacle is None
