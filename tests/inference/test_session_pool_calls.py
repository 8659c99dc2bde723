"""Which rows of a session pool share a call, and whose memory they take."""

from collections import defaultdict

import pytest
import torch
from inference_helpers import tokens_of
from pool_helpers import F64, MODELS, assert_same_state, generate_alone, of, pool_at, read_alone, removed, run

from ttt_e2e.inference import session_pool as pool_module
from ttt_e2e.inference.pool_requests import Losses, Token
from ttt_e2e.inference.sampling import SamplingOptions
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_pool import SessionPool
from ttt_e2e.inference.streaming import ReadState
from ttt_e2e.model.transformer import Transformer


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
def test_texts_of_different_lengths_generate_in_one_call(name: str, calls: dict[str, list[int]]) -> None:
    pool = SessionPool(Session(MODELS[name], dtype=F64))
    texts = [tokens_of(length, length) for length in (2, 3, 4)]
    for text in texts:
        pool.submit_generate(pool.add(), text, max_tokens=15)  # up to a full window and beyond
    events = run(pool)
    assert calls["forward"] == [1, 1, 1] + [2, 1] + [3] * 13  # caches of 4 slots are twice as long as those of 2
    for id, text in enumerate(texts):
        assert of(events, id)[1] == generate_alone(MODELS[name], text, 15, SamplingOptions())


def test_calls_have_at_most_max_batch_rows(calls: dict[str, list[int]]) -> None:
    pool = pool_at(MODELS["window"], [11] * 7, max_batch=3)
    calls.clear()
    for id in range(7):
        pool.submit_generate(id, tokens_of(2, id), max_tokens=2)
    run(pool)
    assert calls["forward"] == [3, 3, 1] * 2


def test_rows_that_stay_together_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_at(MODELS["window"], [11, 16, 46])
    copied = []
    plain = pool_module.gather

    def gathered(rows: list, copy: bool = False) -> object:
        stack = plain(rows, copy)
        copied.append(all(row.batch is not stack for row in rows))
        return stack

    monkeypatch.setattr(pool_module, "gather", gathered)
    monkeypatch.setattr(pool_module, "MAX_REPLAY", 5)
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


def test_mini_batch_takes_the_memory_of_the_one_before() -> None:
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


def test_readers_take_turns_and_generation_never_waits() -> None:
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


def test_rows_left_in_a_state_keep_little_memory() -> None:
    pool = pool_at(MODELS["window"], [11] * 8)
    for id in range(7):
        removed(pool, id)
    pool.step()
    (member,) = pool._slots.values()
    rows = member.own.rows
    assert len(rows) == 2
    assert [len(row.batch.positions) for row in rows] == [1, 1]
    assert all(len(t.untyped_storage()) == t.nbytes for row in rows for t in row.batch.state.tensors())
    text = removed(pool, 7).state()
    state, _, done = read_alone(MODELS["window"], tokens_of(11, 7))
    assert_same_state(text.read_state, state)
    assert text.pending.tolist() == tokens_of(11, 7)[done:].tolist()
