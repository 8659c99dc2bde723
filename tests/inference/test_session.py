"""A session reads: splitting, forking, information, divergence."""

import functools
import gc
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_helpers import TEXT, having_read, same_state, tokens_of
from pool_helpers import assert_same_state
from torch.utils.flop_counter import FlopCounterMode

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.divergence import Diverged
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_pool import SessionPool
from ttt_e2e.inference.text_digest import token_bytes
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.transformer import Transformer

F64 = torch.float64


@functools.cache
def read_at_once(learn: bool) -> tuple[Session, np.ndarray]:
    """A session that has read `tokens_of(93)`, and the losses."""
    session = Session(small_model(F64), learn=learn, dtype=F64)
    return session, session.read(tokens_of(93))


@pytest.mark.parametrize("learn", [True, False])
@given(cuts=st.lists(st.integers(0, 93), max_size=8))
@settings(max_examples=15, deadline=None)
def test_read_state_does_not_depend_on_how_tokens_are_split(learn: bool, cuts: list[int]) -> None:
    whole, expected = read_at_once(learn)
    split = Session(whole.model, learn=learn, dtype=F64)
    losses = [split.read(piece) for piece in np.split(tokens_of(93), sorted(cuts))]
    np.testing.assert_allclose(expected, np.concatenate(losses), rtol=1e-6)  # float32
    assert_same_state(split.state().read_state, whole.state().read_state)
    assert whole.info().to_facts() | {"learned_norm": None} == split.info().to_facts() | {"learned_norm": None}
    assert learn or same_state(whole, split)


def one_by_one(model: Transformer, ids: np.ndarray) -> tuple[Session, np.ndarray]:
    """A session that is given a mini-batch at a time, so that the prefix reads nothing ahead; and the losses."""
    session = Session(model, dtype=F64)
    return session, np.concatenate([session.read(piece) for piece in np.split(ids, range(6, len(ids), 5))])


@pytest.mark.parametrize("stop", range(1, 6))
def test_reading_may_stop_within_what_the_prefix_has_read(stop: int, tmp_path: Path) -> None:
    """It has read four mini-batches of five tokens at once; the session goes on from any of them, from a file too."""
    model, ids = small_model(F64, sliding_window=20), tokens_of(64)
    whole, expected = one_by_one(model, ids)
    session = Session(model, dtype=F64)
    reading = session.read_chunks(ids[:40])
    losses = [next(reading) for _ in range(stop)]
    reading.close()
    there, _ = one_by_one(model, ids[: 5 * stop + 1])
    assert_same_state(session.state().read_state, there.state().read_state)
    session.save(tmp_path / "session")
    session = Session.load(tmp_path / "session", model)
    losses.append(session.read(ids[40:]))
    np.testing.assert_allclose(np.concatenate(losses), expected, rtol=1e-6)  # float32
    assert_same_state(session.state().read_state, whole.state().read_state)


def test_a_session_may_be_used_while_it_reads() -> None:
    model, ids = small_model(F64, sliding_window=20), tokens_of(64)
    session, losses = Session(model, dtype=F64), []
    for i, some in enumerate(session.read_chunks(ids[:40])):
        losses.append(some)
        if i == 1:  # another text, of which more is pending than was
            session.reset()
            losses = [next(session.read_chunks(ids[::-1]))]
    whole, expected = one_by_one(model, ids[::-1])
    np.testing.assert_allclose(np.concatenate(losses), expected, rtol=1e-6)
    assert_same_state(session.state().read_state, whole.state().read_state)


def test_text_digest_is_of_every_token_whoever_read_them() -> None:
    digest, model = read_at_once(True)[0].info().text_digest, small_model()
    assert digest == read_at_once(False)[0].info().text_digest
    for i in (0, 50, 92):
        assert digest != having_read(Session(model), tokens_of(93)[:i]).info().text_digest


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize(("dtype", "inner_lr", "atol"), [("float32", 0.1, 1e-5), ("float64", 1.0, 1e-6)])
def test_read_losses_equal_sequence_loss(learn: bool, dtype: str, inner_lr: float, atol: float) -> None:
    # With random weights and an inner_lr of 1, learning amplifies float32's rounding tenfold in a hundred tokens.
    kind = getattr(torch, dtype)
    model, tokens = small_model(kind, inner_loop__lr=inner_lr), tokens_of(98)
    session = Session(model, learn=learn, dtype=kind)
    losses = np.concatenate((session.read(tokens), session.score_pending()))
    expected = sequence_loss(model, torch.tensor(tokens)[None], learn=learn, dtype=kind)
    np.testing.assert_allclose(losses, expected.nll_BT[0].numpy(), atol=atol)


def test_score_pending_does_not_change_the_session() -> None:
    session = Session(small_model())
    session.read(tokens_of(14))
    before = session.fork()
    assert len(session.score_pending()) == session.pending == 3
    assert same_state(session, before)


def test_read_stream_equals_reading_the_whole_text(model: Transformer, tokenizer: Tokenizer) -> None:
    whole, split = Session(model, tokenizer), Session(model, tokenizer)
    expected = whole.read(TEXT)
    got = np.concatenate(list(split.read_stream(TEXT[i : i + 7] for i in range(0, len(TEXT), 7))))
    np.testing.assert_allclose(expected, got, rtol=1e-5)
    assert whole.info().text_digest == split.info().text_digest and whole.position == split.position
    assert len(expected) + whole.pending == len(tokenizer.encode(TEXT))  # BOS comes first: every token has a loss


def test_fork_is_independent() -> None:
    session = Session(small_model())
    session.read(tokens_of(20))
    fork, kept = session.fork(), session.fork()
    fork.read(tokens_of(20, seed=1))
    assert same_state(session, kept)
    assert fork.position > session.position


