"""Gated DeltaNet against Qwen3-Next's layer in transformers, and the laws of every mixer."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import make_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ttt_e2e.model.mixers.base import Positions
from ttt_e2e.model.mixers.gated_deltanet import DeltaState, GatedDeltaNet
from ttt_e2e.ops import tuning
from ttt_e2e.ops.gated_delta_rule import gated_delta_rule_reference
from ttt_e2e.ops.kernel_library import KernelLibrary

F64 = torch.float64
CHUNK = tuning.DELTA_RULE_CHUNK
PLACE = Positions(torch.empty(0), torch.empty(0))  # a recurrent mixer does not look at it


def small_mixer(dtype: torch.dtype = F64, seed: int = 0, **changes: object) -> GatedDeltaNet:
    values: dict = dict(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        pattern=("gated-deltanet",),
    )
    mixer = GatedDeltaNet(make_config(**{**values, **changes}))
    generator = torch.Generator().manual_seed(seed)
    mixer.reset_parameters(0.3, generator)
    with torch.no_grad():
        mixer.norm.add_(0.1 * torch.randn(mixer.norm.shape, generator=generator))
    return mixer.to(dtype)


def text(tokens: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(seed), dtype=F64)


def assert_same(ours: object, theirs: object, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# -- the mixer against transformers ------------------------------------------------------------------------------------


def qwen_layer(mixer: GatedDeltaNet, expand: int, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """Qwen3-Next's layer with the mixer's weights. Its input rows are grouped by key head."""
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig

    # Wrapped, they call flash-linear-attention where it is installed, which needs a GPU.
    for name in ("torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"):
        monkeypatch.setattr(qwen, name, inspect.unwrap(getattr(qwen, name)))

    heads, width = mixer.heads, mixer.head_width
    config = Qwen3NextConfig(
        hidden_size=heads * width,
        num_hidden_layers=1,
        linear_num_value_heads=expand * heads,
        linear_num_key_heads=heads,
        linear_key_head_dim=width,
        linear_value_head_dim=width,
        linear_conv_kernel_dim=mixer.w_conv.shape[1],
        rms_norm_eps=mixer.norm_eps,
        layer_types=["linear_attention"],
    )
    layer = qwen.Qwen3NextGatedDeltaNet(config, 0)
    rows = (heads * width,) * 2 + (expand * heads * width,) * 2
    with torch.no_grad():
        grouped = [part.unflatten(0, (heads, -1)) for part in mixer.w_in.split(rows)]
        layer.in_proj_qkvz.weight.copy_(torch.cat(grouped, 1).flatten(0, 1))
        grouped = [part.unflatten(0, (heads, -1)) for part in mixer.w_ba.chunk(2)]
        layer.in_proj_ba.weight.copy_(torch.cat(grouped, 1).flatten(0, 1))
        layer.conv1d.weight.copy_(mixer.w_conv[:, None])
        layer.A_log.copy_(mixer.a_log)
        layer.dt_bias.copy_(mixer.dt_bias)
        layer.norm.weight.copy_(mixer.norm)
        layer.out_proj.weight.copy_(mixer.w_out)
    return layer


@pytest.mark.parametrize("expand", [1, 2])
@pytest.mark.parametrize("conv_width", [2, 4])
@pytest.mark.parametrize("tokens", [3, 70, 128])
def test_mixer_is_qwens_layer(expand: int, conv_width: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs, and the gradient of the inputs."""
    mixer = small_mixer(torch.float32, gated_deltanet__expand_v=expand, gated_deltanet__conv_size=conv_width)
    layer = qwen_layer(mixer, expand, monkeypatch)
    x = text(tokens).float().requires_grad_()
    ours, theirs = mixer(x, PLACE, None)[0], layer(x)
    assert_same(ours, theirs, 1e-5)
    direction = text(tokens, seed=1).float()
    assert_same(*(torch.autograd.grad(y, x, direction)[0] for y in (ours, theirs)), 1e-4)


# -- the laws ----------------------------------------------------------------------------------------------------------


def in_pieces(mixer: GatedDeltaNet, x: Tensor, lengths: list[int]) -> tuple[Tensor, DeltaState]:
    outputs, state = [], None
    for piece in x.split(lengths, 1):
        y, state = mixer(piece, PLACE, state)
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, 1), state


