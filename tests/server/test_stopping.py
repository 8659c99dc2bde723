"""The service while it stops: every request is done and answered, or refused with status 503, and nothing is lost."""

import asyncio
import copy
import functools
import gc
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

import torch
import uvicorn
from engine_helpers import MODEL, TEMPLATE, TOKENIZER, collect
from engine_helpers import endless as endless
from helpers import start_command
from server_helpers import (
    PATIENCE,
    PLAIN_TEXT,
    FakeEngine,
    client_at,
    connection_to,
    log_lines,
    receive_until,
    send_post,
    until,
)

from ttt_e2e.model.checkpoint import save_model
from ttt_e2e.server import serving
from ttt_e2e.server.app import create_app
from ttt_e2e.server.connections import BoundedProtocol, bounded_protocol
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.records import GenerateRequest, StoppingError
from ttt_e2e.server.engine.store import Store
from ttt_e2e.server.keys import KEYS_VARIABLE
from ttt_e2e.server.serving import Server
from ttt_e2e.server.settings import Settings

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("turns", range(1, 5))
def test_connection_that_is_made_while_the_server_stops_ends(engine: FakeEngine, turns: int) -> None:
    """uvicorn forgets it, and would answer it until the event loop has no threads any more: with status 500."""
    kept: list[socket.socket] = []
    aborted: list[BoundedProtocol] = []

    class Protocol(BoundedProtocol):
        def abort(self) -> None:
            aborted.append(self)
            super().abort()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"

        class Ends(Server):
            async def main_loop(self) -> None:
                with connection_to(address) as connection:  # by the system: the event loop has not seen it yet
                    kept.append(connection.dup())
                    for _ in range(turns):  # of the loop, which accepts it in between
                        await asyncio.sleep(0)

        server = Ends(create_app(engine, Settings("tiny")), engine, Protocol, 9)  # type: ignore[arg-type]
        server.run([listener])
    assert not aborted
    gc.collect()  # some versions of Python keep one that was accepted too late
    with kept[0] as connection:
        connection.settimeout(PATIENCE)
        try:
            connection.sendall(HEALTH)
            assert connection.recv(1 << 16) == b""
        except OSError:
            pass  # reset, which is as good


class Held:
    """A function that a test holds: it announces each call, and waits until it may go on."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.reached, self.release = function, threading.Event(), threading.Event()

    def __call__(self, *args: Any) -> Any:
        self.reached.set()
        assert self.release.wait(PATIENCE)
        return self.function(*args)


class Hasty(Engine):
    """An engine that gives running requests no time."""

    async def stop(self, seconds: float = 0.0) -> None:
        await super().stop(seconds)


@contextmanager
def running(engine: Any) -> Iterator[tuple[str, Server]]:
    """The address of a service over `engine`, and its server, which stops at the end of the block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(create_app(engine, Settings("tiny")), engine, bounded_protocol(99), 99)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


def tokens_of(folder: Path) -> list[int]:
    """How many tokens the sessions in a store have read, as the next process finds it."""
    store = Store(folder)
    try:
        return [record.info.tokens for record in store.records()]
    finally:
        store.close()


