"""The engine generates: the same text as a session would, learned as a whole or not at all."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import (
    MODEL,
    TEMPLATE,
    TOKENIZER,
    HeldText,
    assert_same,
    collect,
    diverging_at,
    export,
    file_of,
    generate,
    having_read,
    read,
    text_of,
    until,
    with_engine,
)

from ttt_e2e.errors import UserError
from ttt_e2e.inference.divergence import Diverged
from ttt_e2e.inference.sampling import SamplingOptions
from ttt_e2e.inference.session import Session
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.records import GenerateRequest, Source


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("stop", [(), ("the end",), "from the text"])
def test_generate_equals_session_generate(tmp_path: Path, learn: bool, stop: str | tuple[str, ...]) -> None:
    def generated_alone(seed: int, stop: tuple[str, ...]) -> tuple[str, Session]:
        session = having_read(text_of(seed, 4 * seed))
        text = "".join(session.generate(text_of(9, 3), max_tokens=33, stop=stop, learn_from_writing=learn, seed=seed))
        return text, session

    async def check(engine: Engine, seed: int) -> None:
        id = (await engine.sessions.create("me")).id
        await read(engine, "me", id, text_of(seed, 4 * seed))
        whole, _ = generated_alone(seed, ())
        stops = (whole[8:11] or "x",) if isinstance(stop, str) else stop
        expected, session = generated_alone(seed, stops)
        sampling = SamplingOptions(seed=seed)
        text, reason = await generate(
            engine, "me", id, text_of(9, 3), max_tokens=33, stop=stops, sampling=sampling, learn=learn
        )
        assert text == expected and reason in ("stop", "length")
        assert reason == "stop" or text == whole
        assert_same(await export(engine, "me", id, tmp_path), session)
        assert_same(Session.load(file_of(tmp_path / "data", id), MODEL, TOKENIZER), session)

    async def work(engine: Engine) -> None:
        await asyncio.gather(*(check(engine, seed) for seed in range(4)))

    with_engine(tmp_path / "data", work)


def test_chunks_count_tokens_and_give_the_finish_reason(tmp_path: Path) -> None:
    prompt, hot = "Rain and rain", SamplingOptions(temperature=9.0, top_p=1.0)

    async def work(engine: Engine) -> None:
        chunks = await collect(engine.generate(None, GenerateRequest(prompt, max_tokens=12)))
        assert {chunk.prompt_tokens for chunk in chunks} == {len(TOKENIZER.encode(prompt))}
        counts = [chunk.completion_tokens for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == 12 and chunks[-1].finish_reason == "length"
        assert "".join(chunk.text for chunk in chunks) == "".join(TEMPLATE.fork().generate(prompt, max_tokens=12))
        sources = (Source("moby.txt", 0, 5, 9, "whale", 1.0),)
        for echo in (False, True):
            request = GenerateRequest(prompt, sources=sources, max_tokens=3, echo=echo)
            first, *others = await collect(engine.generate(None, request))
            assert first.sources == sources and [chunk.sources for chunk in others] == [None] * len(others)
        assert await generate(engine, "me", None, prompt, max_tokens=0) == ("", "length")
        *_, last = await collect(engine.generate(None, GenerateRequest(prompt, max_tokens=5000, sampling=hot)))
        assert last.finish_reason == "stop" and last.completion_tokens < 5000  # a token that ends texts was drawn
        assert await engine.sessions.summaries("me") == []
        stats = engine.stats()
        assert stats["tokens_written"] == 12 + 2 * 3 + last.completion_tokens and stats["tokens_read"] == 0
        for invalid in ({"max_tokens": -1}, {"stop": [""]}):
            with pytest.raises(UserError):
                await generate(engine, "me", None, prompt, **invalid)

    with_engine(tmp_path, work)


def test_closing_is_read_after_a_learned_answer(tmp_path: Path) -> None:
    bos = TOKENIZER.bos

    async def work(engine: Engine) -> None:
        id = (await engine.sessions.create("me")).id
        text, _ = await generate(
            engine, "me", id, "Rain", max_tokens=5, learn=True, closing=[bos, *TOKENIZER.encode("\n")]
        )
        alone = TEMPLATE.fork()
        assert "".join(alone.generate("Rain", max_tokens=5, learn_from_writing=True)) == text
        alone.read(np.array([bos, *TOKENIZER.encode("\n")]))
        assert_same(await export(engine, "me", id, tmp_path), alone)

    with_engine(tmp_path / "data", work)


def test_incomplete_generation_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(engine: Engine) -> None:
        id = (await engine.sessions.create("me")).id
        before = (await read(engine, "me", id, text_of(1))).session
        request = GenerateRequest(text_of(2), max_tokens=4000, learn=True)
        generation = engine.generate(await engine.sessions.slot("me", id), request)
        for _ in range(20):
            await anext(generation)
        await generation.aclose()  # type: ignore[attr-defined]
        await until(lambda: engine.stats()["running"] == 0)
        position = having_read(text_of(1), text_of(2)).position
        with diverging_at(position + 5, monkeypatch), pytest.raises(Diverged):
            await generate(engine, "me", id, text_of(2), max_tokens=30, learn=True)
        assert await engine.sessions.summary("me", id) == before
        assert_same(await export(engine, "me", id, tmp_path), having_read(text_of(1)))

    with_engine(tmp_path / "data", work)


def test_limit_is_not_held_while_waiting_for_the_session(tmp_path: Path) -> None:
    held, limit = HeldText(text_of(1)), asyncio.Semaphore(1)

    async def work(engine: Engine) -> None:
        id = (await engine.sessions.create("me")).id
        reading = asyncio.create_task(collect(engine.read("me", id, held)))
        await asyncio.to_thread(held.reached.wait)
        waiting = asyncio.create_task(generate(engine, "me", id, "And", max_tokens=2, learn=True, limit=limit))
        await until(lambda: engine.stats()["running"] == 2)
        assert (await generate(engine, "me", None, "And", max_tokens=2, limit=limit))[1] == "length"
        assert not waiting.done()
        held.release.set()
        await asyncio.gather(reading, waiting)

    with_engine(tmp_path / "data", work)
