"""The engine reads: many sessions at the same time, and each text as a whole or not at all."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import (
    F64,
    MODEL,
    STORY,
    TOKENIZER,
    HeldText,
    assert_same,
    collect,
    diverging_at,
    export,
    file_of,
    generate,
    having_read,
    hold_saving,
    read,
    text_of,
    until,
    with_engine,
)
from helpers import small_model

from ttt_e2e.errors import UserError
from ttt_e2e.inference.divergence import Diverged
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import model_fingerprint
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.records import SessionSummary
from ttt_e2e.server.engine.store import Store


@pytest.mark.parametrize("learn", [True, False])
def test_concurrent_sessions_equal_sessions_that_read_alone(tmp_path: Path, learn: bool) -> None:
    template = Session(MODEL, TOKENIZER, learn=learn, dtype=F64)
    texts = [[text_of(10 * i + j, 4 + 7 * i) for j in range(2)] for i in range(7)]

    async def read_texts(engine: Engine, i: int) -> SessionSummary:
        owner = f"owner {i % 2}"
        summary = await engine.sessions.create(owner)
        for text in texts[i]:
            chunks = [text[start : start + 7] for start in range(0, len(text), 7)]
            *before, last = await collect(engine.read(owner, summary.id, chunks))
            assert all(progress.session is None and progress.recent_loss is not None for progress in before)
            assert last.session is not None
            summary = last.session
        return summary

    async def work(engine: Engine) -> None:
        for i, summary in enumerate(await asyncio.gather(*(read_texts(engine, i) for i in range(7)))):
            alone = having_read(*texts[i], template=template)
            info = alone.info()
            assert summary == await engine.sessions.summary(f"owner {i % 2}", summary.id)
            assert (summary.tokens, summary.text_bytes, summary.text_digest, summary.learn) == (
                info.tokens,
                info.text_bytes,
                info.text_digest,
                learn,
            )
            ours = await export(engine, f"owner {i % 2}", summary.id, tmp_path)
            if learn:
                assert_same(ours, alone)
            losses = [np.concatenate((s.read(STORY), s.score_pending()))[-20:] for s in (ours, alone)]
            np.testing.assert_allclose(*losses, atol=1e-6)

    with_engine(tmp_path / "data", work, template, max_batch=4)


def test_progress_counts_the_tokens_of_this_text_only(tmp_path: Path) -> None:
    first, second = text_of(1), text_of(2)
    alone = having_read(first)
    waiting = alone.pending
    losses = alone.read(second)[waiting:]

    async def work(engine: Engine) -> None:
        id = (await engine.sessions.create("me")).id
        await read(engine, "me", id, first)
        *before, last = await collect(engine.read("me", id, [second]))
        assert [p.tokens for p in before] == sorted({p.tokens for p in (*before, last)})
        sums = np.diff([0, *(p.tokens for p in before)]) * [p.recent_loss for p in before]
        assert sums.sum() == pytest.approx(float(losses.sum()), rel=1e-5)
        assert (last.tokens, last.recent_loss) == (len(losses), None)
        assert last.loss == before[-1].loss == pytest.approx(float(losses.mean()), rel=1e-5)
        (empty,) = await collect(engine.read("me", id, []))
        assert (empty.tokens, empty.loss, empty.recent_loss, empty.session) == (0, None, None, last.session)

    with_engine(tmp_path, work)


def test_changes_of_one_session_run_one_after_another(tmp_path: Path) -> None:
    texts = [text_of(i) for i in range(4)]

    async def work(engine: Engine) -> None:
        id = (await engine.sessions.create("me")).id
        await asyncio.gather(*(read(engine, "me", id, text) for text in texts))
        assert_same(await export(engine, "me", id, tmp_path), having_read(*texts))

    with_engine(tmp_path / "data", work)


def test_generate_and_fork_do_not_wait_for_a_read(tmp_path: Path) -> None:
    first, held = text_of(1), HeldText(text_of(2))

    async def work(engine: Engine) -> None:
        id = (await engine.sessions.create("me")).id
        await read(engine, "me", id, first)
        reading = asyncio.create_task(collect(engine.read("me", id, held)))
        await asyncio.to_thread(held.reached.wait)
        text, _ = await generate(engine, "me", id, "Rain", max_tokens=20)
        assert text == "".join(having_read(first).generate("Rain", max_tokens=20))
        fork = await engine.sessions.fork("me", id)
        assert fork.text_digest == (await engine.sessions.summary("me", id)).text_digest
        held.release.set()
        await reading
        assert_same(await export(engine, "me", id, tmp_path), having_read(first, held.text))
        assert_same(await export(engine, "me", fork.id, tmp_path), having_read(first))

    with_engine(tmp_path / "data", work)


def test_chunks_are_taken_in_threads_and_only_slightly_ahead(tmp_path: Path) -> None:
    threads: list[int] = []

    def endless_text() -> Iterator[str]:
        while True:
            threads.append(threading.get_ident())
            yield STORY * 200

    async def work(engine: Engine) -> None:
        id = (await engine.sessions.create("me")).id
        reading = engine.read("me", id, endless_text())
        for _ in range(20):
            await anext(reading)
        await reading.aclose()  # type: ignore[attr-defined]
        assert 1 <= len(threads) <= 3 and threading.get_ident() not in threads
        await until(lambda: engine.stats()["running"] == 0)
        await generate(engine, "me", None, "Rain", max_tokens=1)  # the model has ended the reading before this
        tokens = engine.stats()["tokens_read"]
        await generate(engine, "me", None, "Rain", max_tokens=20)
        assert engine.stats()["tokens_read"] == tokens

    with_engine(tmp_path, work)


def test_incomplete_read_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = text_of(1), text_of(2, 40)
    alone = having_read(first)

    def broken() -> Iterator[str]:
        yield second
        raise RuntimeError("no more of it")

    def invalid() -> Iterator[str]:
        yield second
        yield "\ud800"

    async def closed(engine: Engine, id: str) -> None:
        reading = engine.read("me", id, [second])
        await anext(reading)
        await reading.aclose()  # type: ignore[attr-defined]

    async def cancelled(engine: Engine, id: str) -> None:
        held = HeldText(second)
        task = asyncio.create_task(collect(engine.read("me", id, held)))
        await asyncio.to_thread(held.reached.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        held.release.set()

    async def failed(engine: Engine, id: str) -> None:
        with pytest.raises(RuntimeError, match="no more"):
            await collect(engine.read("me", id, broken()))
        with pytest.raises(UserError, match="surrogate"):
            await collect(engine.read("me", id, invalid()))

    async def diverged(engine: Engine, id: str) -> None:
        with diverging_at(alone.position + 10, monkeypatch), pytest.raises(Diverged, match=r"made up.*unchanged"):
            await read(engine, "me", id, second)

    async def on_a_full_disk(engine: Engine, id: str) -> None:
        def full(*_: object) -> None:
            raise UserError("No space left.")

        with monkeypatch.context() as patch:
            patch.setattr(Store, "replace", full)
            with pytest.raises(UserError, match="No space"):
                await read(engine, "me", id, second)
            with pytest.raises(UserError, match="No space"):
                await generate(engine, "me", id, "Rain", max_tokens=3, learn=True)

    async def work(engine: Engine) -> None:
        id = (await engine.sessions.create("me")).id
        before = (await read(engine, "me", id, first)).session
        for failure in (closed, cancelled, failed, diverged, on_a_full_disk):
            await failure(engine, id)
            assert await engine.sessions.summary("me", id) == before, failure
            assert_same(await export(engine, "me", id, tmp_path), alone)
            assert_same(Session.load(file_of(tmp_path / "data", id), MODEL, TOKENIZER), alone)
        await read(engine, "me", id, second)
        assert_same(await export(engine, "me", id, tmp_path), having_read(first, second))

    with_engine(tmp_path / "data", work)


def test_last_update_is_checked_before_it_is_saved(tmp_path: Path) -> None:
    model = small_model(F64, vocab_size=TOKENIZER.vocab_size, inner_loop__lr=1.0).requires_grad_(False)
    object.__setattr__(model.config.inner_loop, "lr", float("inf"))  # out of range: every update goes wrong
    template = Session(model, TOKENIZER, dtype=F64)
    ids = TOKENIZER.encode(text_of(1))

    async def work(engine: Engine) -> None:
        summary = await engine.sessions.create("me")
        for count in (template.mini_batch_size, template.mini_batch_size + 2):  # without and with a pending token
            text = TOKENIZER.decode(ids[:count])
            assert len(TOKENIZER.encode(text)) == count
            with pytest.raises(Diverged, match=r"diverged.*unchanged"):
                await read(engine, "me", summary.id, text)
            assert await engine.sessions.summary("me", summary.id) == summary
        assert (await read(engine, "me", summary.id, TOKENIZER.decode(ids[:2]))).session is not None

    with_engine(tmp_path / "data", work, template)


def test_save_is_completed_after_the_client_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = text_of(1), text_of(2)

    async def work(engine: Engine) -> None:
        id = (await engine.sessions.create("me")).id
        saving, release = hold_saving(monkeypatch)
        task = asyncio.create_task(read(engine, "me", id, first))
        await asyncio.to_thread(saving.wait)
        assert (await engine.sessions.summaries("me"))[0].tokens == 1  # unchanged until the new version is on disk
        lookup = asyncio.create_task(engine.sessions.summary("me", id))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        after = asyncio.create_task(read(engine, "me", id, second))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not lookup.done()  # it waits for the new version
        release.set()
        assert (await lookup).tokens == having_read(first).info().tokens
        await after
        assert_same(await export(engine, "me", id, tmp_path), having_read(first, second))

    with_engine(tmp_path / "data", work)


def test_failed_step_ends_the_running_requests_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError("not enough of it")

    async def work(engine: Engine) -> None:
        ids = [(await engine.sessions.create("me")).id for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr("ttt_e2e.inference.session_pool.read_rows", no_memory)
            tasks = [asyncio.create_task(read(engine, "me", id, text_of(1))) for id in ids]
            for task in tasks:
                with pytest.raises(MemoryError):
                    await task
            assert engine.ready
            for _ in range(3):
                with pytest.raises(MemoryError):
                    await read(engine, "me", ids[0], text_of(1))
            assert not engine.ready  # the operator of the service should look into it
        for id in ids:
            await read(engine, "me", id, text_of(1))
            assert_same(await export(engine, "me", id, tmp_path), having_read(text_of(1)))

    with_engine(tmp_path / "data", work)


def test_model_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[object] = []

    def counted(model: Transformer) -> str:
        hashed.append(model)
        return model_fingerprint(model)

    async def work(engine: Engine) -> None:
        first, second = [(await engine.sessions.create("me")).id for _ in range(2)]
        await read(engine, "me", first, text_of(1))
        await read(engine, "me", second, text_of(2))
        await generate(engine, "me", first, "And", max_tokens=3, learn=True)
        await engine.sessions.fork("me", first)

    monkeypatch.setattr("ttt_e2e.inference.session_file.model_fingerprint", counted)
    with_engine(tmp_path / "data", work, Session(MODEL, TOKENIZER, dtype=F64))
    assert len(hashed) == 1
