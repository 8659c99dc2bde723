"""Many sessions in one batch: each as if it were alone, whoever comes and goes beside it."""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference import session_pool as pool_module
from ttt_e2e.inference.divergence import Diverged
from ttt_e2e.inference.row_batch import single_row
from ttt_e2e.inference.sampling import SamplingOptions, sample
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_pool import Done, Event, Losses, SessionPool, Token
from ttt_e2e.inference.streaming import ReadState, forward, read_mini_batch, start_reading
from ttt_e2e.inference.text_digest import TextDigest
from ttt_e2e.model.transformer import Transformer

F64 = torch.float64
ONE_TOKENIZER = Tokenizer.train([""], 257)
RECURRENT = dict(suffix_layers=0, pattern=("mamba2", "gated-deltanet", "ttt-kvb", "titans"))
PATTERNS = {
    "window": dict(),
    "full": dict(pattern=("full",)),
    "recurrent": RECURRENT,
    "low rank": dict(fast_rank=2),
    "learning over others": dict(pattern=("gated-deltanet", "titans", "window", "window")),
}
SMALL = dict(mamba2__state_size=8, memory__num_persistent_tokens=3, sliding_window=10, mini_batch_size=5)


def model_of(name: str, dtype: torch.dtype = F64) -> Transformer:
    return small_model(dtype, **{**SMALL, **PATTERNS[name]}).requires_grad_(False)


MODELS = {name: model_of(name) for name in PATTERNS}


def tokens_of(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50, length)


def read_alone(model: Transformer, text: np.ndarray, dtype: torch.dtype = F64) -> tuple[ReadState, np.ndarray, int]:
    """The state after the text's whole mini-batches, their losses, and how many tokens those are."""
    state, losses, b = start_reading(model, 1, dtype), [np.empty(0)], model.config.mini_batch_size
    assert b is not None
    while len(text) > state.position + b:
        ids = torch.from_numpy(text[state.position : state.position + b + 1])[None]
        state, nll, _ = read_mini_batch(model, state, ids[:, :-1], ids[:, 1:], dtype=dtype)
        losses.append(nll[0].numpy())
    return state, np.concatenate(losses), state.position


def write_alone(
    model: Transformer, text: np.ndarray, count: int, options: SamplingOptions, dtype: torch.dtype = F64
) -> list[int]:
    state, _, done = read_alone(model, text, dtype)
    ids, written = torch.from_numpy(text[done:])[None], []
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(count):
        logits, state = forward(model, state, ids, dtype)
        written.append(sample(logits[0, -1].float(), options, generator))
        ids = torch.tensor([[written[-1]]])
    return written


def assert_same_state(ours: ReadState, alone: ReadState, tolerance: float = 1e-9) -> None:
    assert ours.position == alone.position and ours.position_offsets_B is None
    torch.testing.assert_close(ours.tensors(), alone.tensors(), rtol=tolerance, atol=tolerance)


def run(pool: SessionPool) -> list[Event]:
    events = []
    for _ in range(1000):
        if not pool.busy:
            return events
        events += pool.step()
    raise AssertionError("the pool never ends")


def of(events: list[Event], id: int) -> tuple[np.ndarray, list[int], list[UserError | None]]:
    """A session's losses, the tokens it wrote, and how its work ended."""
    mine = [event for event in events if event.id == id]
    losses = np.concatenate([np.empty(0), *(event.losses for event in mine if isinstance(event, Losses))])
    return (
        losses,
        [event.token for event in mine if isinstance(event, Token)],
        [event.error for event in mine if isinstance(event, Done)],
    )


class Check:
    """A pool beside what each of its sessions must give, found out by sessions that are alone."""

    def __init__(self, model: Transformer, max_batch: int, dtype: torch.dtype, tolerance: float) -> None:
        self.model, self.dtype, self.tolerance = model, dtype, tolerance
        self.pool = SessionPool(Session(model, dtype=dtype), max_batch=max_batch)
        # Of each session: tokens, how many to write, whether to learn from those.
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
        """Take a session out, in the midst of its work maybe, and compare all it gave so far."""
        peeked, text = self.pool.peek(id).state(), self.pool.remove(id).state()
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
                lonely = [*session.generate_tokens(text_so_far, max_tokens=count, learn_from_writing=True, seed=i + 1)]
            else:
                lonely = write_alone(self.model, text_so_far, count, options, self.dtype)
            expected = lonely if i < len(ends) else lonely[: len(written)]
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
    assert len(check.pool) == 0


