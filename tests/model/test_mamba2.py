"""Mamba 2 against transformers', and the laws of every mixer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import make_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.model.mixers.base import Positions
from ttt_e2e.model.mixers.mamba2 import Mamba2, Mamba2State
from ttt_e2e.ops.kernel_library import KernelLibrary
from ttt_e2e.ops.ssd import ssd_reference

torch.set_num_threads(1)
F64 = torch.float64
NOWHERE = Positions(torch.empty(0), torch.empty(0))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def mamba_config(**changes: object) -> ModelConfig:
    values: dict = dict(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        pattern=("mamba2",),
        mini_batch_size=None,
        mamba2__state_size=5,
    )
    return make_config(**{**values, **changes})


def make_mixer(dtype: torch.dtype = F64, seed: int = 0, **changes: object) -> Mamba2:
    """Every parameter away from its round initial value, and decays from slow to fast."""
    generator = torch.Generator().manual_seed(seed)
    mixer = Mamba2(mamba_config(**changes))
    mixer.reset_parameters(0.3, generator)
    with torch.no_grad():
        for parameter in (mixer.d_skip, mixer.norm):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        mixer.dt_bias.add_(1.5)
    return mixer.to(dtype)


def read(mixer: Mamba2, x: Tensor, pieces: list[int]) -> tuple[Tensor, Mamba2State]:
    """x in pieces, the state handed on; no state is changed by what is read after it."""
    state, outputs = None, []
    for piece in x.split(pieces, 1):
        before = None if state is None else [t.clone() for t in state]
        y, after = mixer(piece, NOWHERE, state)
        assert state is None or all(torch.equal(t, kept) for t, kept in zip(state, before, strict=True))
        state = after
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, 1), state


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float = 1e-9) -> None:
    """Up to `tolerance` of each tensor's largest entry (or 1, for those that are smaller)."""
    for x, y in zip(ours, theirs, strict=True):
        scale = y.abs().max().item() if y.numel() else 0.0
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * max(1.0, scale))


# -- transformers' -----------------------------------------------------------------------------------------------------


@contextmanager
def double_precision() -> Iterator[None]:
    """Code that brings its tensors to float32 keeps float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch, "float32", torch.float64)
        yield


def make_theirs(mixer: Mamba2) -> tuple[Any, Any]:
    """transformers' layer with the same weights, and its configuration."""
    pytest.importorskip("transformers")
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = mixer.config
    theirs_config = Mamba2Config(
        hidden_size=config.hidden_size,
        expand=config.mamba2.expand,
        num_heads=mixer.heads,
        head_dim=config.head_dim,
        state_size=config.mamba2.state_size,
        n_groups=config.mamba2.n_groups,
        conv_kernel=config.mamba2.conv_kernel,
        layer_norm_epsilon=config.rms_norm_eps,
        chunk_size=8,
        num_hidden_layers=1,
    )
    theirs = Mamba2Mixer(theirs_config, layer_idx=0)
    theirs.load_state_dict(
        {
            "in_proj.weight": mixer.w_in,
            "conv1d.weight": mixer.conv_weight[:, None],
            "conv1d.bias": mixer.conv_bias,
            "A_log": mixer.a_log,
            "dt_bias": mixer.dt_bias,
            "D": mixer.d_skip,
            "norm.weight": mixer.norm,
            "out_proj.weight": mixer.w_out,
        }
    )
    return theirs.double(), theirs_config


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tokens", [1, 8, 37])
def test_it_is_transformers_mamba2(tokens: int, groups: int) -> None:
    """Outputs, and gradients of x and of every parameter."""
    mixer = make_mixer(mamba2__n_groups=groups)
    theirs, _ = make_theirs(mixer)
    x, g = draw(2, tokens, 16, seed=1).requires_grad_(), draw(2, tokens, 16, seed=2)
    with double_precision():
        expected = theirs(x)
        theirs_by_name = dict(theirs.named_parameters())
        names = ("in_proj.weight", "conv1d.weight", "conv1d.bias", "A_log", "dt_bias", "D", "norm.weight")
        leaves = [x, *(theirs_by_name[name] for name in (*names, "out_proj.weight"))]
        expected_grads = torch.autograd.grad(expected, leaves, g)
    y, _ = mixer(x, NOWHERE, None)
    assert_same((y,), (expected,))
    grads = torch.autograd.grad(y, [x, *mixer.parameters()], g)
    assert_same(grads, tuple(e.reshape(o.shape) for o, e in zip(grads, expected_grads, strict=True)))


