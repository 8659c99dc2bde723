"""Connections: silent clients, and those that do not take their responses, keep nobody else from being answered."""

import asyncio
import functools
import json
import os
import resource
import socket
import subprocess
import sys
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from helpers import small_model
from server_helpers import (
    PATIENCE,
    FakeEngine,
    client_at,
    connection_to,
    log_lines,
    receive_until,
    send_post,
    served,
    until,
)

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.model.checkpoint import save_model
from ttt_e2e.server import connections
from ttt_e2e.server.connections import MAX_CONNECTIONS, bounded_protocol, connection_limit
from ttt_e2e.server.keys import KEYS_VARIABLE
from ttt_e2e.server.middleware.logs import SECONDS_BETWEEN_EQUAL_LINES

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.01)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_oldest_connection_without_a_request_gives_way(engine: FakeEngine) -> None:
    engine.hold_from = 2
    body, kind = json.dumps({"prompt": "x", "stream": True}).encode(), {"content-type": "application/json"}
    with ExitStack() as stack:
        address = stack.enter_context(served(engine, http=bounded_protocol(4)))
        busy, answered, silent, half = (stack.enter_context(connection_to(address)) for _ in range(4))
        send_post(busy, "/v1/completions", body, kind)
        receive_until(busy, b"data: ")
        answered.sendall(HEALTH)
        receive_until(answered, b'"ok"')
        half.sendall(HEALTH[:9])
        for gives_way in (silent, half, answered):
            assert not is_closed(gives_way)
            new = stack.enter_context(connection_to(address))
            new.sendall(HEALTH)
            receive_until(new, b'"ok"')
            until(functools.partial(is_closed, gives_way))
        assert not is_closed(busy)


class Clocked(FakeEngine):
    """An engine in an event loop whose clock can be put forward."""

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        await super().start()

    def put_clock_forward(self, seconds: float) -> None:
        """Not in the middle of what the event loop is doing: it may be about to set a timer."""
        time = self.loop.time
        self.loop.call_soon_threadsafe(setattr, self.loop, "time", lambda: time() + seconds)


def test_client_that_sends_no_request_is_disconnected() -> None:
    engine = Clocked()
    with ExitStack() as stack:
        address = stack.enter_context(served(engine, http=bounded_protocol(100)))
        silent, slow, again, last = (stack.enter_context(connection_to(address)) for _ in range(4))
        again.sendall(HEALTH)
        receive_until(again, b'"ok"')
        slow.sendall(HEALTH[:30])
        again.sendall(HEALTH[:30])  # which ends the time for which uvicorn keeps an idle connection
        last.sendall(HEALTH)
        receive_until(last, b'"ok"')  # so the server has received what came before it
        for connection in (silent, slow, again):
            assert not is_closed(connection)
        engine.put_clock_forward(connections.REQUEST_SECONDS)
        for connection in (silent, slow, again):
            until(functools.partial(is_closed, connection))


def test_connection_is_kept_for_longer_than_by_clients() -> None:
    """Those of OpenAI and Anthropic keep it for 5 seconds; if the server did, too, requests would meet its end."""
    engine = Clocked()
    with served(engine, http=bounded_protocol(100)) as address, connection_to(address) as connection:
        for _ in range(2):
            connection.sendall(HEALTH)
            receive_until(connection, b'"ok"')
            engine.put_clock_forward(10.0)
            with connection_to(address) as other:  # answered once the timers have gone off
                other.sendall(HEALTH)
                receive_until(other, b'"ok"')


def test_client_that_does_not_take_its_response_is_disconnected(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "RESPONSE_SECONDS", 0.1)
    with log_lines() as lines, served(engine, http=bounded_protocol(100)) as address, client_at(address) as client:
        session = client.post("/v1/sessions").json()["id"]
        engine.all[session].text = "x" * (16 << 20)
        with connection_to(address) as connection:
            connection.sendall(f"GET /v1/sessions/{session}/export HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            until(lambda: len(lines) == 2)
    assert json.loads(lines[1])["status"] == 499


def test_connection_limit_leaves_files_for_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, values: limits.append(values))
    for allowed, most, limit in (
        (256, 256, 68),
        (1024, 1 << 20, MAX_CONNECTIONS),
        (1024, resource.RLIM_INFINITY, MAX_CONNECTIONS),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, MAX_CONNECTIONS),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda _, values=(allowed, most): values)
        assert connection_limit() == limit
    assert limits == [(256, 256), (3050, 1 << 20), (3050, resource.RLIM_INFINITY)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    with pytest.raises(UserError, match="may open 64 files here"):
        connection_limit()


@pytest.mark.slow
def test_silent_connections_take_no_file_from_others(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train([""], 257)
    tokenizer.save(tmp_path / "tokenizer.json")
    save_model(small_model(vocab_size=257), tmp_path / "tiny", tmp_path / "tokenizer.json")
    options = ["--model", str(tmp_path / "tiny"), "--data", str(tmp_path / "data"), "--port", "0", "--threads", "1"]
    command = ["bash", "-c", 'ulimit -n 128; exec "$@"', "-", sys.executable, "-m", "ttt_e2e", "serve", *options]
    environment = os.environ | {KEYS_VARIABLE: "anna a-long-key-for-anna-1"}
    silent: list[socket.socket] = []
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, env=environment, stderr=log) as server:
        try:
            until(lambda: b"Serving" in (tmp_path / "log").read_bytes())
            address = (tmp_path / "log").read_text().split()[3].rstrip(",")
            with client_at(address) as client:
                client.headers["authorization"] = "Bearer a-long-key-for-anna-1"
                until(lambda: client.get("/health").status_code == 200)
                for _ in range(10):
                    for _ in range(30):
                        silent.append(socket.create_connection(client.base_url.netloc.decode().split(":"), PATIENCE))
                    client.headers["connection"] = "close"
                    session = client.post("/v1/sessions").json()["id"]
                    form = {"file": b"A text. "}
                    assert client.post(f"/v1/sessions/{session}/read", files=form).status_code == 200
        finally:
            server.kill()
            for connection in silent:
                connection.close()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()[1:]]
    warnings = [line["message"] for line in lines if "message" in line]
    assert set(warnings) == {"There are 26 connections, as many as possible; those without a request end."}
    first, last = (datetime.fromisoformat(line["time"]) for line in (lines[0], lines[-1]))
    assert len(warnings) <= 1 + (last - first).total_seconds() / SECONDS_BETWEEN_EQUAL_LINES
