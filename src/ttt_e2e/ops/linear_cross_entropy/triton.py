# mypy: allow-untyped-defs
"""`Tiled` with the work between its matrix products in Triton: each kernel reads a chunk once and writes in its place.

The matrix products stay with cuBLAS. A kernel has one program per row of a chunk, which goes over the row in blocks.
Logits come in the dtype of the products, and all arithmetic is in that of the statistics, float32 or float64. `WIDTH`,
the length of a row, is a constant of the kernel: a run has two or three, and loops over constants also work in every
version of Triton's interpreter.
"""

import triton
import triton.language as tl
from torch import Tensor

from ttt_e2e.ops import tuning
from ttt_e2e.ops.linear_cross_entropy.tiled import Tiled


@triton.jit
def _add_to_lse_kernel(z_ptr, at_ptr, lse_ptr, target_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    dtype = lse_ptr.dtype.element_ty
    z_ptr += row * WIDTH
    # The logsumexp so far is a maximum and a sum of 1. At the start it is -inf, and that 1 is multiplied by 0.
    maximum = tl.load(lse_ptr + row)
    total = tl.full((), 1, dtype)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + column, mask=column < WIDTH, other=-float("inf")).to(dtype)
        new = tl.maximum(maximum, tl.max(z, 0))
        total = total * tl.exp(maximum - new) + tl.sum(tl.exp(z - new), 0)
        maximum = new
    tl.store(lse_ptr + row, maximum + tl.log(total))
    at = tl.load(at_ptr + row)
    here = (at >= 0) & (at < WIDTH)
    tl.store(target_ptr + row, tl.load(z_ptr + at, mask=here, other=0).to(dtype), mask=here)


@triton.jit
def _gradient_kernel(z_ptr, at_ptr, lse_ptr, g_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    z_ptr += row * WIDTH
    at, lse, g = tl.load(at_ptr + row), tl.load(lse_ptr + row), tl.load(g_ptr + row)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        p = tl.exp(tl.load(z_ptr + column, mask=inside).to(lse.dtype) - lse)
        dz = g * tl.where(column == at, p - 1, p)
        tl.store(z_ptr + column, dz.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_to_mean_kernel(
    z_ptr, tangent_ptr, at_ptr, lse_ptr, mean_ptr, target_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    z_ptr += row * WIDTH
    tangent_ptr += row * WIDTH
    lse = tl.load(lse_ptr + row)
    total = tl.zeros((BLOCK,), lse.dtype)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        p = tl.exp(tl.load(z_ptr + column, mask=inside, other=-float("inf")).to(lse.dtype) - lse)
        total += p * tl.load(tangent_ptr + column, mask=inside, other=0).to(lse.dtype)
    tl.store(mean_ptr + row, tl.load(mean_ptr + row) + tl.sum(total, 0))
    at = tl.load(at_ptr + row)
    here = (at >= 0) & (at < WIDTH)
    tl.store(target_ptr + row, tl.load(tangent_ptr + at, mask=here, other=0).to(lse.dtype), mask=here)


@triton.jit
def _gradient_and_tangent_kernel(
    z_ptr, tangent_ptr, at_ptr, lse_ptr, g_ptr, mean_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    z_ptr += row * WIDTH
    tangent_ptr += row * WIDTH
    at, lse = tl.load(at_ptr + row), tl.load(lse_ptr + row)
    g, mean = tl.load(g_ptr + row), tl.load(mean_ptr + row)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        p = tl.exp(tl.load(z_ptr + column, mask=inside).to(lse.dtype) - lse)
        tangent = tl.load(tangent_ptr + column, mask=inside).to(lse.dtype)
        dz = g * tl.where(column == at, p - 1, p)
        dz_tangent = g * p * (tangent - mean)
        tl.store(z_ptr + column, dz.to(z_ptr.dtype.element_ty), mask=inside)
        tl.store(tangent_ptr + column, dz_tangent.to(z_ptr.dtype.element_ty), mask=inside)


class TritonTiled(Tiled):
    """`Tiled` with Triton kernels between the matrix products."""

    def _add_to_lse(self, z_nv: Tensor, at_n: Tensor, lse_n: Tensor, target_n: Tensor) -> None:
        _launch(_add_to_lse_kernel, z_nv, at_n, lse_n, target_n)

    def _gradient(self, z_nv: Tensor, at_n: Tensor, lse_n: Tensor, g_n: Tensor) -> Tensor:
        _launch(_gradient_kernel, z_nv, at_n, lse_n, g_n.contiguous())  # the gradient of a sum is an expanded scalar
        return z_nv

    def _add_to_mean(
        self, z_nv: Tensor, tangent_nv: Tensor, at_n: Tensor, lse_n: Tensor, mean_n: Tensor, target_n: Tensor
    ) -> None:
        _launch(_add_to_mean_kernel, z_nv, tangent_nv, at_n, lse_n, mean_n, target_n)

    def _gradient_and_tangent(
        self, z_nv: Tensor, tangent_nv: Tensor, at_n: Tensor, lse_n: Tensor, g_n: Tensor, mean_n: Tensor
    ) -> tuple[Tensor, Tensor]:
        _launch(_gradient_and_tangent_kernel, z_nv, tangent_nv, at_n, lse_n, g_n.contiguous(), mean_n)
        return z_nv, tangent_nv


def _launch(kernel, z_nv: Tensor, *tensors: Tensor) -> None:
    rows, width = z_nv.shape
    block = min(triton.next_power_of_2(width), tuning.TRITON_LOGITS_BLOCK)
    kernel[(rows,)](z_nv, *tensors, WIDTH=width, BLOCK=block, num_warps=8)
