"""Every mixer inside a model: trained, read in pieces, written on from, saved. The mixers' own tests stand beside."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_config, small_config, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.config.schema import MIXERS, TrainConfig
from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.streaming import forward, read_mini_batch, start_reading
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.kv_cache import KVCache
from ttt_e2e.model.mixers import MIXER_TYPES
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.training.optimizer import make_optimizer

F64 = torch.float64
SMALL = dict(
    vocab_size=50,
    hidden_size=16,
    num_attention_heads=2,
    sliding_window=10,
    mini_batch_size=5,
    mamba2__state_size=8,
    memory__num_persistent_tokens=3,
)
PATTERNS = {
    **{name: dict(suffix_layers=0, pattern=(name,)) for name in MIXERS},
    "5:1": dict(suffix_layers=0, num_hidden_layers=6, pattern=("window",) * 5 + ("full",)),
    "mamba2 and windows": dict(suffix_layers=0, pattern=("mamba2", "window")),
    "learning over full attention": dict(pattern=("full", "full", "window", "window")),
    "learning over Gated DeltaNet": dict(pattern=("gated-deltanet", "mamba2", "titans", "window")),
    "learning without a static MLP": dict(static_mlp=False),
}


def model_of(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    return small_model(dtype, seed, **{**SMALL, **PATTERNS[name]})


def text_of(length: int, seed: int = 0, batch: int = 2) -> torch.Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 37), max_size=6), seed=st.integers(0, 99))
def test_any_split_gives_the_same(name: str, cuts: list[int], seed: int) -> None:
    model, text = model_of(name, F64, seed), text_of(37, seed)
    start = start_reading(model, 2, F64)
    whole, end = forward(model, start, text, F64)
    state, pieces = start, []
    for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), 37], strict=True):
        logits, state = forward(model, state, text[:, first:last], F64)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)
    assert state.position == end.position
    for ours, theirs in zip(state.static or (), end.static or (), strict=True):
        torch.testing.assert_close(tuple(ours), tuple(theirs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PATTERNS)
def test_nothing_is_read_and_learned_from_nothing(name: str) -> None:
    model = model_of(name, F64)
    read = read_mini_batch(model, start_reading(model, 2, F64), text_of(5), text_of(5, 1), dtype=F64)[0]
    for learn in (True, False):
        after, losses, norms = read_mini_batch(model, read, text_of(0), text_of(0), learn=learn, dtype=F64)
        assert losses.shape == (2, 0) and norms.tolist() == [0, 0] and after.position == 5
        torch.testing.assert_close(after.tensors(), read.tensors(), rtol=0, atol=0)
        nobody, losses, norms = read_mini_batch(
            model, start_reading(model, 0, F64), text_of(5, batch=0), text_of(5, batch=0), learn=learn, dtype=F64
        )
        assert losses.shape == (0, 5) and norms.shape == (0,) and nobody.position == 5


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3)),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=30),
    start=st.integers(0, 5),
    window=st.one_of(st.none(), st.integers(1, 6)),
)
def test_a_cache_is_appended_to_in_its_own_memory(
    sizes: tuple[int, int, int], lengths: list[int], start: int, window: int | None
) -> None:
    (batch, heads, width), generator = sizes, torch.Generator().manual_seed(0)

    def tokens(count: int) -> KVCache:
        return KVCache(*torch.randn(2, batch, heads, count, width, generator=generator).unbind())

    ours = theirs = tokens(start)
    for length in lengths:
        new = tokens(length)
        ours, theirs = ours.append_(new).last(window), theirs.append(new).last(window)
        assert all(map(torch.equal, ours, theirs))


def test_appending_in_place_can_be_made_again_after_a_failure() -> None:
    """A call that failed after some caches were appended to is repeated on the caches that it was given."""
    first, lost, new = (KVCache(*torch.randn(2, 1, 2, count, 4).unbind()) for count in (12, 3, 3))
    cache = first.append_(lost).last(8)
    expected = KVCache(*(t.clone() for t in cache)).append(new)
    cache.append_(lost)
    assert all(map(torch.equal, cache.append_(new), expected))


def test_few_calls_copy_a_cache() -> None:
    cache, new, places = KVCache(*torch.randn(2, 2, 3, 8, 4).unbind()), torch.randn(2, 3, 1, 4), set()
    for _ in range(80):
        cache = cache.append_(KVCache(new, new)).last(8)
        places.add(cache.k_BGSK.untyped_storage().data_ptr())
        assert cache.k_BGSK.untyped_storage().nbytes() <= 2 * cache.k_BGSK.nbytes
    assert len(places) <= 20


@pytest.mark.parametrize("name", PATTERNS)
def test_the_past_is_not_told_the_future(name: str) -> None:
    model, text = model_of(name, F64), text_of(40)
    other = text.clone()
    other[:, 23] = (other[:, 23] + 1) % 50
    one, two = (sequence_loss(model, t, dtype=F64).nll_BT for t in (text, other))
    torch.testing.assert_close(one[:, :22], two[:, :22], rtol=0, atol=0)
    assert not torch.equal(one[:, 23:], two[:, 23:])


@pytest.mark.parametrize("name", PATTERNS)
def test_one_sequence_tells_another_nothing(name: str) -> None:
    model, text = model_of(name, F64), text_of(31)
    both = sequence_loss(model, text, dtype=F64).nll_BT
    for row in range(2):
        alone = sequence_loss(model, text[row : row + 1], dtype=F64).nll_BT
        torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_parameter_is_trained(name: str) -> None:
    model, text = model_of(name), text_of(36)
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.0))
    losses: list[float] = []
    while len(losses) < 5 or losses[-1] >= 0.8 * losses[0]:
        assert len(losses) < 25
        loss = sequence_loss(model, text).loss
        loss.backward()
        idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        assert not idle
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())


def test_no_decay_where_a_mixer_wants_none() -> None:
    model = model_of("learning over Gated DeltaNet")
    decayed, exempt, _ = make_optimizer(model, TrainConfig()).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and exempt["weight_decay"] == 0
    assert {names[id(p)].rpartition(".")[2] for p in exempt["params"]} == {"a_log", "dt_bias", "d_skip", "steps_bias"}
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)


@pytest.mark.parametrize("name", PATTERNS)
def test_sessions_are_saved_and_go_on(name: str, tmp_path: Path) -> None:
    model, tokens = model_of(name), text_of(53, batch=1)[0].numpy()
    whole, part = Session(model), Session(model)
    expected = whole.read(tokens)
    first = part.read(tokens[:17])
    branch = part.fork()
    part.save(tmp_path / "s")
    losses = [first, Session.load(tmp_path / "s", model).read(tokens[17:])]
    np.testing.assert_allclose(np.concatenate(losses), expected, atol=1e-5)
    np.testing.assert_array_equal(branch.read(tokens[17:]), losses[1])
    written = list(branch.generate_tokens(tokens[:3], max_tokens=12, temperature=0.0))
    assert written == list(branch.generate_tokens(tokens[:3], max_tokens=12, temperature=0.0)) and len(written) == 12


def test_dynamic_evaluation_is_trained_like_any_other_and_learns_at_test_time() -> None:
    window = small_model(F64, suffix_layers=0)
    dynamic = small_model(F64, static_mlp=False)
    weights = dynamic.state_dict()
    for name, value in window.state_dict().items():
        inside = name.replace(".mlp", ".fast")
        weights[inside if inside in weights else name] = value
    dynamic.load_state_dict(weights)
    text = text_of(34)
    as_trained = sequence_loss(dynamic, text, learn=False, dtype=F64)
    torch.testing.assert_close(as_trained.nll_BT, sequence_loss(window, text, dtype=F64).nll_BT)
    learning = sequence_loss(dynamic, text, inner_lr=0.1, dtype=F64)
    torch.testing.assert_close(learning.nll_BT[:, :5], as_trained.nll_BT[:, :5])
    assert not torch.allclose(learning.nll_BT[:, 5:], as_trained.nll_BT[:, 5:])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pattern": ("mamba",)}, "no mixer 'mamba'. Did you mean 'mamba2'"),
        (
            {"pattern": ("quick",)},
            r"no mixer 'quick'. There are: full, window, mamba2, gated-deltanet, ttt-kvb, titans, window\+gated",
        ),
        ({"pattern": ()}, "pattern names no mixer"),
        ({"pattern": ("window", "window", "window", "mamba2")}, "after its first block all its mixers must be"),
        (
            {"num_hidden_layers": 6, "suffix_layers": 4, "pattern": ("window",) * 5 + ("full",)},
            "must be 'window', or all 'full'; they are window, window, full",
        ),
        (
            {"suffix_layers": 0, "mini_batch_size": None, "pattern": ("titans",)},
            "titans learn mini-batch by mini-batch",
        ),
        (
            {"suffix_layers": 0, "sliding_window": 12, "pattern": ("titans",)},
            "window 12 is not a multiple of mini_batch_size 5",
        ),
        ({"suffix_layers": 0, "sliding_window": 3, "pattern": ("ttt-kvb",)}, "longer than the window"),
        ({"suffix_layers": 0, "pattern": ("mamba2",), "mamba2.n_groups": 3}, "do not divide into 3 groups"),
        ({"suffix_layers": 0, "pattern": ("mamba2",), "mamba2.state_size": 0}, "state_size must be at least 1"),
        ({"suffix_layers": 0, "pattern": ("ttt-kvb",), "memory.lr": -1.0}, "memory.lr must be at least 0"),
    ],
)
def test_what_does_not_fit_is_said(change: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        small_config(**change)


@pytest.mark.parametrize(("mixer", "extra"), [("mamba2", "mamba"), ("gated-deltanet", "fla")])
def test_a_missing_extra_is_said(mixer: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt_e2e.ops.kernel_library.find_functions", lambda module, names: None)
    fused = {f"{mixer.replace('-', '_')}.kernels": "fused"}
    config = make_config(**{**SMALL, "num_hidden_layers": 1, "intermediate_size": 8, **fused})
    with pytest.raises(UserError, match=rf"pip install 'ttt-e2e\[{extra}\]'"):
        MIXER_TYPES[mixer](config)


def test_biases_start_at_zero_and_norms_at_one() -> None:
    mixer = MIXER_TYPES["window"](small_config(head_dim=6, attention_bias=True, attention_out_bias=True))
    mixer.reset_parameters(0.02)
    vectors = {name: weight for name, weight in mixer.named_parameters() if weight.dim() == 1}
    assert {name: weight.unique().item() for name, weight in vectors.items()} == {
        "b_qkv": 0,
        "b_out": 0,
        "q_norm": 1,
        "k_norm": 1,
    }
