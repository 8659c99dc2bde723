"""The engine: many people's sessions at once, each whole or as it was, whatever happens.

Run as a program, this file is what the test of `kill -9` kills: see `be_killed`.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from helpers import small_model

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference import session_pool as pool_module
from ttt_e2e.inference.sampling import SamplingOptions
from ttt_e2e.inference.session import Diverged, Session
from ttt_e2e.inference.session_file import model_fingerprint
from ttt_e2e.server.engine import Engine
from ttt_e2e.server.records import NoSession, Progress, SessionRecord, Stopping, TooMuch
from ttt_e2e.server.store import Store

F64 = torch.float64
STORY = "Die Straße war naß – 雨が降った 🌧️. The rain had stopped; the street was still wet.\n"
TOKENIZER = Tokenizer.train([STORY], 280)
MODEL = small_model(F64, vocab_size=TOKENIZER.vocab_size).requires_grad_(False)
FRESH = Session(MODEL, TOKENIZER, dtype=F64)

_T = TypeVar("_T")


def text_of(seed: int, words: int = 22) -> str:
    choices = random.Random(seed)
    return " ".join(choices.choices(STORY.split(), k=words)) + "\n"


def having_read(*texts: str, fresh: Session = FRESH) -> Session:
    session = fresh.fork()
    for text in texts:
        session.read(text)
    return session


def served(folder: Path, work: Callable[[Engine], Awaitable[_T]], fresh: Session = FRESH, **options: Any) -> _T:
    """What comes of work with an engine over the store in `folder`."""

    async def serve() -> _T:
        engine = Engine(fresh.model, TOKENIZER, Store(folder), dtype=fresh.dtype, learn=fresh.learn, **options)
        await engine.start()
        try:
            return await asyncio.wait_for(work(engine), 60)
        finally:
            await engine.stop()

    return asyncio.run(serve())


async def read(engine: Engine, owner: str, id: str, text: str) -> Progress:
    return [progress async for progress in engine.read(owner, id, [text])][-1]


async def written(engine: Engine, owner: str, id: str | None, prompt: str, **more: Any) -> tuple[str, str | None]:
    """What was written, and why it ended."""
    more.setdefault("options", SamplingOptions())
    pieces = [piece async for piece in engine.generate(owner, id, prompt, **more)]
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    return "".join(piece.text for piece in pieces), pieces[-1].finish_reason


async def exported(engine: Engine, owner: str, id: str, folder: Path) -> Session:
    target = folder / f"exported-{id}-{time.monotonic_ns()}"
    await engine.export(owner, id, target)
    return Session.load(target, FRESH.model, TOKENIZER)


def assert_same(ours: Session, alone: Session, tolerance: float = 1e-9) -> None:
    mine, theirs = ours.standing(), alone.standing()
    assert (mine.text, mine.state.position) == (theirs.text, theirs.state.position)
    np.testing.assert_array_equal(mine.pending, theirs.pending)
    torch.testing.assert_close(mine.state.tensors(), theirs.state.tensors(), rtol=tolerance, atol=tolerance)
    assert ours.info().text_digest == alone.info().text_digest


async def until(what: Callable[[], bool]) -> None:
    """Let others go on until something is so."""
    while not what():
        await asyncio.sleep(0.001)


class Gate:
    """Pieces of a text that come up to a point, and go on when the gate is opened."""

    def __init__(self, text: str) -> None:
        self.text, self.reached, self.opened = text, threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[str]:
        yield self.text[:50]
        self.reached.set()
        assert self.opened.wait(30)
        yield self.text[50:]


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", [True, False])
def test_many_sessions_at_once_are_each_as_if_alone(tmp_path: Path, learn: bool) -> None:
    fresh = Session(MODEL, TOKENIZER, learn=learn, dtype=F64)
    texts = [[text_of(10 * i + j, 4 + 7 * i) for j in range(2)] for i in range(7)]

    async def one(engine: Engine, i: int) -> SessionRecord:
        owner = f"owner {i % 2}"
        record = await engine.create(owner)
        for text in texts[i]:
            pieces = [text[at : at + 7] for at in range(0, len(text), 7)]
            *before, last = [progress async for progress in engine.read(owner, record.id, pieces)]
            assert all(progress.saved is None and progress.loss is not None for progress in before)
            assert last.saved is not None
            record = last.saved
        return record

    async def work(engine: Engine) -> None:
        for i, record in enumerate(await asyncio.gather(*(one(engine, i) for i in range(7)))):
            alone = having_read(*texts[i], fresh=fresh)
            info = alone.info()
            assert record == await engine.session(f"owner {i % 2}", record.id)
            assert (record.tokens, record.text_bytes, record.text_digest, record.learn) == (
                info.tokens,
                info.text_bytes,
                info.text_digest,
                learn,
            )
            ours = await exported(engine, f"owner {i % 2}", record.id, tmp_path)
            if learn:
                assert_same(ours, alone)
            losses = [np.concatenate((s.read(STORY), s.score_pending()))[-20:] for s in (ours, alone)]
            np.testing.assert_allclose(*losses, atol=1e-6)

    served(tmp_path / "data", work, fresh, max_batch=4)


def test_progress_tells_of_this_text_alone(tmp_path: Path) -> None:
    first, second = text_of(1), text_of(2)
    alone = having_read(first)
    waiting = alone.pending
    losses = alone.read(second)[waiting:]

    async def work(engine: Engine) -> None:
        record = await engine.create("me")
        await read(engine, "me", record.id, first)
        told = [progress async for progress in engine.read("me", record.id, [second])]
        assert [p.tokens for p in told[:-1]] == sorted({p.tokens for p in told})
        sums = np.diff([0, *(p.tokens for p in told[:-1])]) * [p.loss for p in told[:-1]]
        assert sums.sum() == pytest.approx(float(losses.sum()), rel=1e-5)
        assert (told[-1].tokens, told[-1].loss) == (len(losses), None)
        assert told[-1].total_loss == told[-2].total_loss == pytest.approx(float(losses.mean()), rel=1e-5)
        empty = [progress async for progress in engine.read("me", record.id, [])]
        assert [(p.tokens, p.loss, p.total_loss) for p in empty] == [(0, None, None)]
        assert empty[0].saved == told[-1].saved

    served(tmp_path, work)


def test_changes_of_one_session_come_one_after_the_other(tmp_path: Path) -> None:
    texts = [text_of(i) for i in range(4)]

    async def work(engine: Engine) -> None:
        record = await engine.create("me")
        await asyncio.gather(*(read(engine, "me", record.id, text) for text in texts))
        assert_same(await exported(engine, "me", record.id, tmp_path), having_read(*texts))

    served(tmp_path / "data", work)


def test_writing_takes_the_session_as_it_is_and_waits_for_nobody(tmp_path: Path) -> None:
    first, gate = text_of(1), Gate(text_of(2))

    async def work(engine: Engine) -> None:
        record = await engine.create("me")
        await read(engine, "me", record.id, first)
        reading = asyncio.create_task(anext_to_end(engine.read("me", record.id, gate)))
        await asyncio.to_thread(gate.reached.wait)
        text, _ = await written(engine, "me", record.id, "Rain", max_tokens=20)
        assert text == "".join(having_read(first).generate("Rain", max_tokens=20))
        fork = await engine.fork("me", record.id)
        assert fork.text_digest == (await engine.session("me", record.id)).text_digest
        gate.opened.set()
        await reading
        assert_same(await exported(engine, "me", record.id, tmp_path), having_read(first, gate.text))
        assert_same(await exported(engine, "me", fork.id, tmp_path), having_read(first))

    served(tmp_path / "data", work)


async def anext_to_end(iterator: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in iterator]


def test_pieces_come_in_threads_and_only_as_fast_as_they_are_read(tmp_path: Path) -> None:
    taken: list[int] = []

    def endless() -> Iterator[str]:
        while True:
            taken.append(threading.get_ident())
            yield STORY * 200  # a segment

    async def work(engine: Engine) -> None:
        record = await engine.create("me")
        reading = engine.read("me", record.id, endless())
        for _ in range(20):
            await anext(reading)
        await reading.aclose()  # type: ignore[attr-defined]
        assert 1 <= len(taken) <= 3 and threading.get_ident() not in taken
        await until(lambda: engine.numbers()["running"] == 0)
        steps = engine.numbers()["steps"]
        await asyncio.sleep(0.05)
        assert engine.numbers()["steps"] <= steps + 1  # nothing goes on that nobody asked for

    served(tmp_path, work)


# -- all or nothing ----------------------------------------------------------------------------------------------------


@contextmanager
def diverging(monkeypatch: pytest.MonkeyPatch, position: int) -> Iterator[None]:
    plain = pool_module.find_divergence

    def find_divergence(losses: Any, norm: float, at: int, *more: Any) -> Any:
        return ("this is made up", False) if at == position else plain(losses, norm, at, *more)

    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "unsound", find_divergence)
        yield


def test_a_reading_that_does_not_end_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = text_of(1), text_of(2, 40)
    alone = having_read(first)

    def broken() -> Iterator[str]:
        yield second
        raise RuntimeError("no more of it")

    def cut_short() -> Iterator[str]:
        yield second
        yield "\ud800"

    async def closed(engine: Engine, id: str) -> None:
        reading = engine.read("me", id, [second])
        await anext(reading)
        await reading.aclose()  # type: ignore[attr-defined]

    async def cancelled(engine: Engine, id: str) -> None:
        gate = Gate(second)
        task = asyncio.create_task(anext_to_end(engine.read("me", id, gate)))
        await asyncio.to_thread(gate.reached.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.opened.set()

    async def failed(engine: Engine, id: str) -> None:
        with pytest.raises(RuntimeError, match="no more"):
            await anext_to_end(engine.read("me", id, broken()))
        with pytest.raises(UserError, match="surrogate"):
            await anext_to_end(engine.read("me", id, cut_short()))

    async def diverged(engine: Engine, id: str) -> None:
        with diverging(monkeypatch, alone.position + 10), pytest.raises(Diverged, match=r"made up.*as it was"):
            await read(engine, "me", id, second)

    async def on_a_full_disk(engine: Engine, id: str) -> None:
        def full(*_: object) -> None:
            raise UserError("No space left.")

        with monkeypatch.context() as patch:
            patch.setattr(Store, "save", full)
            with pytest.raises(UserError, match="No space"):
                await read(engine, "me", id, second)
            with pytest.raises(UserError, match="No space"):
                await written(engine, "me", id, "Rain", max_tokens=3, learn=True)

    async def work(engine: Engine) -> None:
        record = await engine.create("me")
        before = (await read(engine, "me", record.id, first)).saved
        for trouble in (closed, cancelled, failed, diverged, on_a_full_disk):
            await trouble(engine, record.id)
            assert await engine.session("me", record.id) == before, trouble
            assert_same(await exported(engine, "me", record.id, tmp_path), alone)
            file = Session.load(tmp_path / "data" / f"{record.id}.session", MODEL, TOKENIZER)
            assert_same(file, alone)
        await read(engine, "me", record.id, second)
        assert_same(await exported(engine, "me", record.id, tmp_path), having_read(first, second))

    served(tmp_path / "data", work)


def test_what_is_learned_last_is_judged_before_it_is_kept(tmp_path: Path) -> None:
    model = small_model(
        F64, vocab_size=TOKENIZER.vocab_size, inner_loop__lr=1e308, inner_loop__max_grad_norm=1e300
    ).requires_grad_(False)
    fresh = Session(model, TOKENIZER, dtype=F64)
    ids = TOKENIZER.encode(text_of(1))
    few = TOKENIZER.decode(ids[:2])

    async def work(engine: Engine) -> None:
        record = await engine.create("me")
        for count in (fresh.mini_batch, fresh.mini_batch + 2):  # whose last token has no loss yet, or has
            text = TOKENIZER.decode(ids[:count])
            assert len(TOKENIZER.encode(text)) == count
            with pytest.raises(Diverged, match=r"diverged.*as it was"):
                await read(engine, "me", record.id, text)
            assert await engine.session("me", record.id) == record
        assert (await read(engine, "me", record.id, few)).saved is not None

    served(tmp_path / "data", work, fresh)


def test_a_chats_turn_is_closed_where_it_is_learned(tmp_path: Path) -> None:
    bos = TOKENIZER.bos

    async def work(engine: Engine) -> None:
        record = await engine.create("me")
        text, _ = await written(engine, "me", record.id, "Rain", max_tokens=5, learn=True, closing=[bos, "\n"])
        alone = FRESH.fork()
        assert "".join(alone.generate("Rain", max_tokens=5, learn_from_writing=True)) == text
        alone.read(np.array([bos, *TOKENIZER.encode("\n")]))
        assert_same(await exported(engine, "me", record.id, tmp_path), alone)

    served(tmp_path / "data", work)


def test_a_saving_under_way_is_done_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = text_of(1), text_of(2)
    saving, go_on, plain = threading.Event(), threading.Event(), Store.save

    def slow(store: Store, id: str, session: Session) -> None:
        saving.set()
        assert go_on.wait(30)
        plain(store, id, session)

    async def work(engine: Engine) -> None:
        record = await engine.create("me")
        monkeypatch.setattr(Store, "save", slow)
        task = asyncio.create_task(read(engine, "me", record.id, first))
        await asyncio.to_thread(saving.wait)
        assert (await engine.sessions("me"))[0].tokens == 1  # it becomes the session only then
        asked = asyncio.create_task(engine.session("me", record.id))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        after = asyncio.create_task(read(engine, "me", record.id, second))
        await asyncio.sleep(0.01)
        assert not asked.done()  # whoever has left and asks is told what became of it
        go_on.set()
        assert (await asked).tokens == having_read(first).info().tokens
        await after
        assert_same(await exported(engine, "me", record.id, tmp_path), having_read(first, second))

    served(tmp_path / "data", work)


def test_a_step_that_fails_as_a_whole_ends_what_was_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError("not enough of it")

    async def work(engine: Engine) -> None:
        records = [await engine.create("me") for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(pool_module, "read_mini_batch", no_memory)
            tasks = [asyncio.create_task(read(engine, "me", record.id, text_of(1))) for record in records]
            for task in tasks:
                with pytest.raises(MemoryError):
                    await task
            assert engine.ready
            for _ in range(3):
                with pytest.raises(MemoryError):
                    await read(engine, "me", records[0].id, text_of(1))
            assert not engine.ready  # whoever runs the service should look into it
        for record in records:
            await read(engine, "me", record.id, text_of(1))
            assert_same(await exported(engine, "me", record.id, tmp_path), having_read(text_of(1)))

    served(tmp_path / "data", work)


# -- writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("stop", [(), ("the end",), "from the text"])
def test_what_is_written_is_what_a_session_writes(tmp_path: Path, learn: bool, stop: Any) -> None:
    def alone(seed: int, stop: tuple[str, ...]) -> tuple[str, Session]:
        session = having_read(text_of(seed, 4 * seed))
        text = "".join(session.generate(text_of(9, 3), max_tokens=33, stop=stop, learn_from_writing=learn, seed=seed))
        return text, session

    async def one(engine: Engine, seed: int) -> None:
        record = await engine.create("me")
        await read(engine, "me", record.id, text_of(seed, 4 * seed))
        whole, _ = alone(seed, ())
        stops = (whole[8:11] or "x",) if stop == "from the text" else stop
        expected, session = alone(seed, stops)
        options = SamplingOptions(seed=seed)
        text, why = await written(
            engine, "me", record.id, text_of(9, 3), max_tokens=33, stop=stops, options=options, learn=learn
        )
        assert text == expected and why in ("stop", "length")
        assert why == "stop" or text == whole
        assert_same(await exported(engine, "me", record.id, tmp_path), session)
        file = tmp_path / "data" / f"{record.id}.session"
        assert_same(Session.load(file, MODEL, TOKENIZER), session)

    async def work(engine: Engine) -> None:
        await asyncio.gather(*(one(engine, seed) for seed in range(4)))

    served(tmp_path / "data", work)


def test_pieces_count_their_tokens_and_say_why_they_end(tmp_path: Path) -> None:
    prompt, hot = "Rain and rain", SamplingOptions(temperature=9.0, top_p=1.0)

    async def work(engine: Engine) -> None:
        pieces = [p async for p in engine.generate("me", None, prompt, max_tokens=12, options=SamplingOptions())]
        assert {piece.prompt_tokens for piece in pieces} == {len(TOKENIZER.encode(prompt))}
        counts = [piece.completion_tokens for piece in pieces]
        assert counts == sorted(counts) and counts[-1] == 12 and pieces[-1].finish_reason == "length"
        assert "".join(p.text for p in pieces) == "".join(FRESH.fork().generate(prompt, max_tokens=12))
        assert await written(engine, "me", None, prompt, max_tokens=0) == ("", "length")
        *_, last = [p async for p in engine.generate("me", None, prompt, max_tokens=5000, options=hot)]
        assert last.finish_reason == "stop" and last.completion_tokens < 5000  # a document's end was drawn
        assert await engine.sessions("me") == []
        numbers = engine.numbers()
        assert numbers["tokens_written"] == 12 + last.completion_tokens and numbers["tokens_read"] == 0
        for more in ({"max_tokens": -1}, {"stop": [""]}):
            with pytest.raises(UserError):
                await written(engine, "me", None, prompt, **more)

    served(tmp_path, work)


def test_a_writing_that_is_left_or_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(engine: Engine) -> None:
        record = await engine.create("me")
        before = (await read(engine, "me", record.id, text_of(1))).saved
        assert before is not None
        writing = engine.generate("me", record.id, text_of(2), max_tokens=4000, options=SamplingOptions(), learn=True)
        for _ in range(20):
            await anext(writing)
        await writing.aclose()  # type: ignore[attr-defined]
        await until(lambda: engine.numbers()["running"] == 0)
        position = having_read(text_of(1), text_of(2)).position
        with diverging(monkeypatch, position + 5), pytest.raises(Diverged):
            await written(engine, "me", record.id, text_of(2), max_tokens=30, learn=True)
        assert await engine.session("me", record.id) == before
        assert_same(await exported(engine, "me", record.id, tmp_path), having_read(text_of(1)))

    served(tmp_path / "data", work)


# -- owners, limits, memory --------------------------------------------------------------------------------------------


def test_nobody_sees_or_touches_what_is_anothers(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        mine, yours = await engine.create("me"), await engine.create("you")
        assert await engine.sessions("me") == [mine] and await engine.sessions("you") == [yours]
        assert await engine.sessions("nobody") == []
        said = set()
        for id in (yours.id, "sess-" + 32 * "0", "", "../lock", f"{mine.id}/../{mine.id}"):
            for call in (
                engine.session("me", id),
                engine.fork("me", id),
                engine.delete("me", id),
                engine.export("me", id, tmp_path / "out"),
                read(engine, "me", id, "Rain"),
                written(engine, "me", id, "Rain"),
                written(engine, "me", id, "Rain", learn=True),
            ):
                with pytest.raises(NoSession) as caught:
                    await call
                said.add(str(caught.value))
        assert len(said) == 1  # nor can the sentence tell whether there is one
        assert await engine.session("you", yours.id) == yours and not (tmp_path / "out").exists()

    served(tmp_path / "data", work)


def test_the_model_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[object] = []

    def counted(model: Any) -> str:
        hashed.append(model)
        return model_fingerprint(model)

    async def work(engine: Engine) -> None:
        first, second = [await engine.create("me") for _ in range(2)]
        await read(engine, "me", first.id, text_of(1))
        await read(engine, "me", second.id, text_of(2))
        await written(engine, "me", first.id, "And", max_tokens=3, learn=True)
        await engine.fork("me", first.id)

    monkeypatch.setattr("ttt_e2e.inference.session.model_fingerprint", counted)
    served(tmp_path / "data", work)
    assert len(hashed) == 1


def test_a_writing_that_waits_for_its_session_takes_no_turn(tmp_path: Path) -> None:
    gate, turns = Gate(text_of(1)), asyncio.Semaphore(1)

    async def work(engine: Engine) -> None:
        record = await engine.create("me")
        reading = asyncio.create_task(anext(aiter(engine.read("me", record.id, gate)), None))
        await asyncio.to_thread(gate.reached.wait)
        waiting = asyncio.create_task(written(engine, "me", record.id, "And", max_tokens=2, learn=True, turns=turns))
        await asyncio.sleep(0.05)
        assert (await written(engine, "me", None, "And", max_tokens=2, turns=turns))[1] == "length"
        assert not waiting.done()
        gate.opened.set()
        await reading
        waiting.cancel()

    served(tmp_path / "data", work)


def test_a_session_whose_file_is_gone_says_so(tmp_path: Path) -> None:
    async def lose(engine: Engine) -> str:
        record = await engine.create("me")
        await read(engine, "me", record.id, text_of(1))
        return record.id

    async def work(engine: Engine) -> None:
        (record,) = await engine.sessions("me")
        assert record.error and "does not exist" in record.error
        with pytest.raises(UserError, match="does not exist"):
            await read(engine, "me", record.id, text_of(2))

    lost = served(tmp_path / "data", lose)
    (tmp_path / "data" / f"{lost}.session").unlink()
    served(tmp_path / "data", work)


def test_limits(tmp_path: Path) -> None:
    text = text_of(1)
    tokens = having_read(text).info().tokens

    async def work(engine: Engine) -> None:
        record = await engine.create("me")
        await read(engine, "me", record.id, text)  # as much as fits
        with pytest.raises(TooMuch, match=f"{tokens:,} tokens"):
            await read(engine, "me", record.id, ".")
        for id, prompt, learn in ((record.id, "", True), (record.id, text, False), (None, text, False)):
            with pytest.raises(TooMuch):
                await written(engine, "me", id, prompt, max_tokens=3, learn=learn)
        assert (await written(engine, "me", record.id, "Who?", max_tokens=3))[0]  # it can be asked all the same
        assert_same(await exported(engine, "me", record.id, tmp_path), having_read(text))
        having_read(text, ".").save(tmp_path / "long")
        with pytest.raises(TooMuch):
            await engine.take_in("me", tmp_path / "long")
        await engine.fork("me", record.id)
        results = await asyncio.gather(*(engine.create("me") for _ in range(4)), return_exceptions=True)
        assert [isinstance(result, TooMuch) for result in results] == [False, True, True, True]
        for call in (engine.create("me"), engine.fork("me", record.id)):
            with pytest.raises(TooMuch, match="3 sessions"):
                await call
        await engine.create("you")
        await engine.delete("me", record.id)
        await engine.create("me")
        assert len(await engine.sessions("me")) == 3

    served(tmp_path / "data", work, max_sessions=3, max_session_tokens=tokens)


def test_sessions_that_were_dropped_come_back_equal(tmp_path: Path) -> None:
    texts = [text_of(i) for i in range(4)]
    size = having_read(texts[0]).info().memory_bytes

    async def work(engine: Engine) -> None:
        ids = [(await engine.create("me")).id for _ in texts]
        for id, text in zip(ids, texts, strict=True):
            await read(engine, "me", id, text)
        assert [record.in_memory for record in await engine.sessions("me")] == [False, False, True, True]
        assert (engine.numbers()["sessions_in_memory"], engine.numbers()["bytes_in_memory"]) == (2, 2 * size)
        await written(engine, "me", ids[2], "Rain", max_tokens=1)
        await written(engine, "me", ids[0], "Rain", max_tokens=1)
        assert [record.in_memory for record in await engine.sessions("me")] == [True, False, True, False]
        for id, text in zip(ids, texts, strict=True):
            await read(engine, "me", id, text_of(9))
            assert_same(await exported(engine, "me", id, tmp_path), having_read(text, text_of(9)))
        assert engine.numbers()["sessions_on_disk"] == 4

    async def without_memory(engine: Engine) -> None:
        assert engine.numbers()["sessions_in_memory"] == 0
        for record, text in zip(await engine.sessions("me"), texts, strict=True):
            assert_same(await exported(engine, "me", record.id, tmp_path), having_read(text, text_of(9)))
        assert engine.numbers()["sessions_in_memory"] == 0

    served(tmp_path / "data", work, memory_bytes=2 * size)
    served(tmp_path / "data", without_memory, memory_bytes=0)


# -- beginning and end -------------------------------------------------------------------------------------------------


def test_sessions_outlive_the_engine(tmp_path: Path) -> None:
    async def work(engine: Engine) -> list[SessionRecord]:
        ids = [(await engine.create("me")).id for _ in range(3)]
        await read(engine, "me", ids[1], text_of(1))
        await written(engine, "me", ids[2], text_of(2), max_tokens=20, learn=True)
        return await engine.sessions("me")

    async def again(engine: Engine) -> list[SessionRecord]:
        records = await engine.sessions("me")
        assert not any(record.in_memory for record in records)
        for record in records:
            await written(engine, "me", record.id, "Rain", max_tokens=1)
        return await engine.sessions("me")

    before = served(tmp_path, work)
    assert served(tmp_path, again) == before and len({record.text_digest for record in before}) == 3


def test_out_and_in_again(tmp_path: Path) -> None:
    alone = having_read(text_of(1))

    async def work(engine: Engine) -> None:
        alone.save(tmp_path / "file", "float32")
        record = await engine.take_in("me", tmp_path / "file")
        assert record.text_digest == alone.info().text_digest and record.id.startswith("sess-")
        await read(engine, "me", record.id, text_of(2))
        assert_same(await exported(engine, "me", record.id, tmp_path), having_read(text_of(1), text_of(2)))
        (tmp_path / "file").write_bytes(b"no")
        with pytest.raises(UserError, match="The file is no session"):
            await engine.take_in("me", tmp_path / "file")
        assert len(await engine.sessions("me")) == 1

    served(tmp_path / "data", work)


def test_a_damaged_session_says_so_and_all_others_go_on(tmp_path: Path) -> None:
    async def work(engine: Engine) -> list[str]:
        ids = [(await engine.create("me")).id for _ in range(3)]
        await asyncio.gather(*(read(engine, "me", id, text_of(1)) for id in ids))
        return ids

    async def again(engine: Engine) -> None:
        no_header, altered, good = await engine.sessions("me")
        assert no_header.error and no_header.id in no_header.error and altered.error is None is good.error
        with pytest.raises(UserError, match=f"{no_header.id} is no session"):
            await engine.session("me", no_header.id)
        for record, match in ((no_header, "is no session"), (altered, "was altered")):
            for call in (
                read(engine, "me", record.id, "Rain"),
                written(engine, "me", record.id, "Rain"),
                engine.fork("me", record.id),
                engine.export("me", record.id, tmp_path / "out"),
            ):
                with pytest.raises(UserError, match=f"^The session {record.id} {match}") as caught:
                    await call
                assert str(tmp_path) not in str(caught.value)
        await read(engine, "me", good.id, text_of(2))
        assert_same(await exported(engine, "me", good.id, tmp_path), having_read(text_of(1), text_of(2)))
        await engine.delete("me", no_header.id)
        assert [record.id for record in await engine.sessions("me")] == [altered.id, good.id]

    ids = served(tmp_path / "data", work)
    first, second = (tmp_path / "data" / f"{id}.session" for id in ids[:2])
    first.write_bytes(first.read_bytes()[:100])
    data = second.read_bytes()
    second.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    served(tmp_path / "data", again)


def test_a_session_is_deleted_while_it_is_read(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        record, other = await engine.create("me"), await engine.create("me")
        await read(engine, "me", record.id, text_of(1))
        gate = Gate(text_of(2))
        reading = asyncio.create_task(anext_to_end(engine.read("me", record.id, gate)))
        await asyncio.to_thread(gate.reached.wait)
        queued = asyncio.create_task(read(engine, "me", record.id, text_of(3)))
        writing = engine.generate("me", record.id, "Rain", max_tokens=100_000, options=SamplingOptions())
        await anext(writing)
        await engine.delete("me", record.id)
        gate.opened.set()
        for gone in (reading, queued, anext_to_end(writing), engine.delete("me", record.id)):
            with pytest.raises(NoSession):
                await gone
        assert await engine.sessions("me") == [other]
        assert not list((tmp_path / "data").glob(f"*{record.id}*"))
        await until(lambda: engine.numbers()["running"] == 0)

    served(tmp_path / "data", work)


def test_stopping_lets_what_runs_end(tmp_path: Path) -> None:
    gate = Gate(text_of(1))

    async def main() -> str:
        engine = Engine(MODEL, TOKENIZER, Store(tmp_path / "data"), dtype=F64)
        await engine.start()
        record = await engine.create("me")
        reading = asyncio.create_task(anext_to_end(engine.read("me", record.id, gate)))
        await asyncio.to_thread(gate.reached.wait)
        stopping = asyncio.create_task(engine.stop(60))
        await asyncio.sleep(0)
        for late in (read(engine, "me", record.id, "Rain"), written(engine, "me", None, "Rain")):
            with pytest.raises(Stopping):
                await late
        assert not stopping.done()
        gate.opened.set()
        assert (await reading)[-1].saved
        await stopping
        return record.id

    id = asyncio.run(main())
    served(tmp_path / "data", lambda engine: same_as(engine, id, having_read(gate.text), tmp_path))


async def same_as(engine: Engine, id: str, alone: Session, folder: Path) -> None:
    assert_same(await exported(engine, "me", id, folder), alone)


def test_stopping_ends_what_does_not_end_by_itself(tmp_path: Path) -> None:
    gate = Gate(text_of(2))

    async def main() -> str:
        engine = Engine(MODEL, TOKENIZER, Store(tmp_path / "data"), dtype=F64)
        await engine.start()
        record = await engine.create("me")
        await read(engine, "me", record.id, text_of(1))
        reading = asyncio.create_task(anext_to_end(engine.read("me", record.id, gate)))
        await asyncio.to_thread(gate.reached.wait)
        queued = asyncio.create_task(read(engine, "me", record.id, text_of(3)))
        endless = engine.generate("me", record.id, "Rain", max_tokens=1_000_000, options=SamplingOptions(top_k=3))
        await anext(endless)
        await engine.stop(0.01)
        Store(tmp_path / "data").close()  # another may have it now
        gate.opened.set()
        for left in (reading, queued, anext_to_end(endless), engine.create("me"), engine.delete("me", record.id)):
            with pytest.raises(Stopping):
                await left
        return record.id

    id = asyncio.run(main())
    served(tmp_path / "data", lambda engine: same_as(engine, id, having_read(text_of(1)), tmp_path))


# -- kill -9 -----------------------------------------------------------------------------------------------------------

CHAPTERS = 400


def digests() -> list[str]:
    """Those of a session that has read so many chapters."""
    found, ids = [], np.array([TOKENIZER.bos])
    session = Session(MODEL, TOKENIZER, learn=False, dtype=F64)
    standing = session.standing()
    for chapter in range(CHAPTERS):
        found.append(session.standing_at(standing._replace(pending=ids)).info().text_digest)
        ids = np.concatenate((ids, TOKENIZER.encode(text_of(chapter, 6))))
    return found


def be_killed(folder: Path, rounds: int, seed: int) -> None:
    """Serve again and again, say what is acknowledged, a line of JSON each, and be killed at random moments."""
    choices, known = random.Random(seed), digests()
    for i in range(rounds):
        begun, child = os.pipe(), os.fork()
        if child == 0:
            try:
                served(folder, lambda engine: live(engine, known, begun[1]))  # noqa: B023 - called at once
            finally:
                os._exit(1)
        os.close(begun[1])  # so that a child that died is no wait without an end
        for _ in range(3 if i % 2 else 0):  # else it may be killed while it begins
            assert os.read(begun[0], 1), "it died before its first readings"
        time.sleep(choices.uniform(0.0, 0.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(begun[0])
        say("killed")


async def live(engine: Engine, known: list[str], begun: int) -> None:
    async def one(id: str) -> None:
        record = await engine.session("me", id)
        for chapter in range(known.index(record.text_digest), CHAPTERS):
            last = await read(engine, "me", id, text_of(chapter, 6))
            assert last.saved is not None
            say("read", id, known.index(last.saved.text_digest))
            os.write(begun, b".")
            if chapter % 7 == 3:
                fork = await engine.fork("me", id)
                say("made", fork.id, known.index(fork.text_digest))
                say("going", fork.id)
                await engine.delete("me", fork.id)
                say("gone", fork.id)

    for record in await engine.sessions("me"):
        say("found", record.id, known.index(record.text_digest))
    while len(await engine.sessions("me")) < 3:
        say("made", (await engine.create("me")).id, 0)
    await asyncio.gather(*(one(record.id) for record in (await engine.sessions("me"))[:3]))


def say(*words: object) -> None:
    os.write(1, (json.dumps(words) + "\n").encode())


def test_a_kill_at_any_moment_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    seed = random.randrange(1000)
    script, environment = Path(__file__), {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, script, tmp_path / "data", "6", str(seed)], capture_output=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.endswith(b"]")]
    words = [word for word, *_ in lines]
    assert words.count("killed") == 6 and words.count("read") > 8, (seed, done.stderr.decode())
    acknowledged: dict[str, int] = {}
    going: set[str] = set()
    for word, *rest in lines:
        if word == "found":  # after a kill: all that was acknowledged, and at most one chapter more
            assert acknowledged.get(rest[0], 0) <= rest[1] <= acknowledged.get(rest[0], rest[1]) + 1, seed
        if word in ("made", "read", "found"):
            acknowledged[rest[0]] = rest[1]
        elif word == "going":
            going.add(rest[0])
            del acknowledged[rest[0]]
    known = digests()

    async def look(engine: Engine) -> None:
        found = {record.id: record for record in await engine.sessions("me")}
        assert not {rest[0] for word, *rest in lines if word == "gone"} & set(found), seed
        assert set(acknowledged) <= set(found), seed
        for id, record in found.items():
            chapters = known.index(record.text_digest)
            if id in acknowledged:
                assert acknowledged[id] <= chapters <= acknowledged[id] + 1, seed
            alone = having_read(*(text_of(chapter, 6) for chapter in range(chapters)))
            assert_same(await exported(engine, "me", id, tmp_path), alone, 1e-5)

    served(tmp_path / "data", look)


if __name__ == "__main__":
    be_killed(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