def test_info_counts_tokens_bytes_and_memory(model: Transformer, tokenizer: Tokenizer) -> None:
    session = Session(model, tokenizer)
    fresh = session.info()
    assert (fresh.tokens, fresh.position, fresh.pending, fresh.text_bytes, fresh.learned_norm) == (1, 0, 0, 0, 0.0)
    session.read(TEXT)
    info = session.info()
    assert info.text_bytes == len(TEXT.encode())
    assert info.tokens == 1 + len(tokenizer.encode(TEXT)) == info.position + info.pending + 1
    flat = [
        torch.cat([w.flatten() for pair in fast for w in pair])
        for fast in (session.state().read_state.loop.fast, model.initial_fast_weights(1))
    ]
    assert info.learned_norm == pytest.approx(float((flat[0] - flat[1]).norm()), rel=1e-5) and info.learned_norm > 0
    caches = 2 * 4 * model.config.num_hidden_layers * model.config.sliding_window * model.config.hidden_size
    assert info.memory_bytes == 4 * flat[0].numel() + caches
    assert having_read(Session(model, tokenizer, learn=False), TEXT).info().learned_norm == 0
    assert Session(model).info().text_bytes is None


@pytest.mark.parametrize("text", ["Straße 雨 🌧️", "<|bos|>", "\x00\x7f\xa0"])
def test_token_bytes_add_up_to_the_size_in_utf8(text: str, tokenizer: Tokenizer) -> None:
    sizes = token_bytes(tokenizer)
    assert sizes is not None and sizes[tokenizer.bos] == 0
    assert sizes[tokenizer.encode(text)].sum() == len(text.encode())


def test_reset_forgets_everything_except_in_forks(model: Transformer, tokenizer: Tokenizer) -> None:
    session = having_read(Session(model, tokenizer), TEXT)
    fork = session.fork()
    session.reset()
    assert same_state(session, Session(model, tokenizer)) and session.info() == Session(model, tokenizer).info()
    assert same_state(fork, having_read(session, TEXT))


def test_compile_applies_only_where_a_windowed_model_learns() -> None:
    assert not Session(small_model(suffix_layers=0), compile=True).compiled
    assert not Session(small_model(), learn=False, compile=True).compiled
    with pytest.warns(UserWarning, match="needs a window everywhere, not full"):
        assert not Session(small_model(pattern=("full",)), compile=True).compiled


def test_divergence_restores_the_last_good_state() -> None:
    model, tokens = small_model(inner_loop__lr=1e30), tokens_of(60)
    session = Session(model)
    with pytest.raises(Diverged, match=r"at tokens 5 to 10") as caught:
        session.read(tokens)
    assert caught.value.position == session.position == 0  # the very first update was the bad one
    assert all(torch.isfinite(t).all() for t in session.state().read_state.loop.tensors())
    fresh = Session(model)
    fresh.read(tokens[:1])
    assert same_state(session, fresh)


def test_divergence_after_load_says_that_no_earlier_state_is_known(tmp_path: Path) -> None:
    model, tokens = small_model(inner_loop__lr=1e30), tokens_of(60)
    session = Session(model)
    session.read(tokens[:6])  # the update that will turn out bad
    session.save(tmp_path / "s")
    loaded = Session.load(tmp_path / "s", model)
    with pytest.raises(Diverged, match=r"after 5 tokens") as caught:
        loaded.read(tokens[6:])
    assert "no earlier one is known" in str(caught.value) and loaded.position == 5


def test_divergence_keeps_what_was_learned_before(tmp_path: Path) -> None:
    model, tokens = small_model(), tokens_of(60)
    session = Session(model)
    session.read(tokens[:31])
    good = session.fork()
    session.read(tokens[31:36])  # this update will turn out bad
    for weight in session.state().read_state.loop.fast[0]:
        weight.mul_(math.nan)
    with pytest.raises(Diverged, match="35 to 40"):
        session.read(tokens[36:])
    assert session.position == 30
    assert same_state(session, good) and session.info() == good.info()
    session.save(tmp_path / "kept")
    assert np.isfinite(Session.load(tmp_path / "kept", model).read(tokens[31:])).all()


def test_broken_model_is_not_called_divergence_of_learning() -> None:
    model = small_model()
    with torch.no_grad():
        model.embedding.fill_(math.nan)
    with pytest.raises(Diverged, match="nothing was learned"):
        Session(model).read(tokens_of(20))


@pytest.mark.parametrize("bad", [[-1], [50], [0.5], [[1, 2]]])
def test_read_rejects_invalid_ids(bad: list) -> None:
    with pytest.raises(UserError, match="0 to 49"):
        Session(small_model()).read(np.array(bad))


def test_memory_and_operations_do_not_grow_with_the_text(model: Transformer) -> None:
    session, ids = Session(model), np.random.default_rng(0).integers(0, model.config.vocab_size, 1500)
    session.read(ids[:100])
    before = weakref.ref(session.state().read_state.loop.fast[0][0])
    operations = []
    for start in (100, 1300):
        session.read(ids[session.position + session.pending : start])
        with FlopCounterMode(display=False) as counter:
            session.read(ids[start : start + 100])
        operations.append(counter.get_total_flops())
    gc.collect()
    assert before() is None and operations[0] == operations[1]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in session.state().read_state.tensors()}
    b, window = session.mini_batch_size, model.config.sliding_window
    # A cache is cut from one that has room for the mini-batches that the prefix read at once.
    assert sum(held.values()) <= session.info().memory_bytes * (window + window // b * b) / window
    assert session.state().pending.base is None
    pool = SessionPool(session)
    taken = pool.peek(pool.add(session)).state()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in taken.read_state.tensors()}
    assert sum(held.values()) == session.info().memory_bytes and taken.pending.base is None
