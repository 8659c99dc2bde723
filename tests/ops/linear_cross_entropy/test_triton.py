"""The Triton kernels of the cross-entropy: on a GPU where there is one, else in Triton's interpreter on the CPU.

In the interpreter, test_triton_interpreter.py starts them.
"""

import os

import pytest
import torch
from torch import Tensor

from ttt_e2e.ops import elementwise, tuning
from ttt_e2e.ops.linear_cross_entropy import (
    cross_entropy_backward,
    cross_entropy_double_backward,
    cross_entropy_forward,
    linear_cross_entropy,
)

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="no GPU; test_triton_interpreter.py runs this on the CPU",
)
gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")


def results(implementation: str, tensors: tuple[Tensor, ...], need_weight: bool) -> list[Tensor]:
    x, weight, targets, g, a, c = tensors
    nll, lse = cross_entropy_forward(x, weight, targets, implementation)
    first = cross_entropy_backward(x, weight, targets, lse, g, need_weight, implementation)
    c = c if need_weight else c.new_empty(0)
    return [nll, lse, *first, *cross_entropy_double_backward(x, weight, targets, lse, g, a, c, implementation)]


def draw(tokens: int, width: int, vocabulary: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    accumulation_dtype = elementwise.accumulation_dtype(dtype)
    x, weight, a, c = (
        torch.randn(n, width, generator=generator, dtype=accumulation_dtype)
        for n in (tokens, vocabulary, tokens, vocabulary)
    )
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    g = torch.randn(1, generator=generator, dtype=accumulation_dtype).expand(
        tokens
    )  # as the gradient of a sum: without strides
    tensors = (x.to(dtype), (weight / width**0.5).to(weight_dtype), targets, g, a.to(dtype), c.to(weight_dtype))
    return tuple(t.to(DEVICE) for t in tensors)


@kernels
@pytest.mark.parametrize("need_weight", [True, False])
@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary", "logits"), [(1, 3, 5, 24), (7, 5, 37, 24), (6, 4, 5000, 2**15)]
)
def test_equals_reference_in_float64(
    tokens: int, width: int, vocabulary: int, logits: int, need_weight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third shape needs several blocks a row of logits."""
    monkeypatch.setattr(tuning, "LOGITS_AT_ONCE", logits)
    tensors = draw(tokens, width, vocabulary, torch.float64, torch.float64)
    expected = results("reference", tensors, need_weight)
    torch.testing.assert_close(results("triton", tensors, need_weight), expected, rtol=1e-10, atol=1e-10)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_weight_equals_tiled(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same walk in PyTorch, which rounds at the same places."""
    monkeypatch.setattr(tuning, "LOGITS_AT_ONCE", 2**9)
    tensors = draw(13, 16, 130, dtype, torch.float32)
    for a, b in zip(results("triton", tensors, True), results("tiled", tensors, True), strict=True):
        assert a.dtype == b.dtype
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert torch.linalg.vector_norm((a - b).float()) <= tolerance * torch.linalg.vector_norm(b.float())


@kernels
def test_gradgradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "LOGITS_AT_ONCE", 8)
    x, weight, targets, *_ = draw(2, 2, 5, torch.float64, torch.float64)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradgradcheck(
        lambda x, weight: linear_cross_entropy(x, weight, targets, implementation="triton"), inputs
    )


@kernels
def test_targets_outside_the_vocabulary() -> None:
    x, weight, targets, *_ = draw(4, 3, 7, torch.float32, torch.float32)
    targets[1], targets[2] = -100, 7
    nll = linear_cross_entropy(x, weight, targets, implementation="triton")
    assert nll.isnan().tolist() == [False, True, True, False]


@gpu
def test_on_a_gpu() -> None:
    """Real sizes: `auto` takes Triton, and memory stays far below that of all logits."""
    tensors = draw(4096, 256, 50257, torch.bfloat16, torch.float32)
    expected = results("tiled", tensors, True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours = results("auto", tensors, True)
    assert torch.cuda.max_memory_allocated() - before < 4096 * 50257
    for a, b in zip(ours, expected, strict=True):
        assert torch.linalg.vector_norm((a - b).float()) <= 1e-2 * torch.linalg.vector_norm(b.float())


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels run here")
def test_is_refused_on_a_cpu() -> None:
    x, weight, targets = torch.randn(4, 3), torch.randn(7, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="on a CUDA device, not on cpu"):
        linear_cross_entropy(x, weight, targets, implementation="triton")