@given(
    actions=st.lists(ACTIONS, min_size=10, max_size=30),
    max_batch=st.integers(1, 5),
    replay=st.sampled_from([1, 3, pool_module._REPLAY]),
)
@settings(max_examples=40, deadline=None)
def test_each_session_is_as_if_alone(actions: list[tuple], max_batch: int, replay: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "_REPLAY", replay)
        play(Check(MODELS["window"], max_batch, F64, 1e-9), actions)


@pytest.mark.parametrize("name", sorted(set(PATTERNS) - {"window"}))
@given(actions=st.lists(ACTIONS, min_size=10, max_size=25))
@settings(max_examples=8, deadline=None)
def test_each_session_is_as_if_alone_with_every_mixer(name: str, actions: list[tuple]) -> None:
    play(Check(MODELS[name], 4, F64, 1e-9), actions)


def test_as_if_alone_in_single_precision() -> None:
    model = model_of("window", torch.float32)
    check = Check(model, 4, torch.float32, 1e-5)
    rng = np.random.default_rng(0)
    actions: list[tuple] = []
    for _ in range(60):
        name = rng.choice(["add", "remove", "read", "read", "write", "step", "step"])
        numbers = {"remove": [99], "read": [99, 30], "write": [99, 12, 14, 2]}.get(name, [])
        actions.append((name, *(int(rng.integers(1, top)) for top in numbers)))
    play(check, actions)


# -- calls -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many rows each call had, by the name of the function."""
    rows: dict[str, list[int]] = defaultdict(list)

    def count(name: str) -> None:
        plain = getattr(pool_module, name)

        def counted(model: Transformer, state: ReadState, ids: torch.Tensor, *args: object, **more: object) -> object:
            rows[name].append(len(ids))
            return plain(model, state, ids, *args, **more)

        monkeypatch.setattr(pool_module, name, counted)

    count("forward")
    count("read_rows")
    return rows


def pool_at(model: Transformer, lengths: list[int], max_batch: int = 16) -> SessionPool:
    """A pool whose sessions have read so many tokens."""
    pool = SessionPool(Session(model, dtype=F64), max_batch=max_batch)
    for i, length in enumerate(lengths):
        pool.submit_read(pool.add(), tokens_of(length, i))
    run(pool)
    return pool


def test_rows_at_different_positions_share_a_call(calls: dict[str, list[int]]) -> None:
    pool = pool_at(MODELS["window"], [11, 16, 46, 21])  # all with a full window
    calls.clear()
    for id in range(4):
        pool.submit_read(id, tokens_of(10, 10 + id))
    run(pool)
    assert calls["read_rows"] == [4, 4]
    for id in range(4):
        pool.submit_generate(id, tokens_of(2), max_tokens=6)
    run(pool)
    assert calls["forward"] == [4] * 6


@pytest.mark.parametrize("name", ["window", "full"])
def test_texts_of_different_lengths_are_written_on_in_one_call(name: str, calls: dict[str, list[int]]) -> None:
    pool = SessionPool(Session(MODELS[name], dtype=F64))
    texts = [tokens_of(length, length) for length in (2, 3, 4)]
    for text in texts:
        pool.submit_generate(pool.add(), text, max_tokens=15)  # up to a full window and beyond
    events = run(pool)
    assert calls["forward"] == [1, 1, 1] + [2, 1] + [3] * 13  # caches of 4 slots are twice as long as those of 2
    for id, text in enumerate(texts):
        assert of(events, id)[1] == write_alone(MODELS[name], text, 15, SamplingOptions())


def test_no_call_has_too_many_rows(calls: dict[str, list[int]]) -> None:
    pool = pool_at(MODELS["window"], [11] * 7, max_batch=3)
    calls.clear()
    for id in range(7):
        pool.submit_generate(id, tokens_of(2, id), max_tokens=2)
    run(pool)
    assert calls["forward"] == [3, 3, 1] * 2


def test_what_stays_together_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_at(MODELS["window"], [11, 16, 46])
    copied = []
    plain = pool_module.gather

    def gathered(rows: list, copy: bool = False) -> object:
        stack = plain(rows, copy)
        copied.append(all(row.batch is not stack for row in rows))
        return stack

    monkeypatch.setattr(pool_module, "gather", gathered)
    monkeypatch.setattr(pool_module, "_REPLAY", 5)
    for id in range(3):
        pool.submit_read(id, tokens_of(20, id))
        pool.submit_generate(id, tokens_of(3, id), max_tokens=5)
    run(pool)
    assert copied == [True] + [False] * 8
    copied.clear()
    for id in range(3):
        pool.submit_read(id, tokens_of(60, id))
    run(pool)  # in place while it can be read again in five mini-batches at most
    assert copied == [False] + [True, False, False, False, False] * 2 + [True]


