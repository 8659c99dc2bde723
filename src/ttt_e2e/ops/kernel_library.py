"""When a library's CUDA kernel computes a mixer, and the errors where it is required but cannot."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ttt_e2e.errors import UserError

Kernels = Literal["auto", "torch", "fused"]
K = TypeVar("K")


class KernelLibrary(NamedTuple):
    """A package with CUDA kernels, the mixer that they compute, and the extra of this package that installs it."""

    package: str
    mixer: str
    extra: str

    def check(self, kernels: Kernels, found: object | None) -> None:
        """Raise UserError if `kernels` requires the package and it was not found."""
        if kernels == "fused" and found is None:
            raise UserError(
                f"{self.mixer} with kernels=fused needs {self.package}; install it with "
                f"pip install 'ttt-e2e[{self.extra}]', or set kernels=auto."
            )

    def choose(self, kernels: Kernels, x: Tensor, find: Callable[[], K | None]) -> K | None:
        """The kernels that are to compute this for the input x; None for PyTorch.

        "auto" takes them for 16-bit inputs on a GPU outside of compiled code: they multiply float32 in TF32, and a
        compiler cannot trace them. "fused" always takes them, "torch" never.

        Args:
            kernels: The setting.
            x: The mixer's input.
            find: Returns the kernels, or None if the package is not installed.

        Raises:
            UserError: If they are required and the package is not installed or x is not on a GPU.
        """
        if kernels == "fused":
            found = find()
            self.check(kernels, found)
            if not x.is_cuda:
                raise UserError(
                    f"{self.mixer} with kernels=fused runs on a GPU only, but its input is on {x.device.type}; move "
                    "the model and its input to a GPU, or set kernels=auto."
                )
            return found
        fits = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and not is_compiling()
        return find() if kernels == "auto" and fits else None
