"""Many sessions in one batch: each as if it were alone, whoever joins and leaves beside it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_helpers import tokens_of
from pool_helpers import (
    F64,
    MODELS,
    ONE_TOKENIZER,
    PATTERNS,
    assert_same_state,
    generate_alone,
    model_of,
    of,
    read_alone,
    removed,
    run,
)

from ttt_e2e.errors import UserError
from ttt_e2e.inference import session_pool as pool_module
from ttt_e2e.inference.pool_requests import Event
from ttt_e2e.inference.sampling import SamplingOptions
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_pool import SessionPool
from ttt_e2e.inference.streaming import forward, start_reading
from ttt_e2e.inference.text_digest import TextDigest
from ttt_e2e.model.transformer import Transformer


class Check:
    """A pool, and what each of its sessions must give, by sessions that are alone."""

    def __init__(self, model: Transformer, max_batch: int, dtype: torch.dtype, tolerance: float) -> None:
        self.model, self.dtype, self.tolerance = model, dtype, tolerance
        self.pool = SessionPool(Session(model, dtype=dtype), max_batch=max_batch)
        # For each session: tokens, how many to generate (None: a read), whether to learn from these.
        self.jobs: dict[int, list[tuple[np.ndarray, int | None, bool]]] = {}
        self.events: list[Event] = []
        self.made = 0

    def unique(self, length: int) -> np.ndarray:
        self.made += 1
        return tokens_of(length, self.made)

    def add(self) -> None:
        self.jobs[self.pool.add()] = []

    def read(self, id: int, length: int) -> None:
        self.jobs[id].append((self.unique(length), None, False))
        self.pool.submit_read(id, self.jobs[id][-1][0])

    def write(self, id: int, length: int, count: int, learn: bool) -> None:
        self.jobs[id].append((self.unique(length), count, learn))
        options = SamplingOptions(seed=len(self.jobs[id]))
        prompt = self.jobs[id][-1][0]
        self.pool.submit_generate(id, prompt, max_tokens=count, options=options, learn_from_writing=learn)

    def step(self) -> None:
        self.events += self.pool.step()

    def remove(self, id: int) -> None:
        """Remove a session, perhaps in the middle of its work, and compare all that it gave so far."""
        peeked, text = self.pool.peek(id).state(), removed(self.pool, id).state()
        assert_same_state(peeked.read_state, text.read_state, 0)
        losses, written, ends = of(self.events, id)
        assert ends == [None] * len(ends)
        jobs = self.jobs.pop(id)
        begun = np.concatenate([np.empty(0, np.int64), *(tokens for tokens, count, _ in jobs if count is None)])
        begun = begun[: text.read_state.position + len(text.pending)]  # reads that were not begun are dropped
        np.testing.assert_array_equal(text.pending, begun[text.read_state.position :])
        assert text.text == TextDigest().add(begun[: text.read_state.position], 5, None)
        upto = begun[: text.read_state.position + 1] if text.read_state.position else begun[:0]
        state, alone, _ = read_alone(self.model, upto, self.dtype)
        assert_same_state(text.read_state, state, self.tolerance)
        np.testing.assert_allclose(losses, alone, atol=self.tolerance)
        seen = np.empty(0, np.int64)
        for i, (tokens, count, learn) in enumerate(jobs[: len(ends) + 1]):
            if count is None:
                seen = np.concatenate((seen, tokens))
                continue
            text_so_far, options = np.concatenate((seen, tokens)), SamplingOptions(seed=i + 1)
            if learn:
                session = Session(self.model, dtype=self.dtype)
                alone_tokens = [
                    *session.generate_tokens(text_so_far, max_tokens=count, learn_from_writing=True, seed=i + 1)
                ]
            else:
                alone_tokens = generate_alone(self.model, text_so_far, count, options, self.dtype)
            expected = alone_tokens if i < len(ends) else alone_tokens[: len(written)]
            assert written[: len(expected)] == expected
            written = written[len(expected) :]
        assert written == []


ACTIONS = st.one_of(
    st.tuples(st.just("add")),
    st.tuples(st.just("remove"), st.integers(0, 99)),
    st.tuples(st.just("read"), st.integers(0, 99), st.integers(1, 30)),
    st.tuples(st.just("write"), st.integers(0, 99), st.integers(1, 12), st.integers(0, 14), st.booleans()),
    st.tuples(st.just("step")),
    st.tuples(st.just("step")),
)


def play(check: Check, actions: list[tuple]) -> None:
    for _ in range(3):
        check.add()
    for name, *numbers in actions:
        ids = list(check.jobs)
        if name in ("add", "step"):
            getattr(check, name)()
        elif ids:
            getattr(check, name)(ids[numbers[0] % len(ids)], *numbers[1:])
    while check.pool.busy:
        check.step()
    for id in list(check.jobs):
        assert len(of(check.events, id)[2]) == len(check.jobs[id])  # all that was submitted was done
        check.remove(id)
        with pytest.raises(UserError, match="no session"):
            check.pool.peek(id)


@given(
    actions=st.lists(ACTIONS, min_size=10, max_size=30),
    max_batch=st.integers(1, 5),
    replay=st.sampled_from([1, 3, pool_module.MAX_REPLAY]),
)
@settings(max_examples=25, deadline=None)
def test_pooled_session_equals_a_session_alone(actions: list[tuple], max_batch: int, replay: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "MAX_REPLAY", replay)
        play(Check(MODELS["window"], max_batch, F64, 1e-9), actions)


@pytest.mark.parametrize("name", sorted(set(PATTERNS) - {"window"}))
@given(actions=st.lists(ACTIONS, min_size=10, max_size=25))
@settings(max_examples=8, deadline=None)
def test_pooled_session_equals_a_session_alone_with_every_mixer(name: str, actions: list[tuple]) -> None:
    play(Check(MODELS[name], 4, F64, 1e-9), actions)


def test_pooled_session_equals_a_session_alone_in_float32() -> None:
    model = model_of("window", torch.float32)
    check = Check(model, 4, torch.float32, 1e-5)
    rng = np.random.default_rng(0)
    actions: list[tuple] = []
    for _ in range(60):
        name = rng.choice(["add", "remove", "read", "read", "write", "step", "step"])
        numbers = {"remove": [99], "read": [99, 30], "write": [99, 12, 14, 2]}.get(name, [])
        actions.append((name, *(int(rng.integers(1, top)) for top in numbers)))
    play(check, actions)


def test_removed_session_continues_in_another_pool() -> None:
    model, text = MODELS["window"], tokens_of(60)
    first, second = SessionPool(Session(model, dtype=F64)), SessionPool(Session(model, dtype=F64))
    one = first.add()
    first.submit_read(one, text[:33])
    other = second.add()
    second.submit_read(other, tokens_of(33, 1))
    run(first), run(second)
    moved = second.add(removed(first, one))
    second.submit_read(moved, text[33:])
    run(second)
    state, _, done = read_alone(model, text)
    left = removed(second, moved).state()
    assert_same_state(left.read_state, state)
    np.testing.assert_array_equal(left.pending, text[done:])


def test_add_copies_the_session_and_rejects_other_settings() -> None:
    model, text = MODELS["window"], tokens_of(60)
    session = Session(model, dtype=F64)
    session.read(text[:33])
    pool = SessionPool(Session(model, dtype=F64))
    id = pool.add(session)
    pool.submit_read(id, text[33:])
    losses, _, _ = of(run(pool), id)
    np.testing.assert_allclose(losses, session.read(text[33:]), atol=1e-6)
    for other, what in (
        (Session(model), "dtype"),
        (Session(MODELS["full"], dtype=F64), "model"),
        (Session(model, ONE_TOKENIZER, dtype=F64), "tokenizer"),
        (Session(model, learn=False, dtype=F64), "learn"),
    ):
        with pytest.raises(UserError, match=f"another {what}"):
            pool.add(other)


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("read_before", [0, 3, 47])
def test_removed_session_is_like_any_other(tmp_path: Path, learn: bool, read_before: int) -> None:
    model = small_model(F64, vocab_size=ONE_TOKENIZER.vocab_size, sliding_window=10).requires_grad_(False)
    alone = Session(model, ONE_TOKENIZER, learn=learn, dtype=F64)
    assert not learn or alone.chunk_size == 5 < Session(model, learn=False).chunk_size
    text = ONE_TOKENIZER.encode("Straße, 雨が降った. " * 6)
    alone.read(text[:read_before])
    pool = SessionPool(Session(model, ONE_TOKENIZER, learn=learn, dtype=F64))
    id, beside = pool.add(alone), pool.add()
    for other in (id, beside):
        pool.submit_read(other, text[read_before:])
    run(pool)
    alone.read(text[read_before:])
    ours, info = removed(pool, id), alone.info()
    if learn:  # without learning, one alone reads several mini-batches at once, and more is pending
        assert_same_state(ours.state().read_state, alone.state().read_state)
    ours.save(tmp_path / "s")
    loaded = Session.load(tmp_path / "s", model, ONE_TOKENIZER)
    for session in (ours, loaded):
        mine = session.info()
        assert (mine.tokens, mine.text_bytes, mine.text_digest) == (info.tokens, info.text_bytes, info.text_digest)
        assert mine.learned_norm == pytest.approx(info.learned_norm) and mine.learn == learn
    losses = [
        np.concatenate((session.read(text), session.score_pending()))[-len(text) :] for session in (alone, loaded)
    ]
    np.testing.assert_allclose(*losses, atol=1e-6)
    assert alone.info().text_digest == loaded.info().text_digest


def test_pool_without_learning() -> None:
    model, text = MODELS["window"], tokens_of(33)
    pool = SessionPool(Session(model, learn=False, dtype=F64))
    pool.submit_read(pool.add(), text)
    losses, _, _ = of(run(pool), 0)
    logits, _ = forward(model, start_reading(model, 1, F64), torch.from_numpy(text)[None], F64)
    alone = torch.nn.functional.cross_entropy(logits[0, :-1], torch.from_numpy(text[1:]), reduction="none")
    np.testing.assert_allclose(losses, alone[: len(losses)], atol=1e-6)
    for ours, start in zip(removed(pool, 0).state().read_state.loop.fast, model.initial_fast_weights(1), strict=True):
        torch.testing.assert_close(tuple(ours), tuple(start), rtol=0, atol=0)


def test_generation_ends_with_the_document_and_text_begins_with_bos() -> None:
    model = small_model(vocab_size=ONE_TOKENIZER.vocab_size).requires_grad_(False)
    bos = ONE_TOKENIZER.bos
    pool = SessionPool(Session(model, ONE_TOKENIZER))
    id = pool.add()
    pool.submit_generate(id, max_tokens=2000, options=SamplingOptions(temperature=5.0, top_p=1.0))
    _, written, ends = of(run(pool), id)
    assert 0 < len(written) < 2000 and bos not in written and ends == [None]
    assert removed(pool, id).state().pending.tolist() == [bos]
