"""For the tests of the service: a fake engine, and servers that run in a thread."""

import asyncio
import hashlib
import json
import logging
import math
import secrets
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import uvicorn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it would rather have another package than httpx
    from starlette.testclient import TestClient

from ttt_e2e.errors import UserError
from ttt_e2e.server.app import create_app
from ttt_e2e.server.connections import uvicorn_config
from ttt_e2e.server.engine.records import (
    Before,
    GenerateRequest,
    LimitReachedError,
    LoggedToken,
    NoNotebookError,
    NotebookSummary,
    Prompt,
    ReadProgress,
    SessionNotFoundError,
    SessionSummary,
    Source,
    TextChunk,
)
from ttt_e2e.server.settings import Settings

PATIENCE = 300.0
"""Seconds after which a test fails that waits for something. No test waits that long unless something is broken."""

PLAIN_TEXT = {"content-type": "text/plain"}
PLAIN_TEXT_EVENTS = {**PLAIN_TEXT, "accept": "text/event-stream"}


@dataclass
class FakeSession:
    id: str
    owner: str
    text: str = ""
    created: float = field(default_factory=time.time)
    document: str | None = None
    notebook: list[tuple[str, str]] | None = None  # names and texts
    write_lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def record(self) -> "FakeSession":
        return self

    def summary(self) -> SessionSummary:
        size, digest = len(self.text.encode()), hashlib.sha256(self.text.encode()).hexdigest()
        tokens = 1 + len(self.text.split())
        notebook = None
        if self.notebook is not None:
            notebook = NotebookSummary(size, 2 * size, [name for name, _ in self.notebook if name])
        return SessionSummary(self.id, int(self.created), tokens, size, digest, 2 * size, True, True, None, notebook)


