"""For the tests of the engine: a small model, texts, and an engine inside an event loop."""

import asyncio
import random
import secrets
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from helpers import small_model

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.inference import session_pool
from ttt_e2e.inference.grammar import GrammarCompiler
from ttt_e2e.inference.session import Session
from ttt_e2e.server.engine.database import SessionRecord
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.records import GenerateRequest, ReadProgress
from ttt_e2e.server.engine.store import Store

F64 = torch.float64
PATIENCE = 300.0
"""Seconds after which a test fails that waits for something. No test waits that long unless something is broken."""

STORY = "Die Straße war naß – 雨が降った 🌧️. The rain had stopped; the street was still wet.\n"
TOKENIZER = Tokenizer.train([STORY], 280)
MODEL = small_model(F64, vocab_size=TOKENIZER.vocab_size).requires_grad_(False)
GRAMMARS = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size)
TEMPLATE = Session(MODEL, TOKENIZER, dtype=F64)

_T = TypeVar("_T")


def text_of(seed: int, words: int = 22) -> str:
    choices = random.Random(seed)
    return " ".join(choices.choices(STORY.split(), k=words)) + "\n"


def having_read(*texts: str, template: Session = TEMPLATE) -> Session:
    session = template.fork()
    for text in texts:
        session.read(text)
    return session


def with_engine(
    folder: Path, work: Callable[[Engine], Awaitable[_T]], template: Session = TEMPLATE, **options: Any
) -> _T:
    """The result of `work` with an engine over the store in `folder`."""

    async def main() -> _T:
        store = Store(folder)
        engine = Engine(template.fork(), store, **options)
        await engine.start()
        try:
            return await asyncio.wait_for(work(engine), PATIENCE)
        finally:
            await engine.stop()

    return asyncio.run(main())


async def read(engine: Engine, owner: str, id: str, text: str) -> ReadProgress:
    return (await collect(engine.read(owner, id, [text])))[-1]


async def generate(
    engine: Engine, owner: str, id: str | None, prompt: str, limit: asyncio.Semaphore | None = None, **more: Any
) -> tuple[str, str | None]:
    """The generated text, and why it ended. more: as in `GenerateRequest`."""
    slot = None if id is None else await engine.sessions.slot(owner, id)
    chunks = await collect(engine.generate(slot, GenerateRequest(prompt, **more), limit))
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    return "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason


async def export(engine: Engine, owner: str, id: str, folder: Path) -> Session:
    target = folder / f"exported-{secrets.token_hex(8)}"
    await engine.sessions.export_session(owner, id, target)
    return Session.load(target, TEMPLATE.model, TOKENIZER)


def file_of(folder: Path, id: str) -> Path:
    """The only file of a session in a store."""
    (file,) = folder.glob(f"{id}.*.session")
    return file


async def collect(iterator: AsyncIterator[_T]) -> list[_T]:
    return [item async for item in iterator]


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until a condition comes true."""
    while not condition():
        await asyncio.sleep(0.001)


def assert_same(ours: Session, expected: Session, tolerance: float = 1e-9) -> None:
    mine, theirs = ours.state(), expected.state()
    assert (mine.text, mine.read_state.position) == (theirs.text, theirs.read_state.position)
    np.testing.assert_array_equal(mine.pending, theirs.pending)
    torch.testing.assert_close(mine.read_state.tensors(), theirs.read_state.tensors(), rtol=tolerance, atol=tolerance)
    assert ours.info().text_digest == expected.info().text_digest


class HeldText:
    """A text in two chunks, of which the second waits for `release`."""

    def __init__(self, text: str) -> None:
        self.text, self.reached, self.release = text, threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[str]:
        yield self.text[:50]
        self.reached.set()
        assert self.release.wait(PATIENCE)
        yield self.text[50:]


@contextmanager
def diverging_at(position: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, learning seems to diverge at the mini-batch after `position` tokens."""
    original = session_pool.find_divergence

    def find_divergence(losses: np.ndarray, norm: float, at: int, *rest: Any, **more: Any) -> tuple[str, bool] | None:
        if at == position:
            return "this is made up", False
        return original(losses, norm, at, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(session_pool, "find_divergence", find_divergence)
        yield


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> int:
    """No token ends a generated text; returns more tokens than any test waits for."""
    monkeypatch.setattr(TOKENIZER, "end_ids", frozenset())
    return 5_000_000


def hold_saving(patch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Let the next versions of sessions wait before they are saved: until the second event; the first tells of it."""
    saving, release, original = threading.Event(), threading.Event(), Store.replace

    def held_replace(store: Store, *args: Any) -> SessionRecord:
        saving.set()
        assert release.wait(PATIENCE)
        return original(store, *args)

    patch.setattr(Store, "replace", held_replace)
    return saving, release
