"""The gated delta rule against its recurrence, transformers, and flash-linear-attention."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_e2e.ops import tuning
from ttt_e2e.ops.gated_delta_rule import LIBRARY, gated_delta_rule, gated_delta_rule_reference
from ttt_e2e.ops.kernel_library import KernelLibrary

F64 = torch.float64
CHUNK = tuning.DELTA_RULE_CHUNK
LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]


def rule_inputs(
    tokens: int, heads: tuple[int, int] = (2, 4), widths: tuple[int, int] = (4, 6), batch: int = 2, seed: int = 0
) -> list[Tensor]:
    """q, k, v, g, beta and a state that is not zero, in float64, with gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    q, k = (F.normalize(draw(batch, tokens, heads[0], widths[0]), dim=-1) for _ in range(2))
    v, g = draw(batch, tokens, heads[1], widths[1]), -F.softplus(draw(batch, tokens, heads[1]) - 2)
    beta, state = draw(batch, tokens, heads[1]).sigmoid(), draw(batch, heads[1], *widths)
    return [x.requires_grad_() for x in (q, k, v, g, beta, state)]


def assert_same(ours: object, theirs: object, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("heads", [(1, 1), (2, 4)])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_equals_the_recurrence(tokens: int, heads: tuple[int, int]) -> None:
    """Outputs, final state and all gradients."""
    inputs = rule_inputs(tokens, heads)
    results = []
    for rule in (gated_delta_rule, gated_delta_rule_reference):
        out = rule(*inputs)
        generator = torch.Generator().manual_seed(1)
        directions = [torch.randn(x.shape, generator=generator, dtype=F64) for x in out]
        results.append([*out, *torch.autograd.grad(out, inputs, directions)])
    assert_same(*results)


def test_no_state_is_a_state_of_zeros() -> None:
    *inputs, state = rule_inputs(CHUNK + 3)
    assert_same(gated_delta_rule(*inputs, None), gated_delta_rule(*inputs, torch.zeros_like(state)), 0)
    assert_same(gated_delta_rule_reference(*inputs, None), gated_delta_rule(*inputs, None))


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_gradcheck(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a last chunk that is not full."""
    monkeypatch.setattr(tuning, "DELTA_RULE_CHUNK", 3)
    inputs = rule_inputs(tokens, (1, 2), (2, 3), batch=1)
    assert torch.autograd.gradcheck(lambda *x: gated_delta_rule(*x), inputs)


def test_strong_decay_stays_exact() -> None:
    """The products of decays leave float64's range within a chunk; their ratios and the gradients stay exact."""
    inputs = rule_inputs(2 * CHUNK + 1)
    inputs[3] = (inputs[3].detach() * 400).requires_grad_()
    results = []
    for rule in (gated_delta_rule, gated_delta_rule_reference):
        out = rule(*inputs)
        results.append([*out, *torch.autograd.grad(out[0].square().sum() + out[1].sum(), inputs)])
    assert all(x.isfinite().all() for x in results[0])
    assert_same(*results)


def test_equal_keys_hold_the_last_value() -> None:
    """With beta one and no decay."""
    _, k, v, g, beta, _ = rule_inputs(100, (1, 1))
    k = k[:, :1].expand_as(k)
    o, _ = gated_delta_rule(k.float(), k.float(), v.float(), 0 * g.float(), 1 + 0 * beta.float(), None)
    assert_same(o, v.float(), 1e-5)


@pytest.mark.parametrize("tokens", [7, 70, 128])
@pytest.mark.parametrize("heads", [(2, 2), (2, 4)])
def test_equals_transformers(tokens: int, heads: tuple[int, int]) -> None:
    """transformers computes in float32."""
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, g, beta, state = (x.detach().float() for x in rule_inputs(tokens, heads, (16, 16)))
    ours = gated_delta_rule(q * 16**-0.5, k, v, g, beta, state)
    for name in ("torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"):
        plain = inspect.unwrap(getattr(qwen, name))  # wrapped, it may call flash-linear-attention, which needs a GPU
        theirs = plain(q, k, v, g, beta, initial_state=state.clone(), output_final_state=True)
        assert_same(ours, theirs, 1e-5)


# -- flash-linear-attention --------------------------------------------------------------------------------------------


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The name and the arguments of every call of the library, which computes the recurrence."""
    calls = []

    def function(name: str) -> Any:
        def rule(**arguments: Any) -> tuple[Tensor, Tensor]:
            calls.append((name, arguments))
            inputs = (arguments[x] for x in ("q", "k", "v", "g", "beta", "initial_state"))
            return gated_delta_rule_reference(*inputs)

        return rule

    functions = tuple(function(name) for name in LIBRARY.functions)
    monkeypatch.setattr(KernelLibrary, "choose", lambda self, kernels, x: functions)
    return calls


def test_the_recurrent_function_is_for_few_tokens_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_calls(monkeypatch)
    few, many = (rule_inputs(n) for n in (3, tuning.DELTA_RULE_RECURRENT_TOKENS + 1))
    gated_delta_rule(*few)
    with torch.no_grad():
        gated_delta_rule(*few)
        gated_delta_rule(*many)
    assert [name for name, _ in calls] == [LIBRARY.functions[i] for i in (0, 1, 0)]


@pytest.mark.parametrize("name", LIBRARY.functions)
def test_arguments_are_those_of_the_real_functions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a named parameter, and the parameters left out have defaults."""
    real = getattr(pytest.importorskip(LIBRARY.module), name)
    calls = record_calls(monkeypatch)
    with torch.set_grad_enabled(name == LIBRARY.functions[0]):
        gated_delta_rule(*rule_inputs(3))
    ((called, arguments),) = calls
    assert called == name
    signature = inspect.signature(real)
    assert not signature.bind(**arguments).arguments.get("kwargs")


@pytest.mark.parametrize("heads", [(2, 2), (2, 4)])
@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_equals_flash_linear_attention(tokens: int, heads: tuple[int, int]) -> None:
    """Outputs, state and gradients of its plain functions, which compute in float32 and without shared key heads."""
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    inputs = [x.detach().float().requires_grad_() for x in rule_inputs(tokens, heads, (16, 16))]
    ours = gated_delta_rule(*inputs)
    direction = torch.randn(ours[0].shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(ours[0], inputs, direction)
    for function in (naive.naive_recurrent_gated_delta_rule, naive.naive_chunk_gated_delta_rule):
        q, k, v, g, beta, state = inputs
        q, k = (x.repeat_interleave(heads[1] // heads[0], 2) for x in (q, k))
        theirs = function(q=q, k=k, v=v, g=g, beta=beta, scale=1.0, initial_state=state, output_final_state=True)
        assert_same(ours, theirs, 1e-5)
        assert_same(gradients, torch.autograd.grad(theirs[0], inputs, direction), 1e-4)