def test_a_mini_batch_takes_the_memory_of_the_one_before() -> None:
    model = MODELS["window"]
    pool = pool_at(model, [26, 26])

    def places() -> list[int]:
        return [w.data_ptr() for pair in pool._slots[1].own.row.batch.state.loop.fast for w in pair]

    before = places()
    peeked, state = pool.peek(0).state().read_state, read_alone(model, tokens_of(26))[0]
    for id in range(2):
        pool.submit_read(id, tokens_of(10, 7))
    run(pool)
    assert places() == before
    assert_same_state(peeked, state)  # what was given away before stays as it is


def test_readers_take_turns_and_writers_never_wait() -> None:
    model = MODELS["window"]
    pool = pool_at(model, [11] * 5 + [6, 1], max_batch=2)  # of three shapes, and more than fit into a call
    for id in range(6):
        pool.submit_read(id, tokens_of(50, id))
    pool.submit_generate(6, tokens_of(2), max_tokens=16)
    reads: list[set[int]] = []
    for _ in range(16):
        events = pool.step()
        assert [event.id for event in events if isinstance(event, Token)] == [6]
        reads.append({event.id for event in events if isinstance(event, Losses)})
    for first in range(10):  # everyone in so many steps as there are readers
        assert set().union(*reads[first : first + 6]) == set(range(6))


def test_rows_that_are_left_behind_keep_little_memory() -> None:
    pool = pool_at(MODELS["window"], [11] * 8)
    for id in range(7):
        pool.remove(id)
    pool.step()
    (member,) = pool._slots.values()
    rows = member.own.rows
    assert len(rows) == 2
    assert [len(row.batch.positions) for row in rows] == [1, 1]
    assert all(len(t.untyped_storage()) == t.nbytes for row in rows for t in row.batch.state.tensors())
    text = pool.remove(7).state()
    state, _, done = read_alone(MODELS["window"], tokens_of(11, 7))
    assert_same_state(text.read_state, state)
    assert text.pending.tolist() == tokens_of(11, 7)[done:].tolist()


def test_a_session_comes_back_where_it_left() -> None:
    model, text = MODELS["window"], tokens_of(60)
    first, second = SessionPool(Session(model, dtype=F64)), SessionPool(Session(model, dtype=F64))
    one = first.add()
    first.submit_read(one, text[:33])
    other = second.add()
    second.submit_read(other, tokens_of(33, 1))
    run(first), run(second)
    moved = second.add(first.remove(one))
    second.submit_read(moved, text[33:])
    run(second)
    state, _, done = read_alone(model, text)
    left = second.remove(moved).state()
    assert_same_state(left.read_state, state)
    np.testing.assert_array_equal(left.pending, text[done:])


def test_a_session_joins_and_stays_as_it_is() -> None:
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
def test_a_session_that_went_through_a_pool_is_like_any_other(tmp_path: Path, learn: bool, read_before: int) -> None:
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
    ours, info = pool.remove(id), alone.info()
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


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def poisoned(session: Session) -> Session:
    """The session with fast weights that are not numbers."""
    state = session.state()
    loop = state.read_state.loop
    fast = tuple(type(pair)(*(w * math.nan for w in pair)) for pair in loop.fast)
    return session.with_state(
        state._replace(read_state=state.read_state._replace(loop=loop._replace(fast=fast)))
    )


def test_a_row_that_fails_does_not_spoil_others() -> None:
    model = MODELS["window"]
    pool = pool_at(model, [26] * 3)
    bad = pool.add(poisoned(pool.remove(1)))
    for id in (0, bad, 2):
        pool.submit_read(id, tokens_of(15, 20 + id))
        pool.submit_generate(id, tokens_of(3), max_tokens=4, options=SamplingOptions(seed=id))
    events = run(pool)
    losses, written, ends = of(events, bad)
    assert len(losses) == 0 and written == []
    assert len(ends) == 1 and isinstance(ends[0], Diverged) and "25 to 30" in str(ends[0])
    for id in (0, 2):
        losses, written, ends = of(events, id)
        text = np.concatenate((tokens_of(26, id), tokens_of(15, 20 + id)))
        assert ends == [None, None]
        np.testing.assert_allclose(losses, read_alone(model, text)[1][25:], atol=1e-9)
        options = SamplingOptions(seed=id)
        assert written == write_alone(model, np.concatenate((text, tokens_of(3))), 4, options)
        assert_same_state(pool.remove(id).state().read_state, read_alone(model, text)[0])


