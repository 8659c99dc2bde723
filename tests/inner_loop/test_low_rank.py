"""Fast weights of low rank: against a twin that forms every sequence's matrices, and as people use them."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_config, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ttt_e2e.cli import main as cli
from ttt_e2e.data.text import Document
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.evaluation.documents import evaluate_documents
from ttt_e2e.inference import session as session_module
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.streaming import read_mini_batch, start_reading
from ttt_e2e.inner_loop.compiled import compiled_functions
from ttt_e2e.inner_loop.functions import EAGER
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.inner_loop.step import inner_gradient_reference, inner_step
from ttt_e2e.model.checkpoint import load_transformer, save_model
from ttt_e2e.model.cost import fast_weights, state_bytes
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.ops.derivatives import definitions
from ttt_e2e.ops.elementwise import ACTIVATIONS, glu_reference
from ttt_e2e.ops.fast_mlp import FastWeights, LowRankWeights, low_rank_mlp
from ttt_e2e.ops.linear import weight_gradient

F64 = torch.float64
RANKS = {
    "in turn": {"fast_rank": 3},
    "parallel": {"fast_rank": 2, "parallel_mlp": True, "suffix_intermediate_size": 14},
}


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randint(50, (batch, length + 1), generator=torch.Generator().manual_seed(0))


# -- the operator ------------------------------------------------------------------------------------------------------


Multiplied = Callable[[Tensor, bool], tuple[Tensor | None, list[Tensor]]]


def multiplied_out(
    x_BTD: Tensor, fast: LowRankWeights, w_in_ED: Tensor, w_out_DF: Tensor, activation: str
) -> tuple[Tensor, Multiplied]:
    out_BTD, vjp = low_rank_mlp(x_BTD, fast, w_in_ED, w_out_DF, activation)

    def whole(g_BTD: Tensor, below: bool) -> tuple[Tensor | None, list[Tensor]]:
        dx_BTD, factors = vjp(g_BTD, below)
        return dx_BTD, [weight_gradient(*pair) for pair in factors]

    return out_BTD, whole


def by_whole_matrices(
    x_BTD: Tensor, fast: LowRankWeights, w_in_ED: Tensor, w_out_DF: Tensor, activation: str
) -> tuple[Tensor, Multiplied]:
    """The plain twin: every sequence's own sum is formed, and autograd gives all gradients."""
    w_in_BED = w_in_ED + fast.up_in_BER @ fast.down_in_BRD
    w_out_BDF = w_out_DF + fast.up_out_BDR @ fast.down_out_BRF
    out_BTD = glu_reference(x_BTD @ w_in_BED.mT, activation)[0] @ w_out_BDF.mT

    def vjp(g_BTD: Tensor, below: bool) -> tuple[Tensor | None, list[Tensor]]:
        dx_BTD, *gradient = torch.autograd.grad(out_BTD, (x_BTD, *fast), g_BTD, create_graph=True)
        return dx_BTD if below else None, gradient

    return out_BTD, vjp


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5)),
    seed=st.integers(0, 2**31),
    below=st.booleans(),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
def test_the_operator_equals_its_twin(sizes: tuple[int, ...], seed: int, below: bool, activation: str) -> None:
    """Value, pull and gradient, and the gradient of the pull in everything, W among it."""
    (b, t, d, f, r), generator = sizes, torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64, requires_grad=True)

    x, w_in, w_out, g = drawn(b, t, d), drawn(2 * f, d), drawn(d, f), drawn(b, t, d)
    fast = LowRankWeights(drawn(b, 2 * f, r), drawn(b, r, d), drawn(b, d, r), drawn(b, r, f))
    given_to = (x, w_in, w_out, g, *fast)
    found = []
    for function in (multiplied_out, by_whole_matrices):
        out, vjp = function(x, fast, w_in, w_out, activation)
        dx, gradient = vjp(g, below)
        assert (dx is None) != below and len(gradient) == len(fast)
        pulled = [*gradient] if dx is None else [dx, *gradient]
        first = torch.autograd.grad(out, given_to, g.detach(), retain_graph=True, allow_unused=True)
        weights = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=F64) for p in pulled]
        second = torch.autograd.grad(pulled, given_to, weights, allow_unused=True, materialize_grads=True)
        found.append([out, *pulled, *(t for t in first if t is not None), *second])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", RANKS)
