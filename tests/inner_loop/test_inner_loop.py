"""The inner loop and its outer gradients, in float64 on small models of every shape."""

import pytest
import torch
from helpers import GEMMA, small_config, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ttt_e2e.inference.session import Session
from ttt_e2e.inference.streaming import forward, read_mini_batch, start_reading
from ttt_e2e.inner_loop.functions import EAGER
from ttt_e2e.inner_loop.meta_loss import mini_batch_mean, sequence_loss
from ttt_e2e.inner_loop.recompute import RecomputedLoop
from ttt_e2e.inner_loop.step import InnerLoopState, MiniBatch, inner_gradient_reference, inner_step
from ttt_e2e.model.block import MLP
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.ops.derivatives import definitions
from ttt_e2e.ops.elementwise import Vjp

F64 = torch.float64
SHAPES = {
    "plain": {},
    "grouped heads": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "untied head": {"tie_word_embeddings": False},
    "no norms around": {"pre_norm": False, "post_norm": False, "initializer_range": 0.1},
    "no norms on heads": {"qk_norm": False},
    "full attention": {"pattern": ("full",)},
    "one suffix block": {"suffix_layers": 1},
    "all suffix": {"suffix_layers": 4},
    "window no multiple of b": {"sliding_window": 7},
    "small clip": {"inner_loop.max_grad_norm": 0.05},
    "wide heads and biases": {
        "head_dim": 6,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "attention_out_bias": True,
    },
    "sinks": {"attention_sink": True, "sliding_window": 7, "num_attention_heads": 4, "num_key_value_heads": 2},
    "widths of their own": {"fast_intermediate_size": 10, "suffix_intermediate_size": 14},
    "parallel MLPs": {"parallel_mlp": True, "fast_intermediate_size": 10, "suffix_intermediate_size": 14},
    "parallel MLPs as in Llama 3": {
        "parallel_mlp": True,
        "qk_norm": False,
        "post_norm": False,
        "rope_scaling.rope_type": "llama3",
        "rope_scaling.factor": 8.0,
        "rope_scaling.original_max_position_embeddings": 16,
        "rope_theta": 100.0,
    },
    "YaRN": {
        "rope_scaling.rope_type": "yarn",
        "rope_scaling.factor": 4.0,
        "rope_scaling.original_max_position_embeddings": 16,
        "rope_scaling.high_freq_factor": 32.0,
        "rope_scaling.attention_factor": 1.1,
    },
    "low rank": {"fast_rank": 3},
    "low rank, one suffix block": {"fast_rank": 1, "suffix_layers": 1, "inner_loop.max_grad_norm": 0.05},
    "low rank, parallel MLPs": {
        "fast_rank": 2,
        "parallel_mlp": True,
        "fast_intermediate_size": 10,
        "suffix_intermediate_size": 14,
    },
    "as in Gemma": {**GEMMA, "attention_sink": True, "num_key_value_heads": 1},
    "learned rates": {"inner_loop.learned_lr": True, "inner_loop.max_grad_norm": 0.5},
    "learned rates, low rank": {"inner_loop.learned_lr": True, "fast_rank": 2, "suffix_layers": 1},
}


def tokens(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(50, (batch, length + 1), generator=torch.Generator().manual_seed(seed))


def gradient(model: Transformer, text: Tensor, **options: object) -> tuple[float, Tensor]:
    model.zero_grad()
    out = sequence_loss(model, text, dtype=F64, **options)  # type: ignore[arg-type]
    out.loss.backward()
    return out.loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [23, 25])
def test_recomputation_gives_the_same_gradient(shape: str, length: int) -> None:
    model = small_model(F64, **SHAPES[shape])
    plain = gradient(model, tokens(length), bos=3)
    for recompute in ("mini-batch", "sqrt"):
        loss, grad = gradient(model, tokens(length), bos=3, activation_checkpointing=recompute)
        assert loss == pytest.approx(plain[0], rel=1e-12)
        torch.testing.assert_close(grad, plain[1], rtol=1e-9, atol=1e-12)
    loss, grad = gradient(model, tokens(length), bos=3, recompute_prefix=True)
    assert loss == plain[0] and torch.equal(grad, plain[1])


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_reading_in_place_gives_the_same(shape: str, dtype: torch.dtype) -> None:
    model, text = small_model(F64 if dtype == F64 else torch.float32, **SHAPES[shape]), tokens(63, 3)
    b, tolerance = model.config.mini_batch_size, 1e-9 if dtype == F64 else 1e-2
    assert b is not None
    kept = start_reading(model, 3, dtype)
    ours = kept.map(torch.clone)
    for first in range(0, 63, b):
        some = text[:, first : first + b + 1]
        if dtype != F64 or first % (4 * b) == 0:  # else a difference in the last place grows
            ours = kept.map(torch.clone)
        kept, *expected = read_mini_batch(model, kept, some[:, :-1], some[:, 1:], dtype=dtype)
        ours, *found = read_mini_batch(model, ours, some[:, :-1], some[:, 1:], dtype=dtype, donate_state=True)
        torch.testing.assert_close(
            [*found, *ours.tensors()], [*expected, *kept.tensors()], rtol=tolerance, atol=tolerance
        )


