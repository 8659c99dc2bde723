"""TTT-KVB and Titans against their recurrences, token by token with autograd's own gradients, and the mixers' laws."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import make_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ttt_e2e.model.mixers.base import Mixer, Positions
from ttt_e2e.model.mixers.memory import gradients, scan_coefficients
from ttt_e2e.model.mixers.titans import Titans
from ttt_e2e.model.mixers.ttt_kvb import TTTKVB
from ttt_e2e.ops.fast_mlp import FastWeights, fast_mlp

F64 = torch.float64
KINDS = {"ttt-kvb": TTTKVB, "titans": Titans}
SMALL = dict(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    sliding_window=10,
    mini_batch_size=5,
    memory__intermediate_size=12,
)


def make(kind: str, dtype: torch.dtype = F64, seed: int = 0, **changes: Any) -> Mixer:
    """A mixer with matrices large, vectors off their initial values, and steps that are worth something."""
    generator = torch.Generator().manual_seed(seed)
    config = make_config(**{**SMALL, "pattern": (kind,), "memory.num_persistent_tokens": 3, **changes})
    mixer = KINDS[kind](config)
    mixer.reset_parameters(0.3, generator)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if parameter.dim() == 1:
                scale = 1.0 if name.endswith("bias") else 0.1
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        if kind == "titans":
            mixer.steps_bias[-config.num_attention_heads :] += 10  # else next to nothing is forgotten
    return mixer.to(dtype)


def text(length: int, batch: int = 2, seed: int = 0, width: int = 16) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed), dtype=F64)


def positions(start: int, length: int, head_width: int = 8, dtype: torch.dtype = F64) -> Positions:
    frequency = 100.0 ** -(torch.arange(head_width // 2, dtype=F64) / head_width)
    angle = torch.arange(start, start + length, dtype=F64)[:, None, None] * frequency
    return Positions(angle.cos().to(dtype), angle.sin().to(dtype))


def read(mixer: Mixer, x_BTD: Tensor, sizes: list[int] | None = None, state: Any = None, start: int = 0) -> Any:
    """The outputs and the last state of x read in pieces."""
    outputs = []
    head_width = mixer.config.head_dim  # type: ignore[union-attr]
    wide = F64 if x_BTD.dtype == F64 else torch.float32
    for piece in x_BTD.split(sizes or [x_BTD.shape[1]], 1):
        y, state = mixer(piece, positions(start, piece.shape[1], head_width, wide), state)
        outputs.append(y)
        start += piece.shape[1]
    return torch.cat(outputs, 1), state


def assert_same(a: Any, b: Any, tolerance: float = 1e-9) -> None:
    """Two pairs of outputs and state."""
    for x, y in zip((a[0], *a[1]), (b[0], *b[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# -- the literal recurrences: one sequence, one head, one token at a time ----------------------------------------------


def unit(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def by_heads(x: Tensor, heads: int = 2) -> Tensor:
    return x.reshape(heads, -1)


class LiteralMemory:
    """One head's M_t and S_t (arXiv 2501.00663, equations 13 and 14); `frozen` is M at the last border."""

    def __init__(self, w_in: Tensor, w_out: Tensor, mini_batch: int) -> None:
        self.weights, self.momentum = [w_in, w_out], [torch.zeros_like(w_in), torch.zeros_like(w_out)]
        self.frozen, self.frozen_momentum = self.weights, self.momentum
        self.mini_batch, self.seen = mini_batch, 0

    def f(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        gate, value = (weights[0] @ x).chunk(2)
        return weights[1] @ (F.silu(gate) * value)

    def read(self, query: Tensor) -> Tensor:
        return self.f(query, self.frozen)

    def learn(self, key: Tensor, value: Tensor, theta: Tensor, eta: Tensor | float, alpha: Tensor | float) -> None:
        variables = [w.detach().requires_grad_() for w in self.frozen]
        with torch.enable_grad():
            loss = 0.5 * (self.f(key, variables) - value).pow(2).sum()
        gradient = torch.autograd.grad(loss, variables)
        rho = sum(g.pow(2).sum() for g in gradient) / (2 * loss.detach() + 1e-12)
        theta = theta / (len(key) + rho)
        self.momentum = [eta * s - theta * g for s, g in zip(self.momentum, gradient, strict=True)]
        self.weights = [(1 - alpha) * m + s for m, s in zip(self.weights, self.momentum, strict=True)]
        self.seen += 1
        if self.seen % self.mini_batch == 0:
            self.frozen, self.frozen_momentum = self.weights, self.momentum


def literal_memories(mixer: Any) -> list[LiteralMemory]:
    return [
        LiteralMemory(*w, mixer.config.mini_batch_size) for w in zip(mixer.memory.w_in, mixer.memory.w_out, strict=True)
    ]


def literal_ttt_kvb(mixer: Any, x_TD: Tensor, at: Positions) -> tuple[Tensor, list[LiteralMemory]]:
    config = mixer.config
    memories, outputs = literal_memories(mixer), []
    largest = config.memory.lr / config.mini_batch_size
    for x_D in x_TD:
        q_HK, k_HK, v_HK = (unit(by_heads(w @ x_D)) for w in mixer.w_qkv.chunk(3))
        theta_H = largest * torch.sigmoid(mixer.w_step @ x_D + mixer.step_bias)
        gave_HK = torch.stack([memory.read(q) for memory, q in zip(memories, q_HK, strict=True)])
        outputs.append(mixer.w_out @ unit(gave_HK, mixer.read_norm).flatten())
        for memory, k, v, theta in zip(memories, k_HK, v_HK, theta_H, strict=True):
            memory.learn(k, v, theta, 0.0, 0.0)
    return mixer.attention(x_TD[None], at, None)[0][0] + torch.stack(outputs), memories


def literal_titans(mixer: Any, x_TD: Tensor, at: Positions) -> tuple[Tensor, list[LiteralMemory]]:
    config = mixer.config
    memories, outputs = literal_memories(mixer), []
    q_weight, k_weight = (mixer.q_norm, mixer.k_norm) if config.qk_norm else (None, None)
    w_k, w_v = mixer.w_kv.chunk(2)
    largest = config.memory.lr / config.mini_batch_size

    def norm(x_HK: Tensor, weight: Tensor | None) -> Tensor:
        return x_HK if weight is None else unit(x_HK, weight)

    def turned(x_HK: Tensor, t: int) -> Tensor:
        a, b = x_HK.chunk(2, -1)
        return torch.cat((a * at.cos[t] - b * at.sin[t], a * at.sin[t] + b * at.cos[t]), -1)

    # Pairs of a key and a value, [H, K] each.
    persistent = list(zip(norm(mixer.persistent_k, k_weight).unbind(1), mixer.persistent_v.unbind(1), strict=True))
    segment: list[tuple[Tensor, Tensor]] = []
    for t, x_D in enumerate(x_TD):
        if t % config.sliding_window == 0:
            segment = []
        context_HK = unit(by_heads(mixer.w_context @ x_D))
        h_HK = torch.stack([memory.read(q) for memory, q in zip(memories, context_HK, strict=True)])
        h_D = unit(h_HK, mixer.context_norm).flatten()
        for token_D in (h_D, x_D):
            segment.append((turned(norm(by_heads(w_k @ token_D), k_weight), t), by_heads(w_v @ token_D)))
        keys, values = (torch.stack(list(s), 1) for s in zip(*persistent, *segment, strict=True))  # [H, S, K]
        q_HK = turned(norm(by_heads(mixer.w_q @ x_D), q_weight), t)
        p_HS = torch.softmax((keys @ q_HK[:, :, None])[..., 0] / math.sqrt(config.head_dim), -1)
        y_D = (p_HS[:, None] @ values).flatten()

        q_HK, k_HK, v_HK = (unit(by_heads(w @ y_D)) for w in mixer.w_memory.chunk(3))
        m_HK = torch.stack([memory.read(q) for memory, q in zip(memories, q_HK, strict=True)])
        outputs.append(mixer.w_out @ (y_D * torch.sigmoid(unit(m_HK, mixer.gate_norm).flatten())))
        step_H, eta_H, alpha_H = torch.sigmoid(mixer.w_steps @ x_D + mixer.steps_bias).chunk(3)
        theta_H = largest * step_H * (1 - eta_H)
        for memory, *own in zip(memories, k_HK, v_HK, theta_H, eta_H, alpha_H, strict=True):
            memory.learn(*own)
    return torch.stack(outputs), memories


LITERAL = {"ttt-kvb": literal_ttt_kvb, "titans": literal_titans}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no norms on heads": {"qk_norm": False},
    "nothing persistent": {"memory.num_persistent_tokens": 0},
    "one mini-batch a window": {"sliding_window": 5},
    "mini-batches of one token": {"mini_batch_size": 1, "sliding_window": 4},
    "large steps": {"memory.lr": 2.0},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [3, 20, 33])
