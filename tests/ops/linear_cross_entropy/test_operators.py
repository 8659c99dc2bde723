"""Cross-entropy from hidden states against PyTorch's own, with first and second derivatives."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ttt_e2e.ops import tuning
from ttt_e2e.ops.linear_cross_entropy import (
    cross_entropy_backward,
    cross_entropy_double_backward,
    cross_entropy_forward,
    linear_cross_entropy,
)
from ttt_e2e.ops.linear_cross_entropy.tiled import Tiled, chunk_sizes

IMPLEMENTATIONS = ("reference", "tiled")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of tokens and of vocabulary even in a small test."""
    monkeypatch.setattr(tuning, "LOGITS_AT_ONCE", 24)


def draw(
    tokens: int, width: int, vocabulary: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, width, generator=generator, dtype=dtype) for n in (tokens, vocabulary))
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(vocabulary, (tokens,), generator=generator)


def reference(x: Tensor, weight: Tensor, targets: Tensor, cap: float | None = None) -> Tensor:
    logits = F.linear(x, weight)
    return F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), targets, reduction="none")


def two_orders(f, x, weight, targets, inner, seed=0):  # type: ignore[no-untyped-def]
    """Losses, the gradients of a function of them in `inner`, and the gradients of a function of those."""
    generator = torch.Generator().manual_seed(seed)

    def like(y: Tensor) -> Tensor:
        return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)

    nll = f(x, weight, targets)
    total = (nll.square() * like(nll)).sum()  # so that the cotangent of the losses depends on x and weight as well
    first = torch.autograd.grad(total, inner, create_graph=True)
    second = torch.autograd.grad([(d * like(d)).sum() for d in first], (x, weight))
    return [nll, *first, *second]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 11),
    width=st.integers(1, 5),
    vocabulary=st.integers(1, 37),
    logits=st.integers(2, 80),
    inner=st.sampled_from(["x", "weight", "both"]),
    cap=st.sampled_from([None, 0.7]),
    seed=st.integers(0, 2**31),
)
def test_equals_pytorch(
    tokens: int, width: int, vocabulary: int, logits: int, inner: str, cap: float | None, seed: int
) -> None:
    x, weight, targets = draw(tokens, width, vocabulary, seed)
    wanted = {"x": (x,), "weight": (weight,), "both": (x, weight)}[inner]
    expected = two_orders(lambda *args: reference(*args, cap), x, weight, targets, wanted, seed)
    tuning.LOGITS_AT_ONCE = logits
    for implementation in IMPLEMENTATIONS:

        def ours(x: Tensor, weight: Tensor, targets: Tensor, implementation: str = implementation) -> Tensor:
            return linear_cross_entropy(x, weight, targets, cap=cap, implementation=implementation)

        for a, b in zip(two_orders(ours, x, weight, targets, wanted, seed), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradcheck(implementation: str, cap: float | None) -> None:
    x, weight, targets = draw(5, 3, 13)

    def f(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets, cap=cap, implementation=implementation)

    assert torch.autograd.gradcheck(f, (x, weight))
    assert torch.autograd.gradgradcheck(f, (x, weight))
    assert torch.autograd.gradgradcheck(lambda x: f(x, weight.detach()), (x,))
    assert torch.autograd.gradgradcheck(lambda weight: f(x.detach(), weight), (weight,))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_opcheck(implementation: str) -> None:
    """Schema, fake tensors and autograd registration, as PyTorch checks them."""
    x, weight, targets = draw(5, 3, 13)
    lse, g = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64, requires_grad=True)
    for cap in ((), (0.7,)):
        torch.library.opcheck(cross_entropy_forward, (x, weight, targets, implementation, *cap))
    for need_weight in (True, False):
        torch.library.opcheck(cross_entropy_backward, (x, weight, targets, lse, g, need_weight, implementation))
    constants = (x.detach(), weight.detach(), targets, lse, g.detach(), torch.randn_like(x))
    for c in (torch.randn_like(weight), weight.detach().new_empty(0)):
        torch.library.opcheck(cross_entropy_double_backward, (*constants, c, implementation))


