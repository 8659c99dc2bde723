"""Kill the engine's process with SIGKILL at random moments: nothing that it acknowledged is lost."""

import asyncio
import functools
import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
from engine_helpers import F64, MODEL, PATIENCE, TOKENIZER, assert_same, export, having_read, read, text_of, with_engine
from helpers import start_copy

from ttt_e2e.inference.session import Session
from ttt_e2e.server.engine.engine import Engine

CHAPTERS = 400


@functools.cache
def digests() -> list[str]:
    """Digests of a session's text, by how many chapters it has read."""
    found, ids = [], np.array([TOKENIZER.bos])
    session = Session(MODEL, TOKENIZER, learn=False, dtype=F64)
    state = session.state()
    for chapter in range(CHAPTERS):
        found.append(session.with_state(state._replace(pending=ids)).info().text_digest)
        ids = np.concatenate((ids, TOKENIZER.encode(text_of(chapter, 6))))
    return found


def be_killed(folder: Path, printed: Path, rounds: int, seed: int) -> None:
    """Run engines in child processes, one after another, and kill them at random moments.

    They print into a file what the engine has acknowledged, one line of JSON each.
    """
    os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    choices, known = random.Random(seed), digests()
    for i in range(rounds):
        begun, child = os.pipe(), os.fork()
        if child == 0:
            try:
                with_engine(folder, lambda engine: live(engine, known, begun[1]))  # noqa: B023 - called at once
            finally:
                os._exit(1)
        os.close(begun[1])  # so that reading ends if the child dies
        for _ in range(3 if i % 2 else 0):  # in every other round it may be killed while it starts
            assert os.read(begun[0], 1), "it died before its first texts were read"
        time.sleep(choices.uniform(0.0, 0.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(begun[0])
        say("killed")


async def live(engine: Engine, known: list[str], begun: int) -> None:
    async def read_on(id: str) -> None:
        summary = await engine.sessions.summary("me", id)
        for chapter in range(known.index(summary.text_digest), CHAPTERS):
            last = await read(engine, "me", id, text_of(chapter, 6))
            assert last.session is not None
            say("read", id, known.index(last.session.text_digest))
            os.write(begun, b".")
            if chapter % 7 == 3:
                fork = await engine.sessions.fork("me", id)
                say("made", fork.id, known.index(fork.text_digest))
                say("going", fork.id)
                await engine.sessions.delete("me", fork.id)
                say("gone", fork.id)

    for summary in await engine.sessions.summaries("me"):
        say("found", summary.id, known.index(summary.text_digest))
    while len(await engine.sessions.summaries("me")) < 3:
        say("made", (await engine.sessions.create("me")).id, 0)
    await asyncio.gather(*(read_on(summary.id) for summary in (await engine.sessions.summaries("me"))[:3]))


def say(*words: object) -> None:
    os.write(1, (json.dumps(words) + "\n").encode())


def test_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    seed, known = random.randrange(1000), digests()
    process = start_copy(be_killed, tmp_path / "data", tmp_path / "printed", 6, seed)
    process.join(2 * PATIENCE)
    assert process.exitcode == 0
    lines = [json.loads(line) for line in (tmp_path / "printed").read_bytes().splitlines() if line.endswith(b"]")]
    words = [word for word, *_ in lines]
    assert words.count("killed") == 6 and words.count("read") > 8, seed
    acknowledged: dict[str, int] = {}
    for word, *rest in lines:
        if word == "found":  # all that was acknowledged before the kill, and at most one more chapter
            assert acknowledged.get(rest[0], 0) <= rest[1] <= acknowledged.get(rest[0], rest[1]) + 1, seed
        if word in ("made", "read", "found"):
            acknowledged[rest[0]] = rest[1]
        elif word == "going":
            del acknowledged[rest[0]]

    async def check(engine: Engine) -> None:
        found = {summary.id: summary for summary in await engine.sessions.summaries("me")}
        assert not {rest[0] for word, *rest in lines if word == "gone"} & set(found), seed
        assert set(acknowledged) <= set(found), seed
        for id, summary in found.items():
            chapters = known.index(summary.text_digest)
            if id in acknowledged:
                assert acknowledged[id] <= chapters <= acknowledged[id] + 1, seed
            alone = having_read(*(text_of(chapter, 6) for chapter in range(chapters)))
            assert_same(await export(engine, "me", id, tmp_path), alone, 1e-5)

    with_engine(tmp_path / "data", check)