def cut(total: int, lengths: list[int]) -> list[int]:
    """The lengths, repeated and cut off so that they add up to the total."""
    cuts, left = [], total
    while left:
        cuts.append(min(lengths[len(cuts) % len(lengths)], left))
        left -= cuts[-1]
    return cuts


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 4 * CHUNK),
    lengths=st.lists(st.one_of(st.integers(1, 3), st.integers(1, 2 * CHUNK)), min_size=1, max_size=6),
    seed=st.integers(0, 999),
    expand=st.integers(1, 3),
    conv_width=st.integers(1, 5),
)
def test_any_split_gives_the_same(tokens: int, lengths: list[int], seed: int, expand: int, conv_width: int) -> None:
    mixer, x = (
        small_mixer(seed=seed, gated_deltanet__expand_v=expand, gated_deltanet__conv_size=conv_width),
        text(tokens, seed=seed),
    )
    with torch.no_grad():
        assert_same(in_pieces(mixer, x, cut(tokens, lengths)), mixer(x, PLACE, None))


def test_gradients_flow_through_the_state() -> None:
    mixer, x = small_mixer(), text(2 * CHUNK + 3).requires_grad_()
    inputs = (x, *mixer.parameters())
    results = []
    for lengths in ([x.shape[1]], cut(x.shape[1], [5, 1, CHUNK + 2])):
        y, state = in_pieces(mixer, x, lengths)
        results.append(torch.autograd.grad((y * y.sin()).sum() + state.rule_BAKK.square().sum(), inputs))
    assert_same(*results)
    assert all(grad.abs().sum() > 0 for grad in results[0])