@pytest.mark.parametrize("groups", [1, 2])
def test_its_steps_are_transformers(groups: int) -> None:
    """Eleven tokens at once, then five one by one, through transformers' cache."""
    mixer = make_mixer(mamba2__n_groups=groups)
    theirs, theirs_config = make_theirs(mixer)
    from transformers.cache_utils import DynamicCache

    x = draw(2, 16, 16, seed=1)
    cache = DynamicCache(config=theirs_config)
    with torch.no_grad(), double_precision():
        expected = torch.cat([theirs(piece, cache_params=cache) for piece in x.split([11, *[1] * 5], 1)], 1)
    y, state = read(mixer, x, [11, *[1] * 5])
    assert_same((y, state.ssm_BHPN), (expected, cache.get_recurrent_state(0)))


# -- the laws of every mixer -------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    groups=st.sampled_from([1, 2]),
    conv_width=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_split_gives_the_same(pieces: list[int], groups: int, conv_width: int, seed: int) -> None:
    mixer = make_mixer(seed=seed, mamba2__n_groups=groups, mamba2__conv_kernel=conv_width)
    x = draw(2, sum(pieces), 16, seed=seed)
    with torch.no_grad():
        whole, last = mixer(x, NOWHERE, None)
        y, state = read(mixer, x, pieces)
    assert_same((y, *state), (whole, *last))


def test_token_by_token_gives_the_same() -> None:
    mixer = make_mixer()
    x = draw(2, 70, 16, seed=1)
    whole, last = mixer(x, NOWHERE, None)
    y, state = read(mixer, x, [1] * 70)
    assert_same((y, *state), (whole, *last))


def test_a_state_can_be_gone_on_from_twice() -> None:
    mixer = make_mixer()
    x, other = draw(2, 9, 16, seed=1), draw(2, 9, 16, seed=2)
    _, state = mixer(x, NOWHERE, None)
    first, _ = mixer(x, NOWHERE, state)
    for tokens in (1, 9):
        mixer(other[:, :tokens], NOWHERE, state)
    again, _ = mixer(x, NOWHERE, state)
    assert torch.equal(first, again)


@pytest.mark.parametrize("tokens", [1, 5])
def test_gradcheck_through_everything(tokens: int) -> None:
    """x, the state and every parameter, to the outputs and to the state after them."""
    mixer = make_mixer(
        hidden_size=4,
        num_attention_heads=2,
        mamba2__expand=2,
        mamba2__state_size=2,
        mamba2__n_groups=2,
        mamba2__conv_kernel=3,
    )
    names = [name for name, _ in mixer.named_parameters()]
    x = draw(2, tokens, 4, seed=1)
    state = (draw(2, 2, 16, seed=2), draw(2, 4, 2, 2, seed=3))

    def function(x: Tensor, conv: Tensor, ssm: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, parameters, strict=True))
        y, after = torch.func.functional_call(mixer, named, (x, NOWHERE, Mamba2State(conv, ssm)))
        return y, *after

    inputs = [t.detach().requires_grad_() for t in (x, *state, *mixer.parameters())]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pieces", [[150], [80, 1, 69]])
def test_other_dtypes_stay_close(dtype: torch.dtype, pieces: list[int]) -> None:
    """The parameters stay in float32, x brings the dtype."""
    mixer, x = make_mixer(torch.float32), draw(2, 150, 16, seed=1)
    exact, _ = make_mixer(F64)(x, NOWHERE, None)
    with torch.no_grad():
        y, state = read(mixer, x.to(dtype), pieces)
    assert y.dtype == state.conv_BUC.dtype == dtype and state.ssm_BHPN.dtype == torch.float32
    assert all(t.is_contiguous() for t in state)  # as a file wants it
    assert (y - exact).norm() < (2e-2 if dtype == torch.bfloat16 else 2e-6) * exact.norm()