class FakeEngine:
    """Sessions that only hold their text: a word is a token, and generated text is counted words.

    A notebook's passages are whole texts, found if they have a word of the question.

    Losses are 2, and 1 for the last words of a text. failure: raised from step `fail_from` of a request on. Steps from
    `hold_from` on wait until it is raised.
    """

    def __init__(self, failure: Exception | None = None, fail_from: int = 0, hold_from: float = math.inf) -> None:
        self.failure, self.fail_from, self.hold_from = failure, fail_from, hold_from
        self.all: dict[str, FakeSession] = {}
        self.running = self.most_running = self.read_tokens = self.written_tokens = 0
        self.calls: list[GenerateRequest] = []  # with their prompts as text
        self.started = self.stopped = False
        self.ready = True
        self.vocab_size = 1000
        self.lost: str | None = None
        self.sessions = self.store = self.grammars = self  # it is its own registry, store and compiler

    async def start(self) -> None:
        self.started = True

    async def stop(self, seconds: float = 10.0) -> None:
        self.stopped = True

    def compile(self, grammar: str) -> str:
        from engine_helpers import GRAMMARS

        GRAMMARS.compile(grammar)
        return grammar

    async def check_room(self, owner: str) -> None:
        if sum(one.owner == owner for one in self.all.values()) >= 100:
            raise LimitReachedError("There are 100 sessions; delete one.")

    async def create(
        self,
        owner: str,
        session: FakeSession | None = None,
        document: str | None = None,
        id: str | None = None,
        notebook: bool | FakeSession | None = None,
    ) -> SessionSummary:
        await self.check_room(owner)
        made = FakeSession(id or f"sess-{secrets.token_hex(16)}", owner, session.text if session else "")
        made.document = document
        made.notebook = notebook.notebook if isinstance(notebook, FakeSession) else [] if notebook else None
        self.all[made.id] = made
        return made.summary()

    async def replace(self, slot: FakeSession, session: FakeSession, document: str | None = None) -> SessionSummary:
        slot.text, slot.document = session.text, document or slot.document
        return slot.summary()

    async def document(self, slot: FakeSession) -> str | None:
        return slot.document

    async def set_document(self, slot: FakeSession, document: str) -> None:
        slot.document = document

    async def slot(self, owner: str, id: str) -> FakeSession:
        return self._slot(owner, id)

    @asynccontextmanager
    async def changing(self, slot: FakeSession) -> AsyncIterator[None]:
        async with slot.write_lock:
            yield

    def _slot(self, owner: str, id: str) -> FakeSession:
        found = self.all.get(id)
        if found is None or found.owner != owner:
            raise SessionNotFoundError
        return found

    async def summary(self, owner: str, id: str) -> SessionSummary:
        return self._slot(owner, id).summary()

    async def summaries(self, owner: str) -> list[SessionSummary]:
        return [one.summary() for one in self.all.values() if one.owner == owner]

    async def fork(self, owner: str, id: str) -> SessionSummary:
        return await self.create(owner, self._slot(owner, id), notebook=self._slot(owner, id))

    async def delete(self, owner: str, id: str) -> None:
        self._slot(owner, id)
        del self.all[id]

    @contextmanager
    def temporary_folder(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)

    async def export_session(self, owner: str, id: str, target: Path) -> str:
        target.write_bytes(b"session:" + self._slot(owner, id).text.encode())
        return f"{id}.session"

    async def recall(self, owner: str, id: str, query: str, count: int) -> list[Source]:
        one = self._slot(owner, id)
        if one.notebook is None:
            raise NoNotebookError
        found = [(name, text) for name, text in one.notebook if set(text.split()) & set(query.split())]
        return [Source(name or None, 0, len(text), len(text), text, 1.5) for name, text in found[:count]]

    async def retrieve(self, slot: FakeSession, question: str, count: int = 3) -> tuple[str, list[Source]]:
        found = await self.recall(slot.owner, slot.id, question, count)
        return "".join(f"[{one.text}]" for one in found) + question, found

    async def import_session(self, owner: str, source: Path) -> SessionSummary:
        content = source.read_bytes()
        if not content.startswith(b"session:"):
            raise UserError("The file is not a session; send one.")
        return await self.create(owner, FakeSession("", owner, content[8:].decode()))

    async def _step(self, number: int) -> None:
        if self.failure is not None and number >= self.fail_from:
            raise self.failure
        await asyncio.sleep(0)
        while number >= self.hold_from:
            await asyncio.sleep(0.001)

    async def read(self, owner: str, id: str, chunks: Iterable[str], name: str = "") -> AsyncIterator[ReadProgress]:
        one = self._slot(owner, id)
        with self._request():
            words = "".join(chunks).split()
            if one.notebook is not None:
                one.notebook = [*one.notebook, (name, "".join(chunks))]
            for done in range(0, len(words), 5):
                await self._step(done // 5)
                yield ReadProgress(done, 2.0 if done else None, 2.0 if done else None, bytes=done)
            await self._step(len(words))
            self.read_tokens += len(words)
            one.text += " ".join(words)
            last = len(words) - done
            yield ReadProgress(len(words), (2.0 * done + 1.0 * last) / len(words), 1.0, one.summary())

    async def generate(
        self, slot: FakeSession | None, request: GenerateRequest, limit: asyncio.Semaphore | None = None
    ) -> AsyncIterator[TextChunk]:
        before: Before = "text" if slot is not None and slot.text else "nothing"
        prompt = request.prompt(before) if callable(request.prompt) else request.prompt
        words = prompt if isinstance(prompt, str) else "".join(str(part) for part in prompt)
        self.calls.append(replace(request, prompt=words, kept=None, save=None))
        read, text, sources, stop = len(words.split()), "", request.sources, request.stop
        logged = None
        if request.logprobs is not None:
            logged = (LoggedToken("w", -1.0, (("w", -1.0), ("v", -2.0))[: request.logprobs]),)
        async with limit or nullcontext():
            with self._request():
                count = 0
                if request.echo:
                    yield TextChunk(words, None, read, 0, None, logged, sources)
                    sources = None
                for count in range(1, request.max_tokens + 1):
                    await self._step(count)
                    word = f" w{count}ä"
                    text += word
                    self.written_tokens += 1
                    yield TextChunk(word, None, read, count, None, logged, sources)
                    sources = None
                    if any(end in text for end in stop):
                        break
                ending = next((end for end in stop if end in text), None)
                last = TextChunk("", "stop" if ending else "length", read, count, ending, None, sources)
                if request.learn:
                    kept = words if request.kept is None else request.kept
                    learned = (slot.text if slot else "") + str(kept(before) if callable(kept) else kept)
                    learned += text + "".join(str(part) for part in request.closing)
                    if request.save is not None:
                        await request.save(FakeSession("", "", learned), text, last)  # type: ignore[arg-type]
                    elif slot is not None:
                        slot.text = learned
                yield last

    async def count_prompt(self, slot: FakeSession | None, prompt: Callable[[Before], Prompt], tools: str = "") -> int:
        before: Before = "text" if slot is not None and slot.text else "nothing"
        return len("".join(str(part) for part in prompt(before)).split())

    @contextmanager
    def _request(self) -> Iterator[None]:
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            yield
        finally:
            self.running -= 1

    def stats(self) -> dict[str, float]:
        return dict(
            sessions_in_memory=len(self.all),
            sessions_on_disk=len(self.all),
            bytes_in_memory=0,
            running=self.running,
            tokens_read=self.read_tokens,
            tokens_written=self.written_tokens,
            steps=0,
        )


def words(count: int) -> str:
    """What `FakeEngine` generates."""
    return "".join(f" w{i}ä" for i in range(1, count + 1))


@contextmanager
def client_of(engine: Any, *, host: str = "localhost", **settings: Any) -> Iterator[TestClient]:
    """A client of the service over `engine`, without a network between them."""
    app = create_app(engine, Settings("tiny", **settings))
    with TestClient(app, base_url=f"http://{host}") as client:
        yield client


@contextmanager
def served(engine: Any, *, http: Any = "h11", **settings: Any) -> Iterator[str]:
    """The address of a server in a thread, for the service over `engine`.

    http: uvicorn's protocol.
    """
    app = create_app(engine, Settings("tiny", **settings))
    options = {"host": "127.0.0.1", "port": 0, "http": http, "log_config": None, "timeout_graceful_shutdown": 5}
    server = uvicorn.Server(uvicorn_config(app, **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


@contextmanager
def client_at(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=PATIENCE) as client:
        yield client


@contextmanager
def connection_to(address: str) -> Iterator[socket.socket]:
    """A connection that is closed at the end of the block, whether the server has answered or not."""
    to = urlsplit(address)
    with socket.create_connection((to.hostname, to.port), timeout=PATIENCE) as connection:
        yield connection


def send_post(connection: socket.socket, path: str, body: bytes, headers: Mapping[str, str]) -> None:
    lines = {"host": "localhost", "content-length": str(len(body)), **headers}
    head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
    connection.sendall(head.encode() + body)


def receive_until(connection: socket.socket, found: bytes) -> None:
    received = b""
    while found not in received:
        part = connection.recv(1 << 16)
        assert part, received
        received += part


def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition that must come true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)


def parse_events(text: str) -> list[Any]:
    """The events of a stream; each is a line of data and an empty line."""
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error in a response, which must have OpenAI's form."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    message = body["error"]["message"]
    assert message.endswith(".") and "Traceback" not in message
    error: dict[str, Any] = body["error"]
    return error


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """The lines of the request log inside the block."""
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