@pytest.mark.parametrize("recompute", ["none", "sqrt"])
def test_the_outer_gradient_equals_that_of_whole_matrices(shape: str, recompute: Any) -> None:
    """Through all inner steps: the chain of pulls, against autograd's inner gradient of materialised matrices."""

    def by_reference(*arguments: Any) -> Any:
        return inner_step(*arguments, inner_gradient_reference)

    model = small_model(F64, **RANKS[shape])
    out = sequence_loss(model, tokens(23), dtype=F64, activation_checkpointing=recompute)
    ours = torch.autograd.grad(out.loss, tuple(model.parameters()))
    with definitions(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("ttt_e2e.model.block.low_rank_mlp", by_whole_matrices)
        plain = sequence_loss(model, tokens(23), dtype=F64, functions=EAGER._replace(inner_step=by_reference))
        theirs = torch.autograd.grad(plain.loss, tuple(model.parameters()))
    torch.testing.assert_close(out.nll_BT, plain.nll_BT, rtol=1e-11, atol=1e-11)
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_bfloat16_is_near() -> None:
    model = small_model(fast_rank=3, hidden_size=32, initializer_range=0.1)
    exact, rounded = (sequence_loss(model, tokens(25), dtype=d) for d in (torch.float32, torch.bfloat16))
    torch.testing.assert_close(rounded.nll_BT, exact.nll_BT, rtol=0.02, atol=0.08)


# -- the model ---------------------------------------------------------------------------------------------------------


def test_it_begins_as_the_model_without() -> None:
    """Equal weights from an equal seed, equal predictions before the first update; down's rows are about one long."""
    drawn = [
        Transformer(small_config(hidden_size=64, fast_rank=rank), torch.Generator().manual_seed(0))
        for rank in (None, 8)
    ]
    whole, low = (dict(model.named_parameters()) for model in drawn)
    assert set(low) - set(whole) == {
        f"blocks.{i}.fast.{name}" for i in (2, 3) for name in ("up_in", "down_in", "up_out", "down_out")
    }
    assert all(torch.equal(low[name], whole[name]) for name in whole)
    for name in set(low) - set(whole):
        lengths = low[name].detach().norm(dim=1)
        assert lengths.max() == 0 if ".up_" in name else abs(float(lengths.mean()) - 1) < 0.3
    losses = [sequence_loss(model, tokens(25)).nll_BT for model in drawn]
    torch.testing.assert_close(losses[0][:, :5], losses[1][:, :5], rtol=1e-6, atol=1e-6)
    assert (losses[0][:, 5:] - losses[1][:, 5:]).abs().max() > 1e-3


def test_the_first_step_is_that_of_the_matrix_as_far_as_down_reaches() -> None:
    """With as many rows as there are directions, orthogonal and of length one, nothing is lost."""
    whole = small_model(F64, suffix_layers=1, intermediate_size=16, inner_loop__max_grad_norm=0.5)
    low = small_model(F64, suffix_layers=1, intermediate_size=16, inner_loop__max_grad_norm=0.5, fast_rank=16)
    shared = dict(whole.named_parameters())
    with torch.no_grad():
        for name, weight in low.named_parameters():
            if name in shared:
                weight.copy_(shared[name])
            elif ".down_" in name:
                weight.copy_(torch.linalg.qr(torch.randn(16, 16, dtype=F64))[0])
            else:
                weight.zero_()
    text = tokens(5)
    norms, learned = [], []
    for model in (whole, low):
        state, _, norm_B = read_mini_batch(model, start_reading(model, 2, F64), text[:, :-1], text[:, 1:], dtype=F64)
        norms.append(norm_B)
        learned.append(state.loop.fast[0])
    (full, factors), mlp = learned, low.suffix[0].fast
    assert isinstance(full, FastWeights) and isinstance(factors, LowRankWeights)
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-10, atol=0)
    for matrix, start, up, down in zip(full, (mlp.w_in, mlp.w_out), factors[::2], factors[1::2], strict=True):
        torch.testing.assert_close(start + up @ down, matrix, rtol=1e-10, atol=1e-12)
        assert (matrix - start).abs().max() > 1e-3


# -- what people use ---------------------------------------------------------------------------------------------------

TEXT = "The rain had stopped; the street was still wet. Nobody came, and the lamps burned on.\n" * 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 280)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    return small_model(vocab_size=tokenizer.vocab_size, fast_rank=3, inner_loop__lr=0.3).eval().requires_grad_(False)


def numbers(text: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50, text)


