"""Session pools: rows that diverge, interrupts, and invalid requests."""

import math

import numpy as np
import pytest
import torch
from helpers import small_model
from inference_helpers import tokens_of
from pool_helpers import (
    F64,
    MODELS,
    assert_same_state,
    generate_alone,
    of,
    poisoned,
    pool_at,
    read_alone,
    removed,
    run,
)

from ttt_e2e.errors import UserError
from ttt_e2e.inference import session_pool as pool_module
from ttt_e2e.inference.divergence import Diverged
from ttt_e2e.inference.row_batch import single_row
from ttt_e2e.inference.sampling import SamplingOptions
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_pool import SessionPool
from ttt_e2e.inference.text_digest import TextDigest


def test_row_that_fails_does_not_affect_others() -> None:
    model = MODELS["window"]
    pool = pool_at(model, [26] * 3)
    bad = pool.add(poisoned(removed(pool, 1)))
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
        assert written == generate_alone(model, np.concatenate((text, tokens_of(3))), 4, options)
        assert_same_state(removed(pool, id).state().read_state, read_alone(model, text)[0])


def test_row_that_fails_to_generate_does_not_affect_others() -> None:
    model = MODELS["window"]
    pool = pool_at(model, [26] * 2)
    bad = pool.add(poisoned(removed(pool, 1)))
    for id in (0, bad):
        pool.submit_generate(id, max_tokens=4)
    events = run(pool)
    assert of(events, 0)[1:] == (generate_alone(model, tokens_of(26), 4, SamplingOptions()), [None])
    _, written, ends = of(events, bad)
    assert written == [] and len(ends) == 1 and "not finite" in str(ends[0])


def test_divergence_restores_the_last_good_state() -> None:
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
    assert_same_state(removed(pool, 0).state().read_state, read_alone(model, np.concatenate((text, more)))[0])


@pytest.mark.parametrize("mini_batches", [1, 2, 4])
@pytest.mark.parametrize("what", ["weights", "gradient"])
def test_divergence_in_place_replays_to_the_last_good_state(
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
    left = removed(pool, 0).state()
    whole = np.concatenate((text, more))
    assert_same_state(left.read_state, read_alone(model, whole[: kept + 1])[0])
    assert left.pending.tolist() == whole[kept : kept + 1].tolist()
    assert left.text == TextDigest().add(whole[:kept], 5, None)
    assert of(events, 1)[2] == [None]
    beside = np.concatenate((tokens_of(31, 1), more, tokens_of(5, 7)))
    assert_same_state(removed(pool, 1).state().read_state, read_alone(model, beside)[0])


def test_divergence_during_replay_restores_the_state_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_REPLAY", 3)
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


def test_ctrl_c_during_an_update_in_place_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert_same_state(removed(pool, id).state().read_state, read_alone(model, whole)[0])


def test_too_large_learning_rate_returns_every_session_to_its_start() -> None:
    model = small_model(inner_loop__lr=1e30).requires_grad_(False)
    pool = SessionPool(Session(model))
    for id in (pool.add(), pool.add()):
        pool.submit_read(id, tokens_of(30, id))
        pool.submit_read(id, tokens_of(30, id))
    events = run(pool)
    for id in range(2):
        (error,) = of(events, id)[2]
        assert isinstance(error, Diverged) and error.position == 0
        text = removed(pool, id).state()
        assert text.read_state.position == 0 and text.pending.tolist() == tokens_of(1, id).tolist()


def test_invalid_requests_are_rejected() -> None:
    model = MODELS["window"]
    pool = SessionPool(Session(model, dtype=F64))
    id = pool.add()
    for bad in ([-1], [50], [0.5], [[1, 2]]):
        with pytest.raises(UserError, match="0 to 49"):
            pool.submit_read(id, np.array(bad))
    with pytest.raises(UserError, match="max_tokens"):
        pool.submit_generate(id, max_tokens=-1)
    for call in (pool.peek, pool.drop, lambda id: pool.submit_read(id, [1]), pool.submit_generate):
        with pytest.raises(UserError, match="no session 7"):
            call(7)
    with pytest.raises(UserError, match="max_batch"):
        SessionPool(Session(model), max_batch=0)
    pool.submit_generate(id)
    (done,) = run(pool)
    assert done.id == id and "no text to continue" in str(done.error)
    assert pool.step() == []