def test_sequences_do_not_touch() -> None:
    mixer = make_mixer()
    x = draw(3, 70, 16, seed=1)
    y, state = mixer(x, NOWHERE, None)
    for i in range(3):
        alone, alone_state = mixer(x[i : i + 1], NOWHERE, None)
        assert_same((alone, *alone_state), (y[i : i + 1], *(t[i : i + 1] for t in state)))


def test_a_later_token_does_not_change_an_earlier_output() -> None:
    mixer, x = make_mixer(), draw(1, 70, 16, seed=1)
    y, _ = mixer(x, NOWHERE, None)
    x[:, 40] += 1.0
    changed, _ = mixer(x, NOWHERE, None)
    assert torch.equal(changed[:, :40], y[:, :40]) and not torch.equal(changed[:, 40:], y[:, 40:])


def test_memory_is_linear_in_tokens() -> None:
    """What is kept for the backward pass."""
    mixer = make_mixer(torch.float32)

    def kept(tokens: int) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes), lambda _: None):
            mixer(draw(1, tokens, 16, dtype=torch.float32), NOWHERE, None)
        return sum(sizes)

    assert kept(2048) < 2.05 * kept(1024)


def test_it_compiles_in_one_piece() -> None:
    mixer, x = make_mixer(), draw(1, 70, 16, seed=1)
    _, state = mixer(x, NOWHERE, None)
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    for piece in (x, x[:, :1]):
        y, after = mixer(piece, NOWHERE, state)
        y_compiled, after_compiled = compiled(piece, NOWHERE, state)
        assert_same((y_compiled, *after_compiled), (y, *after))


def test_initial_values() -> None:
    """The released code's: decays and steps from their ranges, D one, matrices with the model's deviation."""
    mixer = Mamba2(mamba_config(hidden_size=512, num_attention_heads=64))
    mixer.reset_parameters(0.02, torch.Generator().manual_seed(0))
    a, dt = mixer.a_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert 1 <= a.min() < 3 and 14 < a.max() <= 16
    assert 0.00099 < dt.min() < 0.002 and 0.05 < dt.max() < 0.1001
    assert torch.all(mixer.d_skip == 1) and torch.all(mixer.norm == 1)
    assert 0.45 < mixer.conv_weight.abs().max() <= 0.5 and 0.45 < mixer.conv_bias.abs().max() <= 0.5
    assert all(w.std().item() == pytest.approx(0.02, rel=0.05) for w in (mixer.w_in, mixer.w_out))
    assert set(mixer.no_weight_decay) <= {name for name, _ in mixer.named_parameters()}


# -- mamba-ssm's kernel ------------------------------------------------------------------------------------------------


def fake_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:
    """`mamba_chunk_scan_combined` with its arguments as mamba-ssm names, orders and shapes them."""
    batch, tokens, heads, width = x.shape
    assert dt.shape == (batch, tokens, heads) and A.shape == (heads,) and dt.dtype == A.dtype == torch.float32
    assert B.shape == C.shape == (batch, tokens, *B.shape[2:]) and heads % B.shape[2] == 0
    assert x.dtype == B.dtype == C.dtype and x.stride(-1) == B.stride(-1) == C.stride(-1) == 1
    assert chunk_size & (chunk_size - 1) == 0
    assert initial_states is not None and initial_states.shape == (batch, heads, width, B.shape[3])
    assert D is z is dt_bias is seq_idx is cu_seqlens is None and not dt_softplus and not return_varlen_states
    y, state = ssd_reference(x, dt, A, B, C, initial_states)
    return (y, state) if return_final_states else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_called_as_it_wants(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return fake_scan(*args, **kwargs)

    x, mixer = draw(2, 40, 16, seed=1, dtype=dtype), make_mixer(torch.float32, mamba2__n_groups=2)
    with torch.no_grad():
        expected, last = read(mixer, x, [20, 1, 19])
        monkeypatch.setattr(KernelLibrary, "choose", lambda self, kernels, x: (counted,))
        y, state = read(mixer, x, [20, 1, 19])
    assert len(calls) == 2  # not for the single token
    assert_same((y, *state), (expected, *last), 2e-2 if dtype == torch.bfloat16 else 1e-5)
