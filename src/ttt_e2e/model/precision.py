"""The precision in which a model's weights are held: float32, or, for some matrices, the dtype of the products.

`ops.linear` rounds a static matrix to the dtype of its inputs. A matrix that is held in that dtype gives the same
numbers, takes half the memory in bfloat16, and is not rounded again for every mini-batch.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ttt_e2e.config.schema import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]  # of parameters, by name


class Rounded(NamedTuple):
    """What is left to know of a model whose matrices were rounded."""

    dtype: torch.dtype  # the only one whose products give what they would give with the model's own weights
    digest: str  # of the weights before


def is_smaller(dtype: torch.dtype) -> bool:
    """Whether matrices are rounded for products in `dtype`: weights are float32."""
    return dtype.itemsize < torch.float32.itemsize


def is_static_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the parameter is a matrix of a linear layer of a block, or where an MLP's fast matrix starts."""
    return name.rpartition(".")[2].startswith("w_") and len(shape) == 2 and not name.endswith(".w_conv")


def product_matrices(config: ModelConfig, shapes: Shapes) -> set[str]:
    """Of the parameters with these shapes, those that are rounded to the products' dtype wherever they are read.

    These are the embedding, the head and the matrices that all sequences share. Fast weights are float32, and begin as
    the model's.
    """
    shared = {n for n in shapes if config.fast_rank is not None or ".fast." not in n}
    return {n for n in shared if n in ("embedding", "head") or is_static_matrix(n, shapes[n])}


def hold_in(dtype: torch.dtype, weights: Iterable[Tensor], *, if_exact: bool = False) -> None:
    """Hold `weights` in `dtype` if it is smaller than float32; with `if_exact` only those that lose nothing by it."""
    for weight in weights if is_smaller(dtype) else ():
        rounded = weight.data.to(dtype)
        if not if_exact or torch.equal(rounded.to(weight.dtype), weight.data):
            weight.data = rounded