def test_the_literal_recurrence(kind: str, shape: str, length: int) -> None:
    mixer = make(kind, **SHAPES[shape])
    x_BTD = text(length)
    y_BTD, state = read(mixer, x_BTD)
    for row, x_TD in enumerate(x_BTD):
        with torch.no_grad():
            y_TD, memories = LITERAL[kind](mixer, x_TD, positions(0, length))
        torch.testing.assert_close(y_BTD[row], y_TD, rtol=1e-9, atol=1e-9)
        for head, memory in enumerate(memories):
            ours = [state.w_in_BHEK, state.w_out_BHKF]
            theirs = list(memory.frozen)
            if kind == "titans":
                ours += [state.momentum_in_BHEK, state.momentum_out_BHKF]
                theirs += memory.frozen_momentum
            for w, v in zip(ours, theirs, strict=True):
                torch.testing.assert_close(w[row, head], v, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 40), seed=st.integers(0, 999), zeros=st.booleans())
def test_shares_are_the_running_sums(length: int, seed: int, zeros: bool) -> None:
    """On scalars in place of matrices, factors of 0 and 1 included."""
    generator = torch.Generator().manual_seed(seed)
    theta, eta, keep, gradient = torch.rand(4, length, generator=generator, dtype=F64)
    if zeros:
        eta, keep = (x.mul(3).sub(1).clamp(0, 1) for x in (eta, keep))
    m, s = torch.randn(2, generator=generator, dtype=F64)
    ours = scan_coefficients(theta, eta, keep)
    new_m = ours.weights * m + ours.carried * s - (ours.in_weights * gradient).sum()
    new_s = ours.momentum * s - (ours.in_momentum * gradient).sum()
    for t in range(length):
        s = eta[t] * s - theta[t] * gradient[t]
        m = keep[t] * m + s
    torch.testing.assert_close(torch.stack((new_m, new_s)), torch.stack((m, s)), rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(list(KINDS)), sizes=st.lists(st.integers(1, 14), min_size=1, max_size=6))