@pytest.mark.parametrize("tokens", [1, 4])
def test_gradcheck(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of outputs and final state, in the inputs, the state before them and every parameter."""
    monkeypatch.setattr(tuning, "DELTA_RULE_CHUNK", 3)
    mixer = small_mixer(hidden_size=4, num_attention_heads=1, gated_deltanet__expand_v=2, gated_deltanet__conv_size=3)
    names = [name for name, _ in mixer.named_parameters()]
    with torch.no_grad():
        before = mixer(text(3, 1)[..., :4], PLACE, None)[1]

    def call(x: Tensor, conv: Tensor, rule: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, values, strict=True))
        y, state = torch.func.functional_call(mixer, parameters, (x, PLACE, DeltaState(conv, rule)))
        return y, *state

    x = text(tokens, 1, seed=1)[..., :4].contiguous()
    inputs = [x.requires_grad_() for x in (x, *before)]
    assert torch.autograd.gradcheck(call, (*inputs, *mixer.parameters()))


def test_the_state_is_a_value() -> None:
    """Going on from it twice gives the same twice."""
    mixer = small_mixer()
    with torch.no_grad():
        _, state = mixer(text(CHUNK + 5), PLACE, None)
        copies = [x.clone() for x in state]
        for tokens in (1, 2, CHUNK + 1):
            first, _ = mixer(text(tokens, seed=2), PLACE, state)
            assert_same(mixer(text(tokens, seed=2), PLACE, state)[0], first, 0)
    assert_same(list(state), copies, 0)


def test_the_state_is_of_fixed_size() -> None:
    mixer = small_mixer(torch.bfloat16, gated_deltanet__expand_v=3)
    for tokens in (1, 2, CHUNK + 1):
        _, state = mixer(text(tokens).bfloat16(), PLACE, None)
        assert state.conv_BWC.shape == (2, 3, (2 + 3) * 16) and state.conv_BWC.dtype == torch.bfloat16
        assert state.rule_BAKK.shape == (2, 6, 8, 8) and state.rule_BAKK.dtype == torch.float32


def test_every_sequence_alone() -> None:
    mixer, x = small_mixer(), text(CHUNK + 9, batch=3)
    y, state = mixer(x, PLACE, None)
    for i in range(3):
        alone, own = mixer(x[i : i + 1], PLACE, None)
        assert_same((alone, *own), (y[i : i + 1], *(part[i : i + 1] for part in state)), 1e-12)


def test_no_token_sees_a_later_one() -> None:
    mixer, x = small_mixer(), text(2 * CHUNK + 9)
    at = CHUNK + 4
    changed = torch.cat((x[:, :at], text(x.shape[1], seed=3)[:, at:]), 1)
    y, y_changed = (mixer(x, PLACE, None)[0] for x in (x, changed))
    assert_same(y[:, :at], y_changed[:, :at], 1e-12)
    assert (y[:, at:] - y_changed[:, at:]).abs().amax((0, 2)).min() > 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.04)])
@pytest.mark.parametrize("tokens", [1, 3 * CHUNK])
def test_lower_precision(dtype: torch.dtype, tolerance: float, tokens: int) -> None:
    mixer, x = small_mixer(torch.float32), text(tokens)
    y, _ = mixer(x.to(dtype), PLACE, None)
    assert y.dtype == dtype
    exact = small_mixer(F64)(x, PLACE, None)[0]
    assert (y.double() - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("tokens", [1, CHUNK + 3])
def test_compile(tokens: int) -> None:
    mixer, x = small_mixer(), text(tokens)
    _, state = mixer(text(5, seed=1), PLACE, None)
    state = DeltaState(*(part.detach() for part in state))
    compiled = torch.compile(mixer, fullgraph=True, dynamic=False, backend="aot_eager")
    results = []
    for f in (mixer, compiled):
        y, after = f(x, PLACE, state)
        results.append((y, *after, *torch.autograd.grad(y.square().sum(), tuple(mixer.parameters()))))
    assert_same(*results)


class Elements(TorchDispatchMode):
    """Notes the elements of the largest storage that any operation returns, and counts operations."""

    largest = operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


def test_memory_and_work_are_linear() -> None:
    """No tensor grows faster than the text, and no operation is called for every token."""
    mixer = small_mixer(torch.float32)
    seen = []
    for tokens in (1024, 2048):
        x = text(tokens, 1).float()
        with Elements() as whole:
            with Elements() as forward:
                y, _ = mixer(x, PLACE, None)
            y.sum().backward()
        seen.append(whole)
    assert seen[1].largest <= 2 * seen[0].largest
    assert forward.operations < 2048


def test_one_token_is_cheap() -> None:
    """No padding to a chunk: nothing is larger than the state or the weights."""
    mixer, x = small_mixer(torch.float32), text(1, 1).float()
    with torch.no_grad():
        _, state = mixer(x, PLACE, None)
        with Elements() as elements:
            mixer(x, PLACE, state)
    assert elements.largest <= max(mixer.w_in.numel(), state.rule_BAKK.numel())


def test_initial_values() -> None:
    mixer = small_mixer(torch.float32, hidden_size=512, num_attention_heads=128, gated_deltanet__expand_v=2)
    assert mixer.w_in.std().item() == pytest.approx(0.3, rel=0.02)
    assert mixer.w_conv.abs().max().item() == pytest.approx(0.5, rel=0.01)
    rate, dt = mixer.a_log.exp(), F.softplus(mixer.dt_bias)
    assert rate.min() >= 0.0099 and rate.max() <= 16.001 and rate.mean().item() == pytest.approx(8, rel=0.1)
    assert dt.min() >= 0.00099 and dt.max() <= 0.1001 and dt.log().mean().item() == pytest.approx(-4.6, abs=0.2)
    assert set(mixer.no_weight_decay) <= {name for name, _ in mixer.named_parameters()}


# -- flash-linear-attention --------------------------------------------------------------------------------------------


def test_it_hands_the_library_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, whole and continued, the result stays close to PyTorch's."""

    def rule(**arguments: Any) -> tuple[Tensor, Tensor]:
        assert arguments["q"].dtype == arguments["k"].dtype == arguments["v"].dtype == torch.bfloat16
        assert arguments["g"].dtype == arguments["beta"].dtype == torch.float32
        inputs = (arguments[name].float() for name in ("q", "k", "v", "g", "beta"))
        o, state = gated_delta_rule_reference(*inputs, arguments["initial_state"])
        return o.bfloat16(), state

    mixer, x = small_mixer(torch.float32), text(CHUNK + 9).bfloat16()
    results = []
    for functions in (None, (rule, rule)):
        monkeypatch.setattr(KernelLibrary, "choose", lambda *_, functions=functions: functions)
        y, state = mixer(x, PLACE, None)
        y.sum().backward()
        results.append((y, mixer(x[:, :3], PLACE, state)[0]))
    assert_same(*results, 0.02)
