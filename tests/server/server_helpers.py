"""For the tests of the service: an engine that only pretends, and servers that run in a thread."""

import asyncio
import hashlib
import logging
import secrets
import tempfile
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it would rather have another package than httpx
    from starlette.testclient import TestClient

from ttt_e2e.errors import UserError
from ttt_e2e.inference.sampling import SamplingOptions
from ttt_e2e.server.app import Settings, create_app
from ttt_e2e.server.records import NoSession, Piece, Progress, Prompt, SessionRecord, TooMuch


@dataclass
class Pretended:
    """A session of `FakeEngine`."""

    id: str
    owner: str
    text: str = ""
    created: float = field(default_factory=time.time)

    def record(self) -> SessionRecord:
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        size = len(self.text.encode())
        return SessionRecord(self.id, self.created, 1 + len(self.text.split()), size, digest, 2 * size, True, True)


class FakeEngine:
    """Sessions that only hold their text: a word is a token, and what is written is counted words.

    Losses are 2, and 1 for the last words of a text.

    pause: seconds between two pieces. trouble: raised after `sound` pieces of reading or writing.
    """

    def __init__(self, pause: float = 0.0, trouble: Exception | None = None, sound: int = 0) -> None:
        self.pause, self.trouble, self.sound = pause, trouble, sound
        self.all: dict[str, Pretended] = {}
        self.running = self.most_running = self.read_tokens = self.written_tokens = 0
        self.asked: list[dict[str, Any]] = []
        self.started = self.stopped = False
        self.ready = True

    async def start(self) -> None:
        self.started = True

    async def stop(self, seconds: float = 10.0) -> None:
        self.stopped = True

    async def create(self, owner: str, text: str = "") -> SessionRecord:
        if sum(one.owner == owner for one in self.all.values()) >= 100:
            raise TooMuch("There are 100 sessions; delete one.")
        made = Pretended(f"sess-{secrets.token_hex(16)}", owner, text)
        self.all[made.id] = made
        return made.record()

    def _of(self, owner: str, id: str) -> Pretended:
        found = self.all.get(id)
        if found is None or found.owner != owner:
            raise NoSession
        return found

    async def session(self, owner: str, id: str) -> SessionRecord:
        return self._of(owner, id).record()

    async def sessions(self, owner: str) -> list[SessionRecord]:
        return [one.record() for one in self.all.values() if one.owner == owner]

    async def fork(self, owner: str, id: str) -> SessionRecord:
        return await self.create(owner, self._of(owner, id).text)

    async def delete(self, owner: str, id: str) -> None:
        self._of(owner, id)
        del self.all[id]

    @contextmanager
    def temporary_folder(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)

    async def export(self, owner: str, id: str, target: Path) -> None:
        target.write_bytes(b"session:" + self._of(owner, id).text.encode())

    async def take_in(self, owner: str, source: Path) -> SessionRecord:
        content = source.read_bytes()
        if not content.startswith(b"session:"):
            raise UserError("The file is no session; send one.")
        return await self.create(owner, content[8:].decode())

    async def _step(self, done: int) -> None:
        if self.trouble is not None and done >= self.sound:
            raise self.trouble
        await asyncio.sleep(self.pause)

    async def read(self, owner: str, id: str, pieces: Iterable[str]) -> AsyncIterator[Progress]:
        one = self._of(owner, id)
        with self._at_work():
            words = "".join(pieces).split()
            for done in range(0, len(words), 5):
                await self._step(done // 5)
                yield Progress(done, 2.0 if done else None, 2.0 if done else None, None)
            await self._step(len(words))
            self.read_tokens += len(words)
            one.text += " ".join(words)
            last = len(words) - done
            yield Progress(len(words), 1.0, (2.0 * done + 1.0 * last) / len(words), one.record())

    async def generate(
        self,
        owner: str,
        id: str | None,
        prompt: Prompt | Callable[[bool], Prompt],
        *,
        max_tokens: int = 200,
        stop: Sequence[str] = (),
        options: SamplingOptions,
        learn: bool = False,
        closing: Prompt = "",
        turns: asyncio.Semaphore | None = None,
    ) -> AsyncIterator[Piece]:
        one = None if id is None else self._of(owner, id)
        if callable(prompt):
            prompt = prompt(one is not None and bool(one.text))
        words = prompt if isinstance(prompt, str) else "".join(str(part) for part in prompt)
        self.asked.append(dict(prompt=words, max_tokens=max_tokens, stop=tuple(stop), options=options, learn=learn))
        read, text = len(words.split()), ""
        async with turns or nullcontext():
            with self._at_work():
                for count in range(1, max_tokens + 1):
                    await self._step(count)
                    word = f" w{count}ä"
                    text += word
                    self.written_tokens += 1
                    yield Piece(word, None, read, count)
                    if any(end in text for end in stop):
                        break
                if learn and one is not None:
                    one.text += words + text + "".join(str(part) for part in closing)
                yield Piece("", "length" if count == max_tokens else "stop", read, count)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            yield
        finally:
            self.running -= 1

    def numbers(self) -> dict[str, float]:
        return dict(
            sessions_in_memory=len(self.all),
            sessions_on_disk=len(self.all),
            bytes_in_memory=0,
            running=self.running,
            tokens_read=self.read_tokens,
            tokens_written=self.written_tokens,
            steps=0,
        )


@contextmanager
def client_of(engine: Any, *, host: str = "localhost", **settings: Any) -> Iterator[TestClient]:
    """A client of the service over `engine`, without a network between them."""
    app = create_app(engine, Settings("tiny", **settings))
    with TestClient(app, base_url=f"http://{host}") as client:
        yield client


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of `app`, which a server of its own serves inside the block."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(condition: Any, seconds: float = 20.0) -> None:
    """Wait for something that must come; so long a wait fails."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """The lines that the service logs inside the block."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log, keep = logging.getLogger("ttt_e2e.server.requests"), Keep()
    level = log.level
    log.addHandler(keep)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.removeHandler(keep)
        log.setLevel(level)