def test_any_split_gives_the_same(kind: str, sizes: list[int]) -> None:
    mixer, x_BTD = make(kind), text(sum(sizes))
    with torch.no_grad():
        assert_same(read(mixer, x_BTD, sizes), read(mixer, x_BTD))


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_gives_the_same(kind: str) -> None:
    mixer, x_BTD = make(kind), text(27)
    with torch.no_grad():
        assert_same(read(mixer, x_BTD, [1] * 27), read(mixer, x_BTD))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [5, 18])
def test_a_state_can_be_gone_on_from_twice(kind: str, length: int) -> None:
    mixer, x_BTD = make(kind), text(31)
    with torch.no_grad():
        _, state = read(mixer, x_BTD[:, :length])
        before = [t.clone() for t in state]
        rest = x_BTD[:, length:]
        first = read(mixer, rest, [1] * rest.shape[1], state, length)
        assert_same(first, read(mixer, rest, None, state, length))
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    assert all(len(t) == 2 for t in state)


@pytest.mark.parametrize("kind", KINDS)
def test_every_sequence_is_read_alone(kind: str) -> None:
    mixer, x_BTD = make(kind), text(23, batch=3)
    y_BTD, state = read(mixer, x_BTD)
    for row in range(3):
        assert_same(read(mixer, x_BTD[row : row + 1]), (y_BTD[row : row + 1], [t[row : row + 1] for t in state]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 6])
