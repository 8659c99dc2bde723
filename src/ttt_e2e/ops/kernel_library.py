"""Optional packages whose CUDA kernels compute a mixer's recurrence."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ttt_e2e.errors import UserError

Kernels = Literal["auto", "torch", "fused"]


class KernelLibrary(NamedTuple):
    """Functions of a package, the mixer that they compute, and the extra of this package that installs it."""

    package: str
    extra: str
    mixer: str
    module: str
    functions: tuple[str, ...]

    def check(self, kernels: Kernels) -> None:
        """Raise UserError if `kernels` requires the package and it cannot be imported."""
        if kernels == "fused" and find_functions(self.module, self.functions) is None:
            raise UserError(
                f"{self.mixer} with kernels=fused needs {self.package}; install it with "
                f"pip install 'ttt-e2e[{self.extra}]', or set kernels=auto."
            )

    def choose(self, kernels: Kernels, x: Tensor) -> tuple[Callable[..., Any], ...] | None:
        """The functions if they are to compute the mixer for the input x, None if PyTorch is.

        "auto" takes them, if they are installed, for 16-bit inputs on a GPU outside of compiled code: they multiply
        float32 in TF32, and a compiler cannot trace them. "fused" always takes them, "torch" never. Raises UserError if
        kernels is "fused" and the package is not installed or x is not on a GPU.
        """
        self.check(kernels)
        if kernels == "fused" and not x.is_cuda:
            raise UserError(
                f"{self.mixer} with kernels=fused runs on a GPU only, but its input is on {x.device.type}; move "
                "the model and its input to a GPU, or set kernels=auto."
            )
        fits = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and not is_compiling()
        wanted = kernels == "fused" or (kernels == "auto" and fits)
        return find_functions(self.module, self.functions) if wanted else None


@functools.cache
def find_functions(module: str, names: tuple[str, ...]) -> tuple[Callable[..., Any], ...] | None:
    """The functions of a module by name; None if it is not installed, cannot be imported or does not have them."""
    try:
        found = importlib.import_module(module)
        return tuple(getattr(found, name) for name in names)
    except (ImportError, AttributeError):
        return None