def test_a_session_is_saved_forked_and_written_on(tmp_path: Path, model: Transformer) -> None:
    session = Session(model)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    session.read(numbers()[:40])
    fork = session.fork()
    session.save(tmp_path / "s")
    loaded = Session.load(tmp_path / "s", model)
    expected = session.read(numbers()[40:])
    frozen = Session(model, learn=False).read(numbers())
    assert np.abs(expected[:5] - frozen[35:40]).max() > 1e-3  # what was learned shows
    assert list(loaded.generate_tokens(max_tokens=9)) == list(fork.generate_tokens(max_tokens=9))
    for other in (fork, loaded):
        assert np.array_equal(other.read(numbers()[40:]), expected)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name
    info, caches = session.info(), 4 * 2 * 4 * 12 * 16
    assert info.memory_bytes == 4 * fast_weights(model.config) + caches == state_bytes(model.config, 60)
    pairs = zip(session.state().read_state.loop.fast, model.initial_fast_weights(1), strict=True)
    squares = [(w - w0).square().sum() for now, start in pairs for w, w0 in zip(now, start, strict=True)]
    assert info.learned_norm == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-5)
    assert info.learned_norm > 0.01


@pytest.mark.parametrize(("precision", "rounding"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_half_precision_keeps_half(tmp_path: Path, model: Transformer, precision: Any, rounding: float) -> None:
    session = Session(model)
    session.read(numbers())
    session.save(tmp_path / "whole")
    session.save(tmp_path / "half", precision)
    sizes = [(tmp_path / name).stat().st_size for name in ("whole", "half")]
    assert sizes[0] - sizes[1] == pytest.approx(2 * fast_weights(model.config), abs=200)
    loaded = Session.load(tmp_path / "half", model)
    values = (s.state().read_state.loop.fast for s in (session, loaded))
    for now, back, start in zip(*values, model.initial_fast_weights(1), strict=True):
        for w, v, w0 in zip(now, back, start, strict=True):
            assert ((w - v).abs() <= rounding * (w - w0).abs() + 3e-7 * w.abs() + 1e-7).all()


def test_a_session_takes_less(tmp_path: Path) -> None:
    """Files of the same text: what is not fast weights is the same, the rest is as much as the rank says."""
    sizes, memory, weights = [], [], []
    for rank in (None, 2):
        model = small_model(fast_rank=rank, intermediate_size=400).requires_grad_(False)
        session = Session(model)
        session.read(numbers())
        session.save(tmp_path / "s")
        sizes.append((tmp_path / "s").stat().st_size)
        memory.append(session.info().memory_bytes)
        weights.append(4 * fast_weights(model.config))
    assert weights == [4 * 2 * 3 * 16 * 400, 4 * 2 * 2 * (3 * 400 + 2 * 16)]
    assert memory[0] - memory[1] == weights[0] - weights[1] == pytest.approx(sizes[0] - sizes[1], abs=1000)
    assert sizes[1] < sizes[0] / 4


def test_compiled_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model = small_model(num_hidden_layers=2, fast_rank=3, inner_loop__lr=0.3).eval().requires_grad_(False)
    monkeypatch.setattr(session_module, "compiled_functions", lambda device: compiled_functions(device, "aot_eager"))
    plain, compiled = Session(model), Session(model, compile=True)
    assert compiled.compiled
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Continuing without compilation")
        np.testing.assert_allclose(compiled.read(numbers()), plain.read(numbers()), atol=1e-4)
    assert compiled.info().learned_norm == pytest.approx(plain.info().learned_norm, rel=1e-4)


def test_whole_documents_at_once(model: Transformer, tokenizer: Tokenizer) -> None:
    documents = [Document(f"d{i}", TEXT[:size]) for i, size in enumerate((400, 90, 250))]
    report = evaluate_documents(model, tokenizer, documents, batch=3, progress=False)
    for result, document in zip(report.documents, documents, strict=True):
        session = Session(model, tokenizer)
        alone = np.concatenate((session.read(document.text), session.score_pending()))
        assert result.loss == pytest.approx(alone.mean(), abs=1e-5)


def test_info_on_the_command_line(tmp_path: Path, model: Transformer, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(model, tmp_path / "model", None)
    assert load_transformer(tmp_path / "model").config == model.config
    assert cli.main(["info", str(tmp_path / "model"), "--json"]) == 0
    assert f'"fast_weights": {fast_weights(model.config)}' in capsys.readouterr().out
