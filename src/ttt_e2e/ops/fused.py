"""When a library's CUDA kernel computes a mixer, and what is said where it was demanded and cannot."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ttt_e2e.config.schema import Kernels
from ttt_e2e.errors import UserError

K = TypeVar("K")


class Fused(NamedTuple):
    """What has a kernel (for people), whose it is, and the extra that installs it."""

    mixer: str
    library: str
    extra: str

    def check(self, kernels: Kernels, found: object | None) -> None:
        """Raise UserError if `kernels` demands the library and it was not found."""
        if kernels == "fused" and found is None:
            raise UserError(
                f"{self.mixer} with kernels=fused needs {self.library}; install it with "
                f"pip install 'ttt-e2e[{self.extra}]', or set kernels=auto."
            )

    def choose(self, kernels: Kernels, x: Tensor, find: Callable[[], K | None]) -> K | None:
        """What `find` finds if it is to compute this for the input x, else None.

        "auto" takes it for 16-bit numbers on a GPU, outside of compiled code: a compiler cannot trace it, and such
        kernels multiply float32 in TF32. Raises UserError if it is demanded and not installed, or x not on a GPU.
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