def test_change_that_is_being_saved_is_completed_and_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes: cut off, its request would be told that nothing was done, and be made again."""
    monkeypatch.setattr(serving, "CLIENT_SECONDS", 0.0)
    store = Store(tmp_path / "data")
    engine = Hasty(TEMPLATE.fork(), store)
    held = Held(store.replace)
    monkeypatch.setattr(store, "replace", held)
    with ThreadPoolExecutor() as threads, ExitStack() as stack:
        with running(engine) as (address, _):
            client = stack.enter_context(client_at(address))
            id = client.post("/v1/sessions").json()["id"]
            reading = threads.submit(client.post, f"/v1/sessions/{id}/read", content=b"Rain", headers=PLAIN_TEXT)
            assert held.reached.wait(PATIENCE)
            threads.submit(until, lambda: engine.sessions._files.closed).add_done_callback(lambda _: held.release.set())
        done = reading.result()
    assert done.status_code == 200
    assert tokens_of(tmp_path / "data") == [done.json()["session"]["tokens"]] != [1]


def test_request_that_waits_for_its_client_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "CLIENT_SECONDS", 0.0)
    engine = Engine(TEMPLATE.fork(), Store(tmp_path / "data"))
    with log_lines() as lines, ExitStack() as stack:
        with running(engine) as (address, _), client_at(address) as client:
            id = client.post("/v1/sessions").json()["id"]
            connections = []
            for path, kind in ((f"/v1/sessions/{id}/read", "text/plain"), ("/v1/sessions/import", "x/y")):
                connections.append(stack.enter_context(connection_to(address)))
                send_post(connections[-1], path, b"Ra", {"content-type": kind, "content-length": "4"})
            until(lambda: list((tmp_path / "data").glob(".tmp-*/import.session")))
        for connection in connections:
            answer = b"".join(iter(functools.partial(connection.recv, 1 << 16), b""))
            assert answer.startswith(b"HTTP/1.1 503") and b'"stopping"' in answer
    assert [json.loads(line)["status"] for line in lines] == [201, 503, 503]
    assert tokens_of(tmp_path / "data") == [1] and not list((tmp_path / "data").glob(".tmp-*"))


def test_second_interrupt_gives_running_requests_no_time() -> None:
    class Busy(FakeEngine):
        """Its requests never end by themselves."""

        async def start(self) -> None:
            self.ended = asyncio.Event()

        async def stop(self, seconds: float = 10.0) -> None:
            if seconds == 0:
                self.ended.set()
            await self.ended.wait()

    with running(Busy(hold_from=2)) as (address, server), connection_to(address) as connection:
        body = json.dumps({"prompt": "x", "stream": True}).encode()
        send_post(connection, "/v1/completions", body, {"content-type": "application/json"})
        receive_until(connection, b"data: ")
        for _ in range(2):
            server.handle_exit(signal.SIGINT, None)
        until(lambda: not connection.recv(1 << 16))


def test_engine_is_told_to_stop_sooner(tmp_path: Path, endless: int) -> None:
    async def main() -> None:
        engine = Engine(TEMPLATE.fork(), Store(tmp_path / "data"))
        await engine.start()
        generation = engine.generate(None, GenerateRequest("Rain", max_tokens=endless))
        await anext(generation)
        stopping = asyncio.create_task(engine.stop(PATIENCE))
        await asyncio.sleep(0)
        await engine.stop(0)
        with pytest.raises(StoppingError):
            await collect(generation)
        await stopping

    asyncio.run(main())


def test_files_are_read_and_written_before_the_store_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next process may remove them, which looks like damage."""

    async def main() -> None:
        engine = Engine(TEMPLATE.fork(), Store(tmp_path / "data"), memory_bytes=1)
        await engine.start()
        sessions = engine.sessions
        id = (await sessions.create("me")).id
        slot = await sessions.slot("me", id)
        await sessions.export_session("me", id, tmp_path / "exported")
        for module, name, request in (
            (sessions._files._loader, "load", lambda: sessions.import_session("me", tmp_path / "exported")),
            (sessions._files._loader, "load", lambda: sessions.session(slot)),
            (sessions._files, "export", lambda: sessions.export_session("me", id, tmp_path / "again")),
        ):
            held = Held(getattr(module, name))
            with monkeypatch.context() as patch:
                patch.setattr(module, name, held)
                patch.setattr(sessions._files, "closed", False)
                going = asyncio.create_task(request())
                await asyncio.to_thread(held.reached.wait, PATIENCE)
                closing = asyncio.create_task(sessions.close())
                for _ in range(20):
                    await asyncio.sleep(0)
                assert not closing.done()
                held.release.set()
                await asyncio.gather(going, return_exceptions=True)
                await closing
        await engine.stop()

    asyncio.run(main())


def test_what_needs_the_store_is_refused_once_it_is_closed(tmp_path: Path) -> None:
    async def main() -> None:
        engine = Engine(TEMPLATE.fork(), Store(tmp_path / "data"), memory_bytes=1)
        await engine.start()
        sessions = engine.sessions
        id = (await sessions.create("me")).id
        slot = await sessions.slot("me", id)
        await sessions.export_session("me", id, tmp_path / "exported")
        await engine.stop()
        for path in (tmp_path / "data").iterdir():  # as the next process does with files that it replaces
            path.unlink()
        for request in (
            sessions.create("me"),
            sessions.fork("me", id),
            sessions.delete("me", id),
            sessions.export_session("me", id, tmp_path / "again"),
            sessions.import_session("me", tmp_path / "missing"),
            sessions.session(slot),
        ):
            with pytest.raises(StoppingError):
                await request
        with pytest.raises(StoppingError), sessions.temporary_folder():
            pass

    asyncio.run(main())


@pytest.mark.slow
def test_signal_that_comes_before_the_server_runs_ends_it(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    save_model(copy.deepcopy(MODEL).to(torch.float32), tmp_path / "tiny", tmp_path / "tokenizer.json")
    options = ["--model", str(tmp_path / "tiny"), "--data", str(tmp_path / "data"), "--port", "0", "--threads", "1"]
    run = uvicorn.Server.run

    def signalled(server: Server, sockets: list[socket.socket]) -> None:
        signal.raise_signal(signal.SIGTERM)
        run(server, sockets)

    def before() -> None:
        os.environ.pop(KEYS_VARIABLE, None)
        signal.alarm(int(PATIENCE))
        uvicorn.Server.run = signalled  # type: ignore[method-assign, assignment]

    with (tmp_path / "errors").open("w+") as errors, Path(os.devnull).open("r+") as null:
        child = start_command(["serve", *options], null.fileno(), null.fileno(), errors.fileno(), before)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, (tmp_path / "errors").read_text()