def explicit(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The inner loop's use: the losses and the gradient of half the sum of their squares in x, written out."""
    nll, lse = cross_entropy_forward(x, weight, targets, "tiled")
    return nll, cross_entropy_backward(x, weight, targets, lse, nll, False, "tiled")[0]


def test_explicit_backward_equals_autograd() -> None:
    x, weight, targets = draw(7, 4, 19)
    nll = reference(x, weight, targets)
    (dx,) = torch.autograd.grad(nll.square().sum() / 2, x, create_graph=True)
    expected = [nll, dx, *torch.autograd.grad(dx.square().sum() + nll.sum(), (x, weight))]
    for f in (explicit, torch.compile(explicit, fullgraph=True, backend="aot_eager")):
        nll, dx = f(x, weight, targets)
        ours = [nll, dx, *torch.autograd.grad(dx.square().sum() + nll.sum(), (x, weight))]
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    assert not cross_entropy_forward(x, weight, targets, "tiled")[1].requires_grad
    empty = cross_entropy_backward(x, weight, targets, nll, nll, False, "tiled")[1]
    assert empty.numel() == 0 and empty.dtype == weight.dtype


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_compiles_in_one_graph() -> None:
    x, weight, targets = draw(7, 4, 19)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    results = []
    for f in (compiled, reference):
        nll = f(x, weight, targets)
        results.append([nll, *torch.autograd.grad(nll.square().sum(), (x, weight))])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_third_derivative_is_refused() -> None:
    x, weight, targets = draw(3, 2, 5)
    (dx,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets).sum(), x, create_graph=True)
    (gx,) = torch.autograd.grad(dx.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second order only"):
        gx.sum().backward()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits_stay_finite(implementation: str) -> None:
    """Logits of thousands, where exp overflows: finite, and as exact as a logsumexp in float32 is there."""
    x, weight, targets = draw(6, 4, 23)
    x.data *= 1000

    def ours(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets, implementation=implementation)

    expected = two_orders(reference, x, weight, targets, (x, weight))
    assert expected[0].max() > 1000
    x, weight = (y.detach().float().requires_grad_() for y in (x, weight))
    for a, b in zip(two_orders(ours, x, weight, targets, (x, weight)), expected, strict=True):
        assert torch.linalg.vector_norm(a - b) < 1e-3 * torch.linalg.vector_norm(b)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_stays_close(implementation: str, cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the rounding of bfloat16; losses in float32, every gradient in its tensor's dtype."""
    monkeypatch.setattr(tuning, "LOGITS_AT_ONCE", 2**10)
    x, weight, targets = draw(40, 16, 130, dtype=torch.float32)
    weight.data /= 4
    x_half = x.detach().bfloat16().requires_grad_()

    def ours(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets, cap=cap, implementation=implementation)

    results = two_orders(ours, x_half, weight, targets, (x_half, weight))
    expected = two_orders(lambda *args: reference(*args, cap), x, weight, targets, (x, weight))
    float32, half = torch.float32, torch.bfloat16
    assert [r.dtype for r in results] == [float32, half, float32, half, float32]
    for a, b in zip(results, expected, strict=True):
        assert torch.linalg.vector_norm(a.float() - b) < 0.02 * torch.linalg.vector_norm(b)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for y in out if isinstance(out, tuple | list) else (out,):
            if isinstance(y, Tensor):
                self.numel = max(self.numel, y.numel())
        return out


def test_tiled_holds_few_logits() -> None:
    tokens, width, vocabulary = 3000, 4, 5000
    tuning.LOGITS_AT_ONCE = 2**16
    x, weight, targets = draw(tokens, width, vocabulary, dtype=torch.float32)
    x, weight, a, c = x.detach(), weight.detach(), torch.randn_like(x), torch.randn_like(weight)
    with Largest() as largest:  # over what the operators do: inside them, below autograd
        nll, lse = Tiled().forward(x, weight, targets)
        Tiled().backward(x, weight, targets, lse, nll, True)
        assert largest.numel == 2**16
        Tiled().double_backward(x, weight, targets, lse, nll, a, c)
    assert largest.numel == 2**16 < tokens * vocabulary / 200


@settings(max_examples=200, deadline=None)
@given(tokens=st.integers(0, 10**6), vocabulary=st.integers(1, 10**6), logits=st.integers(1, 2**25))
def test_chunk_sizes(tokens: int, vocabulary: int, logits: int) -> None:
    n, v = chunk_sizes(tokens, vocabulary, logits)
    assert n >= 1 and v >= 1 and n * v <= logits
    if tokens * vocabulary >= logits >= 2**10:  # what there is to spend is spent
        assert min(n, tokens) * min(v, vocabulary) > logits / 4


def test_accepts_leading_dimensions() -> None:
    x, weight, targets = draw(12, 3, 7)
    flat = linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(linear_cross_entropy(x.view(2, 6, 3), weight, targets.view(2, 6)), flat.view(2, 6))
    torch.testing.assert_close(linear_cross_entropy(x[0], weight, targets[0]), flat[0])
    for implementation in IMPLEMENTATIONS:
        nothing = linear_cross_entropy(x[:0], weight, targets[:0], implementation=implementation)
        assert nothing.shape == (0,) and torch.autograd.grad(nothing.sum(), weight)[0].eq(0).all()


def test_targets_outside_the_vocabulary() -> None:
    x, weight, targets = draw(4, 3, 7)
    targets[1], targets[2] = -100, 7
    assert linear_cross_entropy(x, weight, targets, implementation="tiled").isnan().tolist() == [
        False,
        True,
        True,
        False,
    ]
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(x, weight, targets, implementation="reference")


def test_auto_takes_tiles_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = draw(4, 3, 7)
    monkeypatch.delattr(Tiled, "forward")
    linear_cross_entropy(x, weight, targets, implementation="reference")
    with pytest.raises(AttributeError, match="forward"):
        linear_cross_entropy(x, weight, targets)


def test_refuses_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = draw(4, 3, 7)
    for arguments, message in (
        ((x[:, :2], weight, targets), r"x \[4, 2\] and weight \[7, 3\]"),
        ((x, weight, targets[:3]), r"targets \[3\]"),
        ((x, weight, targets.int()), "int64"),
        ((x.long(), weight, targets), "floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments)
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        linear_cross_entropy(x, weight, targets, implementation="fast")
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        cross_entropy_forward(x, weight, targets, "fast")
    with monkeypatch.context() as patch:
        patch.setattr("ttt_e2e.ops.linear_cross_entropy.operators.triton_serves", lambda *_: True)
        with pytest.raises(ValueError, match="Triton kernels have no cap"):
            linear_cross_entropy(x, weight, targets, cap=1.0, implementation="triton")
    monkeypatch.setattr("ttt_e2e.ops.implementations.HAS_TRITON", False)
    with pytest.raises(ValueError, match="not installed"):
        linear_cross_entropy(x, weight, targets, implementation="triton")