def test_a_row_that_fails_writing_does_not_spoil_others() -> None:
    model = MODELS["window"]
    pool = pool_at(model, [26] * 2)
    bad = pool.add(poisoned(pool.remove(1)))
    for id in (0, bad):
        pool.submit_generate(id, max_tokens=4)
    events = run(pool)
    assert of(events, 0)[1:] == (write_alone(model, tokens_of(26), 4, SamplingOptions()), [None])
    _, written, ends = of(events, bad)
    assert written == [] and len(ends) == 1 and "not finite" in str(ends[0])


def test_divergence_goes_back_to_the_last_good_state() -> None:
    model, text = MODELS["window"], tokens_of(31)
    pool = pool_at(model, [31, 31])
    pool.submit_read(0, tokens_of(5, 2))  # the update of this mini-batch turns out bad
    run(pool)
    own = pool._slots[0].own
    own.row = single_row(poisoned(pool.peek(0)).state().read_state)
    for id in (0, 1):
        pool.submit_read(id, tokens_of(10, 7))
    events = run(pool)
    (error,) = of(events, 0)[2]
    assert isinstance(error, Diverged) and error.position == 30 and "35 to 40" in str(error)
    assert of(events, 1)[2] == [None]
    more = tokens_of(20, 8)
    pool.submit_read(0, more)  # it can be read on from there
    assert of(run(pool), 0)[2] == [None]
    assert_same_state(pool.remove(0).state().read_state, read_alone(model, np.concatenate((text, more)))[0])


@pytest.mark.parametrize("mini_batches", [1, 2, 4])
@pytest.mark.parametrize("what", ["weights", "gradient"])
def test_a_text_read_in_place_is_read_again_to_its_last_good_state(
    mini_batches: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text, more = MODELS["window"], tokens_of(26), tokens_of(5 * mini_batches, 2)
    pool = pool_at(model, [26, 31])
    for id in range(2):
        pool.submit_read(id, more)
    run(pool)
    own = pool._slots[0].own
    if what == "weights":  # the last update turns out bad
        own.row.batch.state.loop.fast[0][0][own.row.row_index] *= math.nan
    else:
        plain = pool_module.read_rows

        def read(*args: object, **more: object) -> object:
            after, losses, norms = plain(*args, **more)  # type: ignore[arg-type]
            norms[own.row.row_index] = math.nan
            return after, losses, norms

        monkeypatch.setattr(pool_module, "read_rows", read)
    for id in range(2):
        pool.submit_read(id, tokens_of(5, 7))
    events = run(pool)
    (error,) = of(events, 0)[2]
    kept = 25 + 5 * mini_batches - (5 if what == "weights" else 0)
    assert isinstance(error, Diverged) and error.position == kept and "back at its last good" in str(error)
    left = pool.remove(0).state()
    whole = np.concatenate((text, more))
    assert_same_state(left.read_state, read_alone(model, whole[: kept + 1])[0])
    assert left.pending.tolist() == whole[kept : kept + 1].tolist()
    assert left.text == TextDigest().add(whole[:kept], 5, None)
    assert of(events, 1)[2] == [None]
    beside = np.concatenate((tokens_of(31, 1), more, tokens_of(5, 7)))
    assert_same_state(pool.remove(1).state().read_state, read_alone(model, beside)[0])


def test_a_text_that_goes_wrong_again_while_it_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_REPLAY", 3)
    pool = pool_at(MODELS["window"], [26, 26])
    own = pool._slots[0].own
    assert own.checkpoint is not None and own.checkpoint.row.position == 15
    for row in own.rows:
        row.batch.state.loop.fast[0][0][row.row_index] *= math.nan
    for id in range(2):
        pool.submit_read(id, tokens_of(5, 7))
    events = run(pool)
    (error,) = of(events, 0)[2]
    assert isinstance(error, Diverged) and error.position == own.row.position == 15
    assert own.pending.tolist() == tokens_of(26)[error.position : error.position + 1].tolist()
    assert of(events, 1)[2] == [None]


def test_ctrl_c_amid_an_update_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = MODELS["window"], [tokens_of(26), tokens_of(26, 1)]
    pool, plain = pool_at(model, [26, 26]), pool_module.read_rows

    def read(*args: object, **more: object) -> object:
        before = args[1].loop.fast[0][0].clone()  # type: ignore[attr-defined]
        plain(*args, **more)  # type: ignore[arg-type]
        assert not torch.equal(args[1].loop.fast[0][0], before)  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "read_rows", read)
        for id in range(2):
            pool.submit_read(id, tokens_of(10, 7))
        with pytest.raises(KeyboardInterrupt):
            pool.step()
    for id, text in enumerate(texts):
        assert_same_state(pool.peek(id).state().read_state, read_alone(model, text)[0])
    run(pool)
    for id, text in enumerate(texts):
        whole = np.concatenate((text, tokens_of(10, 7)))
        assert_same_state(pool.remove(id).state().read_state, read_alone(model, whole)[0])