def test_gradcheck(kind: str, length: int) -> None:
    """Finite differences in every parameter, the tokens and the state, through three updates and over a border."""
    mixer = make(
        kind,
        hidden_size=4,
        num_attention_heads=2,
        sliding_window=4,
        mini_batch_size=2,
        memory__intermediate_size=3,
        memory__num_persistent_tokens=1,
    )
    names = [name for name, _ in mixer.named_parameters()]
    with torch.no_grad():
        _, state = read(mixer, text(3, 1, width=4))
    used = [i for i, t in enumerate(state) if t.numel()]

    def run(x_BTD: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        parts = list(state)
        for i, t in zip(used, values[: len(used)], strict=True):
            parts[i] = t
        parameters = dict(zip(names, values[len(used) :], strict=True))
        args = (x_BTD, positions(3, length, 2), mixer.State(*parts))
        y_BTD, after = torch.func.functional_call(mixer, parameters, args)
        return y_BTD, *after

    variables = [text(length, 1, seed=1, width=4), *(state[i] for i in used), *mixer.parameters()]
    assert torch.autograd.gradcheck(run, [v.detach().requires_grad_() for v in variables])


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_learned_through_the_updates(kind: str) -> None:
    """What only the updates use gets a gradient, and the memory's start one that the updates have part in."""
    mixer, x_BTD = make(kind), text(15)
    read(mixer, x_BTD)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in mixer.parameters())
    through = mixer.memory.w_in.grad.clone()  # type: ignore[union-attr]
    mixer.zero_grad()
    still = make(kind, memory__lr=0.0)
    read(still, x_BTD)[0].square().sum().backward()
    assert not (still.step_bias if kind == "ttt-kvb" else still.steps_bias).grad[:2].any()
    assert not torch.allclose(through, still.memory.w_in.grad, rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_dtypes_stay_near(kind: str, dtype: torch.dtype) -> None:
    mixer = make(kind)
    x_BTD = text(33).to(dtype)
    exact, exact_state = read(mixer, x_BTD.double())
    mixer.float()
    y_BTD, state = read(mixer, x_BTD)
    assert y_BTD.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (y_BTD.double() - exact).norm() < tolerance * exact.norm()
    for name, ours, theirs in zip(state._fields, state, exact_state, strict=True):
        tokens = name.startswith(("k_", "v_", "pending_k_", "pending_v_"))
        assert ours.dtype == (dtype if tokens else torch.float32)
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
    y_BTD.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in mixer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_learns_what_it_reads(kind: str) -> None:
    """From the initial values of a new model, one mini-batch after another of the same tokens."""
    for b in (5, 64, 256):
        config = make_config(**{**SMALL, "pattern": (kind,), "mini_batch_size": b, "sliding_window": 2 * b})
        mixer = KINDS[kind](config)
        mixer.reset_parameters(0.02, torch.Generator().manual_seed(0))
        x_BTD = text(b).float()
        with torch.no_grad():
            _, state = read(mixer, x_BTD[:, :-1])
            pairs = state.pending_k_BHPK, state.pending_v_BHPK
            losses = [reconstruction(state, *pairs)]
            for _ in range(4):
                _, state = read(mixer, x_BTD, None, state if state.pending_k_BHPK.shape[2] == 0 else None)
                losses.append(reconstruction(state, *pairs))
        assert losses == sorted(losses, reverse=True), losses
        assert losses[-1] < 0.95 * losses[0]


def reconstruction(state: Any, k_BHTK: Tensor, v_BHTK: Tensor) -> float:
    gate, value = (k_BHTK @ state.w_in_BHEK.mT).chunk(2, -1)
    return ((F.silu(gate) * value) @ state.w_out_BHKF.mT - v_BHTK).square().mean().item()


@pytest.mark.parametrize("b", [1, 5, 64, 1024])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_largest_step_does_not_overshoot(b: int, scale: float) -> None:
    """On the hardest mini-batch for it, one of equal tokens, with weights of any size."""
    draw = torch.Generator().manual_seed(0)
    key, value = (unit(torch.randn(3, 1, 8, generator=draw)).expand(-1, b, -1) for _ in "kv")
    fast = FastWeights(*(scale * torch.randn(3, *s, generator=draw) * s[1] ** -0.5 for s in ((64, 8), (8, 32))))
    losses = []
    for _ in range(20):
        y, _ = fast_mlp(key, fast)
        losses.append((y - value).square().mean((1, 2)))
        (step,) = gradients(fast, key, value, torch.full((3, b), 1.0 / b))
        fast = FastWeights(*(w - g for w, g in zip(fast, step, strict=True)))
    assert all((after <= before + 1e-9).all() for before, after in itertools.pairwise(losses))
    assert (losses[-1] < 0.5 * losses[0]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_alone_costs_a_token(kind: str) -> None:
    mixer, x_BTD = make(kind, torch.float32, sliding_window=64, mini_batch_size=64), text(65).float()
    with torch.no_grad():
        _, state = read(mixer, x_BTD[:, :40])
        with FlopCounterMode(display=False) as one:
            read(mixer, x_BTD[:, 40:41], None, state, 40)
        with FlopCounterMode(display=False) as many:
            read(mixer, x_BTD[:, 40:60], None, state, 40)
    assert 15 * one.get_total_flops() < many.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_in_one_graph(kind: str) -> None:
    mixer, x_BTD, at = make(kind, sliding_window=10), text(12), positions(0, 12)
    expected = mixer(x_BTD, at, None)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")(x_BTD, at, None)
    assert_same(compiled, expected)
    ours, theirs = (torch.autograd.grad(y.square().sum(), list(mixer.parameters())) for y in (compiled[0], expected[0]))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_values(kind: str) -> None:
    config = make_config(**{**SMALL, "pattern": (kind,), "hidden_size": 128, "memory.intermediate_size": 256})
    mixer = KINDS[kind](config)
    mixer.reset_parameters(0.02, torch.Generator().manual_seed(0))
    memory: Any = mixer.memory
    assert memory.w_in.std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert memory.w_out.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert mixer.w_out.std().item() == pytest.approx(0.02, rel=0.05)  # type: ignore[operator]
    assert all(isinstance(getattr(mixer, name), torch.nn.Parameter) for name in mixer.no_weight_decay)
    with torch.no_grad():
        _, state = read(mixer, text(1, width=128).float())
    assert state.pending_theta_BHP.mul(5).max().item() < 0.6  # about half, or momentum's share of that