def by_reference(
    model: Transformer, state: InnerLoopState, batch: MiniBatch, lr: Tensor
) -> tuple[InnerLoopState, Tensor, Tensor]:
    return inner_step(model, state, batch, lr, inner_gradient_reference)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [23, 25])
def test_the_inner_gradient_is_autograds(shape: str, length: int) -> None:
    """The chain of pulls gives the losses and the outer gradient that autograd gives through its own inner gradient."""
    model = small_model(F64, **SHAPES[shape])
    written_out = gradient(model, tokens(length), bos=3)
    with definitions():
        loss, grad = gradient(model, tokens(length), bos=3, functions=EAGER._replace(inner_step=by_reference))
    assert loss == pytest.approx(written_out[0], rel=1e-12)
    torch.testing.assert_close(grad, written_out[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", ["plain", "grouped heads", "full attention", "sinks"])
def test_neither_scores_nor_logits_need_be_kept(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators for long contexts and large vocabularies give the same losses and outer gradient."""
    model = small_model(F64, **SHAPES[shape])
    expected = gradient(model, tokens(23), bos=3)
    monkeypatch.setattr("ttt_e2e.ops.tuning.KEPT_SCORES", {})
    monkeypatch.setattr("ttt_e2e.ops.tuning.KEPT_LOGITS", 0)
    for recompute in ("none", "sqrt"):
        loss, grad = gradient(model, tokens(23), bos=3, activation_checkpointing=recompute)
        assert loss == pytest.approx(expected[0], rel=1e-12)
        torch.testing.assert_close(grad, expected[1], rtol=1e-9, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 40), batch=st.integers(1, 3), seed=st.integers(0, 999), sqrt=st.booleans())
def test_recomputation_at_any_length(length: int, batch: int, seed: int, sqrt: bool) -> None:
    model = small_model(F64, seed=seed)
    text = tokens(length, batch, seed)
    plain, again = (
        gradient(model, text),
        gradient(model, text, activation_checkpointing="sqrt" if sqrt else "mini-batch"),
    )
    torch.testing.assert_close(again[1], plain[1], rtol=1e-9, atol=1e-12)


def test_gradcheck_of_the_whole_meta_loss() -> None:
    """Finite differences through embedding, prefix, four mini-batches of learning and the head, every parameter."""
    model = small_model(
        F64,
        vocab_size=7,
        hidden_size=4,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=3,
        suffix_layers=1,
        sliding_window=4,
        mini_batch_size=3,
        inner_loop__max_grad_norm=0.2,
    )
    text = torch.randint(7, (1, 12), generator=torch.Generator().manual_seed(1))

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, text: Tensor) -> Tensor:
            return sequence_loss(self.model, text, dtype=F64).loss

    names = [name for name, _ in Loss().named_parameters()]

    def loss(*values: Tensor) -> Tensor:
        return torch.func.functional_call(Loss(), dict(zip(names, values, strict=True)), (text,))

    assert torch.autograd.gradcheck(loss, tuple(model.parameters()))


def test_learns_under_no_grad() -> None:
    model = small_model(F64)
    with torch.no_grad():
        out = sequence_loss(model, tokens(23), dtype=F64)
    torch.testing.assert_close(out.nll_BT, sequence_loss(model, tokens(23), dtype=F64).nll_BT, rtol=1e-11, atol=1e-11)


def test_every_sequence_learns_alone() -> None:
    model = small_model(F64)
    text = tokens(23, batch=3)
    together = sequence_loss(model, text, dtype=F64).nll_BT
    for row in range(3):
        alone = sequence_loss(model, text[row : row + 1], dtype=F64).nll_BT
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-11, atol=1e-11)


def test_the_future_is_not_seen() -> None:
    model = small_model(F64)
    text = tokens(23)
    changed = text.clone()
    changed[:, 14:] = (changed[:, 14:] + 1) % 50
    before, after = (sequence_loss(model, t, dtype=F64).nll_BT for t in (text, changed))
    torch.testing.assert_close(before[:, :13], after[:, :13], rtol=0, atol=0)
    assert (before[:, 13:] - after[:, 13:]).abs().min() > 0


@pytest.mark.parametrize("recompute", ["none", "mini-batch", "sqrt"])
@pytest.mark.parametrize("inner_clip", [0.5, 2.0])
def test_a_mini_batch_without_targets(recompute: str, inner_clip: float) -> None:
    """Teaches nothing, and the gradient stays finite; in the official code it is NaN."""
    model = small_model(F64, inner_loop__max_grad_norm=inner_clip)
    text = tokens(25)
    text[0, 6:11] = 3  # all targets of the second mini-batch, of one sequence
    _, grad = gradient(model, text, bos=3, activation_checkpointing=recompute)
    assert grad.isfinite().all()
    state = start_reading(model, 2, F64)
    for i in (0, 5):
        before = state
        targets = text[:, i + 1 : i + 6]
        state, _, norm = read_mini_batch(model, state, text[:, i : i + 5], targets, (targets != 3).double(), dtype=F64)
    assert norm[0] == 0 and norm[1] > 0
    for old, new in zip(before.loop.tensors()[:4], state.loop.tensors()[:4], strict=True):
        assert torch.equal(old[0], new[0]) and not torch.equal(old[1], new[1])


def test_a_shorter_last_mini_batch_is_scored_and_teaches_nothing() -> None:
    model = small_model(F64)
    text = tokens(25)
    whole, cut = (sequence_loss(model, t, dtype=F64).nll_BT for t in (text, text[:, :24]))
    torch.testing.assert_close(cut, whole[:, :23], rtol=1e-12, atol=1e-12)


def test_mini_batch_mean_weighs_by_length() -> None:
    nll, mask = torch.arange(5.0)[None], torch.tensor([[1.0, 0, 0, 0, 1]])
    assert mini_batch_mean(nll, mask, 2).item() == pytest.approx((2 * 0 + 2 * 0 + 1 * 4) / 5)


@pytest.mark.parametrize("shape", SHAPES)
def test_reading_gives_the_training_losses(shape: str) -> None:
    """Mini-batch by mini-batch with caches, the losses are those of the whole sequence at once; learning or not."""
    model = small_model(F64, **SHAPES[shape])
    text = tokens(25)
    for learn in (True, False):
        expected = sequence_loss(model, text, dtype=F64, learn=learn).nll_BT
        state, losses = start_reading(model, 2, F64), []
        for i in range(0, 25, 5):
            piece, target = text[:, i : i + 5], text[:, i + 1 : i + 6]
            state, nll, _ = read_mini_batch(model, state, piece, target, dtype=F64, learn=learn)
            losses.append(nll)
        torch.testing.assert_close(torch.cat(losses, 1), expected, rtol=1e-10, atol=1e-10)
        assert state.position == 25
        assert not any(t.requires_grad for t in state.loop.tensors())


@pytest.mark.parametrize("shape", ["plain", "full attention", "grouped heads"])
def test_forward_in_any_pieces(shape: str) -> None:
    """Logits token by token equal those of the whole text; nothing is learned and no state is written to."""
    model = small_model(F64, **SHAPES[shape])
    text = tokens(25)[:, :-1]
    whole, _ = forward(model, start_reading(model, 2, F64), text, F64)
    for step in (1, 4, 13):
        state, pieces = start_reading(model, 2, F64), []
        for i in range(0, 25, step):
            logits, state = forward(model, state, text[:, i : i + step], F64)
            pieces.append(logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-10)


def test_positions_stay_exact_far_out() -> None:
    """Losses depend on relative positions only, also after a thousand million tokens (float32 angles would not do)."""
    model = small_model()
    text = tokens(5)
    results = []
    for position in (0, 10**9):
        state = start_reading(model, 2)._replace(position=position)
        results.append(forward(model, state, text)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_states_kept_grow_as_the_square_root(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {}
    make = RecomputedLoop.forward

    def counting(ctx, *args):  # type: ignore[no-untyped-def]
        result = make(ctx, *args)
        kept[args[0].keep_all] = sum(len(states) for states in ctx.kept.states)
        return result

    monkeypatch.setattr(RecomputedLoop, "forward", counting)
    model = small_model(F64)
    for recompute in ("mini-batch", "sqrt"):
        gradient(model, tokens(64 * 5, batch=1), activation_checkpointing=recompute)
    assert kept == {True: 62, False: 7 + 6}  # the last two mini-batches keep their graph instead


class ScaledMLP(MLP):
    """A static MLP with one parameter more than `loop_parameters` may have been written for."""

    def __init__(self, plain: MLP) -> None:
        super().__init__(plain.w_in.shape[1], plain.w_out.shape[1], plain.activation)
        self.load_state_dict(plain.state_dict())
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Vjp]:
        y_BTD, vjp = super().forward(x_BTD)
        return y_BTD * self.scale, lambda g: vjp(g * self.scale)


@pytest.mark.parametrize("recompute", ["mini-batch", "sqrt"])
def test_recomputation_reaches_every_module_of_the_suffix(recompute: str) -> None:
    """A module that is added gets the same gradient from the recomputed loop as from plain autograd."""
    model = small_model(F64)
    for block in model.suffix:
        block.mlp = ScaledMLP(block.mlp).to(F64)
    plain, again = gradient(model, tokens(23)), gradient(model, tokens(23), activation_checkpointing=recompute)
    assert all(float(block.mlp.scale.grad.abs()) > 0 for block in model.suffix)
    torch.testing.assert_close(again[1], plain[1], rtol=1e-9, atol=1e-12)


def test_every_block_is_called_as_a_module() -> None:
    """Hooks, profilers and sharding see each block's every use: once a text, and once a mini-batch in the loop."""
    model, calls = small_model(F64), dict.fromkeys(range(4), 0)
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.update({i: calls[i] + 1}))
    sequence_loss(model, tokens(25), dtype=F64)
    assert calls == {0: 1, 1: 1, 2: 1 + 5, 3: 5}


@pytest.mark.parametrize("recompute", ["mini-batch", "sqrt"])
def test_the_recomputed_loop_goes_back_once(recompute: str) -> None:
    """It gives its states up on the way; a second time is an error in words."""
    out = sequence_loss(small_model(F64), tokens(25), activation_checkpointing=recompute, dtype=F64)  # type: ignore[arg-type]
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        out.loss.backward()


def test_the_meta_gradient_in_bfloat16_is_near() -> None:
    """Nearer by far than one that leaves out what the updates bring."""
    model = Transformer(
        small_config(hidden_size=64, initializer_range=0.1, inner_loop__lr=0.3), torch.Generator().manual_seed(0)
    )

    def gradients(dtype: torch.dtype, learn: bool = True) -> dict[str, Tensor]:
        model.zero_grad()
        sequence_loss(model, tokens(50), dtype=dtype, learn=learn).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def distance(a: dict[str, Tensor], name: str) -> float:
        return float((a[name] - exact[name]).norm() / exact[name].norm())

    exact, rounded, frozen = gradients(torch.float32), gradients(torch.bfloat16), gradients(torch.float32, learn=False)
    for name in exact:
        assert distance(rounded, name) < 0.1, name
    names = [name for name in exact if ".fast." in name]
    assert names and min(distance(frozen, name) for name in names) > 0.3


def test_fast_weights_are_float32_whatever_the_products_are() -> None:
    """Steps far below what bfloat16 can hold beside the weights do not get lost."""
    norms = []
    for dtype in (torch.float32, torch.bfloat16):
        session = Session(small_model(inner_loop__lr=1e-4), dtype=dtype)
        session.read(tokens(100, 1)[0].tolist())
        assert {w.dtype for pair in session.state().read_state.loop.fast for w in pair} == {torch.float32}
        norms.append(session.info().learned_norm)
    assert norms[0] > 0 and norms[1] == pytest.approx(norms[0], rel=0.05)


def test_bfloat16_is_near(seed: int = 0) -> None:
    model = Transformer(small_config(hidden_size=32, initializer_range=0.1), torch.Generator().manual_seed(seed))
    exact, rounded = (sequence_loss(model, tokens(25), dtype=d) for d in (torch.float32, torch.bfloat16))
    assert rounded.nll_BT.dtype == torch.float32
    torch.testing.assert_close(rounded.nll_BT, exact.nll_BT, rtol=0.02, atol=0.05)