def test_a_learning_rate_that_is_too_large_ends_every_session_at_its_start() -> None:
    model = small_model(inner_loop__lr=1e30).requires_grad_(False)
    pool = SessionPool(Session(model))
    for id in (pool.add(), pool.add()):
        pool.submit_read(id, tokens_of(30, id))
        pool.submit_read(id, tokens_of(30, id))
    events = run(pool)
    for id in range(2):
        (error,) = of(events, id)[2]
        assert isinstance(error, Diverged) and error.position == 0
        text = pool.remove(id).state()
        assert text.read_state.position == 0 and text.pending.tolist() == tokens_of(1, id).tolist()


def test_a_pool_can_leave_learning_out() -> None:
    model, text = MODELS["window"], tokens_of(33)
    pool = SessionPool(Session(model, learn=False, dtype=F64))
    pool.submit_read(pool.add(), text)
    losses, _, _ = of(run(pool), 0)
    logits, _ = forward(model, start_reading(model, 1, F64), torch.from_numpy(text)[None], F64)
    alone = torch.nn.functional.cross_entropy(logits[0, :-1], torch.from_numpy(text[1:]), reduction="none")
    np.testing.assert_allclose(losses, alone[: len(losses)], atol=1e-6)
    for ours, start in zip(pool.remove(0).state().read_state.loop.fast, model.initial_fast_weights(1), strict=True):
        torch.testing.assert_close(tuple(ours), tuple(start), rtol=0, atol=0)


def test_writing_ends_at_a_documents_end_and_text_begins_with_bos() -> None:
    model = small_model(vocab_size=ONE_TOKENIZER.vocab_size).requires_grad_(False)
    bos = ONE_TOKENIZER.bos
    pool = SessionPool(Session(model, ONE_TOKENIZER))
    id = pool.add()
    pool.submit_generate(id, max_tokens=2000, options=SamplingOptions(temperature=5.0, top_p=1.0))
    _, written, ends = of(run(pool), id)
    assert 0 < len(written) < 2000 and bos not in written and ends == [None]
    assert pool.remove(id).state().pending.tolist() == [bos]


def test_work_can_be_cancelled() -> None:
    model, text = MODELS["window"], tokens_of(40)
    pool = pool_at(model, [1, 1])
    pool.submit_read(0, text)
    pool.submit_generate(1, max_tokens=50)
    pool.step()
    pool.cancel(0), pool.cancel(1)
    assert not pool.busy and pool.step() == []
    left = pool.remove(0).state()
    assert left.read_state.position == 5
    np.testing.assert_array_equal(left.pending, np.concatenate((tokens_of(1), text))[5:])


def test_what_cannot_be_done_is_said() -> None:
    model = MODELS["window"]
    pool = SessionPool(Session(model, dtype=F64))
    id = pool.add()
    for bad in ([-1], [50], [0.5], [[1, 2]]):
        with pytest.raises(UserError, match="0 to 49"):
            pool.submit_read(id, np.array(bad))
    with pytest.raises(UserError, match="max_tokens"):
        pool.submit_generate(id, max_tokens=-1)
    for call in (pool.remove, pool.cancel, lambda id: pool.submit_read(id, [1]), pool.submit_generate):
        with pytest.raises(UserError, match="no session 7"):
            call(7)
    with pytest.raises(UserError, match="max_batch"):
        SessionPool(Session(model), max_batch=0)
    pool.submit_generate(id)
    (done,) = run(pool)
    assert done.id == id and "no text to continue" in str(done.error)
    assert pool.step() == []
