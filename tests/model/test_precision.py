"""Models that were loaded for products in bfloat16: the same numbers from half the memory, and nothing else."""

from pathlib import Path

import pytest
import torch
from helpers import GEMMA, small_model

from ttt_e2e.config.schema import MIXERS
from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.streaming import ReadState, forward, read_mini_batch, start_reading
from ttt_e2e.model.checkpoint import load_transformer, model_digest, save_model
from ttt_e2e.model.precision import product_matrices
from ttt_e2e.model.transformer import Transformer, parameter_shapes

BF16 = torch.bfloat16
SHAPE = dict(mamba2__state_size=8, memory__num_persistent_tokens=3, sliding_window=10)
MODELS = {
    **{name: dict(suffix_layers=0, pattern=(name,)) for name in MIXERS},
    "learning": {},
    "learning, untied head": dict(tie_word_embeddings=False),
    "learning with factors": dict(fast_rank=3, inner_loop__learned_lr=True),
    "learning in parallel, with sinks and biases": dict(
        parallel_mlp=True, attention_sink=True, attention_bias=True, attention_out_bias=True
    ),
    "learning as in Gemma": dict(attention_sink=True, **GEMMA),
    "learning over other mixers": dict(pattern=("gated-deltanet", "mamba2", "titans", "window")),
    "learning without a static MLP": dict(static_mlp=False),
}


def loaded(folder: Path, name: str) -> tuple[Transformer, Transformer]:
    """A model from a file, in float32 and for products in bfloat16."""
    save_model(small_model(**{**SHAPE, **MODELS[name]}), folder / "model", None)
    return tuple(load_transformer(folder / "model", "cpu", dtype) for dtype in (torch.float32, BF16))  # type: ignore[return-value]


def read_and_write(model: Transformer, learn: bool) -> tuple[list[torch.Tensor], ReadState]:
    """Losses and norms of five mini-batches, then the logits of a few tokens, one by one."""
    text = torch.randint(50, (2, 32), generator=torch.Generator().manual_seed(0))
    state, found = start_reading(model, 2, BF16), []
    for start in range(0, 25, 5):
        tokens, targets = text[:, start : start + 5], text[:, start + 1 : start + 6]
        state, losses, norms = read_mini_batch(model, state, tokens, targets, learn=learn, dtype=BF16)
        found += [losses, norms]
    for i in range(25, 29):
        logits, state = forward(model, state, text[:, i : i + 1], BF16)
        found.append(logits)
    return found, state


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_rounded_matrices_change_nothing(tmp_path: Path, name: str, learn: bool) -> None:
    (found, state), (expected, expected_state) = (read_and_write(m, learn) for m in reversed(loaded(tmp_path, name)))
    for ours, theirs in zip(found + state.tensors(), expected + expected_state.tensors(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_rounded_matrices_change_nothing_where_logits_come_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ttt_e2e.ops.tuning.KEPT_LOGITS", 0)
    test_rounded_matrices_change_nothing(tmp_path, "learning, untied head", True)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_held_in_bfloat16(tmp_path: Path, name: str) -> None:
    plain, rounded = loaded(tmp_path, name)
    assert model_digest(plain) == model_digest(rounded)
    matrices = product_matrices(plain.config, parameter_shapes(plain.config))
    assert {n for n, w in rounded.named_parameters() if w.dtype == BF16} == matrices
    for (parameter, weight), other in zip(rounded.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(weight, other.to(weight.dtype)), parameter
    for ours, theirs in zip(rounded.initial_fast_weights(1), plain.initial_fast_weights(1), strict=True):
        assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_rounded_model_serves_its_own_dtype_alone(tmp_path: Path) -> None:
    plain, rounded = loaded(tmp_path, "learning, untied head")
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    state = start_reading(plain, 1)
    for use in (
        lambda: Session(rounded),
        lambda: start_reading(rounded, 1, torch.float64),
        lambda: forward(rounded, state, tokens),
        lambda: save_model(rounded, tmp_path / "copy", None),
    ):
        with pytest.raises(UserError, match=r"loaded for bfloat16, .* again for float"):
            use()
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("products", [torch.float32, torch.float64])
def test_only_a_smaller_dtype_rounds(tmp_path: Path, products: torch.dtype) -> None:
    save_model(small_model(), tmp_path / "model", None)
    model = load_transformer(tmp_path / "model", "cpu", products)
    assert model.rounded is None and {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_a_session_goes_from_one_to_the_other(tmp_path: Path) -> None:
    plain, rounded = loaded(tmp_path, "learning")
    session = Session(plain, dtype=BF16)
    session.read(range(22))
    session.save(tmp_path / "one.session")
    other = Session.load(tmp_path / "one.session", rounded)
    assert session.info() == other.info()
    for mine in (session, other):
        mine.read(range(22))
    other.save(tmp_path / "two.session")
    assert Session.load(tmp_path / "two.session", plain).info() == session.info()
