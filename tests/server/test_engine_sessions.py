"""The engine's sessions: owners, limits, memory, import and export, damage, deletion, and stopping."""

import asyncio
from pathlib import Path

import pytest
from engine_helpers import (
    TEMPLATE,
    HeldText,
    assert_same,
    collect,
    export,
    generate,
    having_read,
    read,
    text_of,
    until,
    with_engine,
)
from engine_helpers import endless as endless

from ttt_e2e.errors import UserError
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.records import (
    GenerateRequest,
    LimitReachedError,
    SessionNotFoundError,
    SessionSummary,
    StoppingError,
)
from ttt_e2e.server.engine.store import Store

# -- owners, limits, memory --------------------------------------------------------------------------------------------


def test_sessions_of_other_owners_cannot_be_seen_or_used(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        mine, yours = await engine.sessions.create("me"), await engine.sessions.create("you")
        assert await engine.sessions.summaries("me") == [mine] and await engine.sessions.summaries("you") == [yours]
        assert await engine.sessions.summaries("nobody") == []
        messages = set()
        for id in (yours.id, "sess-" + 32 * "0", "", "../lock", f"{mine.id}/../{mine.id}"):
            for call in (
                engine.sessions.summary("me", id),
                engine.sessions.fork("me", id),
                engine.sessions.delete("me", id),
                engine.sessions.export_session("me", id, tmp_path / "out"),
                read(engine, "me", id, "Rain"),
                generate(engine, "me", id, "Rain"),
                generate(engine, "me", id, "Rain", learn=True),
            ):
                with pytest.raises(SessionNotFoundError) as caught:
                    await call
                messages.add(str(caught.value))
        assert len(messages) == 1  # it does not reveal which sessions exist
        assert await engine.sessions.summary("you", yours.id) == yours and not (tmp_path / "out").exists()

    with_engine(tmp_path / "data", work)


def test_numbers_of_tokens_and_sessions_are_limited(tmp_path: Path) -> None:
    text = text_of(1)
    tokens = having_read(text).info().tokens

    async def work(engine: Engine) -> None:
        id = (await engine.sessions.create("me")).id
        await read(engine, "me", id, text)  # it just fits
        with pytest.raises(LimitReachedError, match=f"{tokens:,} tokens"):
            await read(engine, "me", id, ".")
        for session, prompt, learn in ((id, "", True), (id, text + ".", False), (None, text + ".", False)):
            with pytest.raises(LimitReachedError):
                await generate(engine, "me", session, prompt, max_tokens=3, learn=learn)
        for session in (id, None):  # nothing is kept, and there is room for one token
            written = await generate(engine, "me", session, text, max_tokens=3)
            assert written == await generate(engine, "me", session, text, max_tokens=1) and written[1] == "length"
        assert (await generate(engine, "me", id, "Who?", max_tokens=3))[0]  # the session does not grow by this
        assert_same(await export(engine, "me", id, tmp_path), having_read(text))
        having_read(text, ".").save(tmp_path / "long")
        with pytest.raises(LimitReachedError):
            await engine.sessions.import_session("me", tmp_path / "long")
        await engine.sessions.fork("me", id)
        results = await asyncio.gather(*(engine.sessions.create("me") for _ in range(4)), return_exceptions=True)
        assert [isinstance(result, LimitReachedError) for result in results] == [False, True, True, True]
        for call in (engine.sessions.create("me"), engine.sessions.fork("me", id)):
            with pytest.raises(LimitReachedError, match="3 sessions"):
                await call
        await engine.sessions.create("you")
        await engine.sessions.delete("me", id)
        await engine.sessions.create("me")
        assert len(await engine.sessions.summaries("me")) == 3

    with_engine(tmp_path / "data", work, max_sessions=3, max_session_tokens=tokens)


def test_least_recently_used_sessions_leave_memory_and_come_back_equal(tmp_path: Path) -> None:
    texts = [text_of(i) for i in range(4)]
    size = having_read(texts[0]).info().memory_bytes

    async def work(engine: Engine) -> None:
        ids = [(await engine.sessions.create("me")).id for _ in texts]
        for id, text in zip(ids, texts, strict=True):
            await read(engine, "me", id, text)
        assert [summary.in_memory for summary in await engine.sessions.summaries("me")] == [False, False, True, True]
        assert (engine.stats()["sessions_in_memory"], engine.stats()["bytes_in_memory"]) == (2, 2 * size)
        await generate(engine, "me", ids[2], "Rain", max_tokens=1)
        await generate(engine, "me", ids[0], "Rain", max_tokens=1)
        assert [summary.in_memory for summary in await engine.sessions.summaries("me")] == [True, False, True, False]
        for id, text in zip(ids, texts, strict=True):
            await read(engine, "me", id, text_of(9))
            assert_same(await export(engine, "me", id, tmp_path), having_read(text, text_of(9)))
        assert engine.stats()["sessions_on_disk"] == 4

    async def without_memory(engine: Engine) -> None:
        assert engine.stats()["sessions_in_memory"] == 0
        for summary, text in zip(await engine.sessions.summaries("me"), texts, strict=True):
            assert_same(await export(engine, "me", summary.id, tmp_path), having_read(text, text_of(9)))
        assert engine.stats()["sessions_in_memory"] == 0

    with_engine(tmp_path / "data", work, memory_bytes=2 * size)
    with_engine(tmp_path / "data", without_memory, memory_bytes=0)


# -- files -------------------------------------------------------------------------------------------------------------


def test_sessions_outlive_the_engine(tmp_path: Path) -> None:
    async def work(engine: Engine) -> list[SessionSummary]:
        ids = [(await engine.sessions.create("me")).id for _ in range(3)]
        await read(engine, "me", ids[1], text_of(1))
        await generate(engine, "me", ids[2], text_of(2), max_tokens=20, learn=True)
        return await engine.sessions.summaries("me")

    async def restarted(engine: Engine) -> list[SessionSummary]:
        summaries = await engine.sessions.summaries("me")
        assert not any(summary.in_memory for summary in summaries)
        for summary in summaries:
            await generate(engine, "me", summary.id, "Rain", max_tokens=1)
        return await engine.sessions.summaries("me")

    before = with_engine(tmp_path, work)
    assert with_engine(tmp_path, restarted) == before and len({summary.text_digest for summary in before}) == 3


def test_import_and_export(tmp_path: Path) -> None:
    alone = having_read(text_of(1))

    async def work(engine: Engine) -> None:
        alone.save(tmp_path / "file", "float32")
        summary = await engine.sessions.import_session("me", tmp_path / "file")
        assert summary.text_digest == alone.info().text_digest and summary.id.startswith("sess-")
        await read(engine, "me", summary.id, text_of(2))
        assert_same(await export(engine, "me", summary.id, tmp_path), having_read(text_of(1), text_of(2)))
        (tmp_path / "file").write_bytes(b"no")
        with pytest.raises(UserError, match="The file is not a session"):
            await engine.sessions.import_session("me", tmp_path / "file")
        assert len(await engine.sessions.summaries("me")) == 1

    with_engine(tmp_path / "data", work)


# -- deletion and stopping ---------------------------------------------------------------------------------------------


def test_deletion_ends_the_requests_of_a_session(tmp_path: Path, endless: int) -> None:
    async def work(engine: Engine) -> None:
        summary, other = await engine.sessions.create("me"), await engine.sessions.create("me")
        await read(engine, "me", summary.id, text_of(1))
        held = HeldText(text_of(2))
        reading = asyncio.create_task(collect(engine.read("me", summary.id, held)))
        await asyncio.to_thread(held.reached.wait)
        queued = asyncio.create_task(read(engine, "me", summary.id, text_of(3)))
        slot = await engine.sessions.slot("me", summary.id)
        generation = engine.generate(slot, GenerateRequest("Rain", max_tokens=endless))
        await anext(generation)
        await engine.sessions.delete("me", summary.id)
        held.release.set()
        for request in (reading, queued, collect(generation), engine.sessions.delete("me", summary.id)):
            with pytest.raises(SessionNotFoundError):
                await request
        assert await engine.sessions.summaries("me") == [other]
        assert not list((tmp_path / "data").glob(f"*{summary.id}*"))
        await until(lambda: engine.stats()["running"] == 0)

    with_engine(tmp_path / "data", work)


def test_stop_lets_running_requests_finish(tmp_path: Path) -> None:
    held = HeldText(text_of(1))

    async def main() -> str:
        engine = Engine(TEMPLATE.fork(), Store(tmp_path / "data"))
        await engine.start()
        id = (await engine.sessions.create("me")).id
        reading = asyncio.create_task(collect(engine.read("me", id, held)))
        await asyncio.to_thread(held.reached.wait)
        stopping = asyncio.create_task(engine.stop(300))
        await asyncio.sleep(0)
        for late in (read(engine, "me", id, "Rain"), generate(engine, "me", None, "Rain")):
            with pytest.raises(StoppingError):
                await late
        assert not stopping.done()
        held.release.set()
        assert (await reading)[-1].session
        await stopping
        return id

    id = asyncio.run(main())
    with_engine(tmp_path / "data", lambda engine: assert_equals(engine, id, held.text, tmp_path))


def test_stop_ends_requests_that_take_too_long(tmp_path: Path, endless: int) -> None:
    held = HeldText(text_of(2))

    async def main() -> str:
        engine = Engine(TEMPLATE.fork(), Store(tmp_path / "data"))
        await engine.start()
        id = (await engine.sessions.create("me")).id
        await read(engine, "me", id, text_of(1))
        reading = asyncio.create_task(collect(engine.read("me", id, held)))
        await asyncio.to_thread(held.reached.wait)
        queued = asyncio.create_task(read(engine, "me", id, text_of(3)))
        slot = await engine.sessions.slot("me", id)
        generation = engine.generate(slot, GenerateRequest("Rain", max_tokens=endless))
        await anext(generation)
        await engine.stop(0.01)
        Store(tmp_path / "data").close()  # another process can open it now
        held.release.set()
        for request in (
            reading,
            queued,
            collect(generation),
            engine.sessions.create("me"),
            engine.sessions.delete("me", id),
        ):
            with pytest.raises(StoppingError):
                await request
        return id

    id = asyncio.run(main())
    with_engine(tmp_path / "data", lambda engine: assert_equals(engine, id, text_of(1), tmp_path))


async def assert_equals(engine: Engine, id: str, text: str, folder: Path) -> None:
    assert_same(await export(engine, "me", id, folder), having_read(text))
