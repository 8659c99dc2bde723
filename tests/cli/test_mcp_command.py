"""`ttt-e2e mcp`: over standard input and output, and over HTTP, with the official client."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import anyio
import pytest
from cli_helpers import TEXT, run
from helpers import start_command
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client

from ttt_e2e.cli.main import COMMANDS
from ttt_e2e.cli.mcp import _address
from ttt_e2e.cli.parser import parse
from ttt_e2e.inference.session_file import session_facts


async def use(client: Client) -> None:
    """What a client does, against what the command line says."""
    with anyio.fail_after(300):
        called = await client.call_tool("read", {"path": "BOOK.txt"})
        assert not called.is_error, called.content
        facts = session_facts(Path("kept/default.session"))
        assert called.structured_content and called.structured_content["session"]["tokens"] == facts["tokens"]
        found = await client.call_tool("recall", {"query": "grey geese", "count": 1})
        assert found.structured_content and "grey geese" in found.structured_content["result"][0]["text"]


@pytest.fixture
def options(here: Path, model_dir: Path) -> list[str]:
    (here / "texts").mkdir()
    (here / "texts/BOOK.txt").write_text(TEXT[:300])
    return ["mcp", "--model", str(model_dir / "model"), "--sessions", "kept", "--files", "texts", "--threads", "1"]


def test_a_client_starts_it(options: list[str], here: Path) -> None:
    command = StdioServerParameters(command=sys.executable, args=["-m", "ttt_e2e", *options], env=dict(os.environ))

    async def main() -> None:
        async with Client(stdio_client(command)) as client:
            await use(client)

    anyio.run(main)
    assert session_facts(here / "kept/default.session")["text_bytes"] == 300


def test_nothing_but_the_protocol_is_on_standard_output(options: list[str], here: Path) -> None:
    to_server, ours = os.pipe()
    theirs, from_server = os.pipe()

    def only_theirs() -> None:
        os.close(ours)
        os.close(theirs)
        print("before the server begins", file=sys.stderr)

    errors = os.open(here / "errors", os.O_CREAT | os.O_WRONLY)
    child = start_command(options, to_server, from_server, errors, only_theirs)
    for descriptor in (to_server, from_server, errors):
        os.close(descriptor)
    about = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    calls = [
        {"name": "read", "arguments": {"path": "BOOK.txt"}},
        {"name": "ask", "arguments": {"prompt": "1 grey", "max_tokens": 3}},
        {"name": "ask", "arguments": {"prompt": "1 grey", "session": "gone"}},
    ]
    with os.fdopen(ours, "w") as requests, os.fdopen(theirs) as answers:

        def send(method: str, params: dict, id: int | None = None) -> dict:
            message = {"jsonrpc": "2.0", "method": method, "params": params}
            print(json.dumps(message if id is None else message | {"id": id}), file=requests, flush=True)
            return {} if id is None else json.loads(answers.readline())

        assert send("initialize", about, 0)["result"]["serverInfo"]["name"] == "ttt-e2e"
        send("notifications/initialized", {})
        for id, call in enumerate(calls, 1):
            answer = send("tools/call", call, id)
            assert answer["id"] == id and answer["result"].get("isError", False) == (id == 3)
        requests.close()
        assert answers.read() == ""
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@contextmanager
def serving(options: list[str], stop: Callable[[int], None]) -> Iterator[str]:
    """The address of a server in a copy of this process."""
    reading, writing = os.pipe()
    null = os.open(os.devnull, os.O_RDWR)
    child = start_command(options, null, null, writing, lambda: os.close(reading))
    os.close(writing)
    os.close(null)
    with os.fdopen(reading) as errors:
        line = next((line for line in errors if "http://" in line), "")
        assert "sessions in kept" in line
        try:
            yield line.split()[3].rstrip(",")
        finally:
            stop(child)
            rest = errors.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, rest


def test_it_serves_over_http_until_a_signal(options: list[str], here: Path) -> None:
    with serving([*options, "--http", "0"], lambda child: os.kill(child, signal.SIGTERM)) as address:

        async def main() -> None:
            async with Client(address) as client:
                await use(client)

        anyio.run(main)
    assert session_facts(here / "kept/default.session")["text_bytes"] == 300


@pytest.mark.parametrize("command", ["mcp --http 0 --sessions kept", "serve --port 0 --data kept"])
def test_the_event_loop_is_that_of_every_machine(
    command: str, here: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not uvloop's, which uvicorn takes where it is installed: then it would serve in another way there."""
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    used: list[object] = []
    monkeypatch.setitem(sys.modules, "uvloop", ModuleType("uvloop"))
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: used.append(self.config.get_loop_factory()))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert run(*command.split(), "--model", model_dir / "model", "--threads", 1) == 0
    assert used == [asyncio.SelectorEventLoop]


@pytest.mark.parametrize("command", ["mcp --http 0 --sessions kept", "serve --port 0 --data kept"])
def test_a_model_by_name_is_looked_up_once(
    command: str, here: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    shown: list[bool] = []

    def folder(progress: bool) -> Path:
        shown.append(progress)
        return model_dir / "model"

    monkeypatch.setattr("ttt_e2e.convert.smollm2.smollm2_folder", folder)
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert run(*command.split(), "--model", "smollm2", "--threads", 1) == 0
    assert shown == [True]


def test_ctrl_c_ends_it_at_once(options: list[str], here: Path) -> None:
    reading, ours = os.pipe()
    theirs, writing = os.pipe()
    null = os.open(os.devnull, os.O_RDWR)
    child = start_command(options, reading, writing, null, lambda: os.close(ours))
    for descriptor in (reading, writing, null):
        os.close(descriptor)
    with os.fdopen(ours, "w") as requests, os.fdopen(theirs) as answers:
        print('{"jsonrpc": "2.0", "id": 1, "method": "ping"}', file=requests, flush=True)
        assert answers.readline()  # it waits for the next one now
        os.kill(child, signal.SIGINT)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


@pytest.mark.parametrize("full", [False, True])
def test_a_client_that_reads_no_more_is_no_traceback(options: list[str], here: Path, full: bool) -> None:
    ping = '{"jsonrpc": "2.0", "id": 1, "method": "ping"}'
    with Path("/dev/full").open("w") as nowhere:
        process = subprocess.Popen(
            [sys.executable, "-m", "ttt_e2e", *options],
            stdin=subprocess.PIPE,
            stdout=nowhere if full else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    with process:
        assert process.stdin and process.stderr
        print(ping, file=process.stdin, flush=True)
        if process.stdout:
            assert process.stdout.readline()
            process.stdout.close()
            print(ping, file=process.stdin, flush=True)
        time.sleep(1)  # else it may end before it answers
        process.stdin.close()
        said = process.stderr.read()
    if full:
        assert said in ("", "ttt-e2e: error: No space left on the disk; make room and run the command again.\n")
    else:
        assert said == "" and process.returncode in (0, 1)


def test_in_a_terminal_it_says_what_it_waits_for(options: list[str], here: Path) -> None:
    ours, terminal = os.openpty()
    reading, errors = os.pipe()
    null = os.open(os.devnull, os.O_WRONLY)
    child = start_command(options, terminal, null, errors)
    for descriptor in (terminal, null, errors):
        os.close(descriptor)
    with os.fdopen(reading) as said:
        assert "Waiting for a client" in said.readline()
        os.write(ours, b"\x04")  # the end of the input
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert said.read() == ""
    os.close(ours)


def test_bad_options_have_one_sentence(options: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, address in {
        "8001": ("127.0.0.1", 8001),
        "localhost:0": ("localhost", 0),
        "[::1]:65535": ("::1", 65535),
    }.items():
        assert _address(text) == address
    for words, why in (
        (["--http", "0.0.0.0:8001"], "only this machine may connect"),
        (["--http", "example.com:1"], "only this machine may connect"),
        (["--http", "65536"], "not an address"),
        (["--http", "::1:80"], "not an address"),
        (["--http", "x"], "not an address"),
        (["--files", "BOOK.txt"], "not a folder"),
        (["--sessions", "texts/BOOK.txt"], "Cannot keep sessions"),
    ):
        assert run(*options, *words) in (1, 2), words
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and why in captured.err


def test_the_configurations_in_the_tutorial_are_accepted() -> None:
    text = (Path(__file__).parents[2] / "docs/tutorials/mcp.md").read_text()
    by_command, by_url = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.S))
    entry = by_command["mcpServers"]["ttt-e2e"]
    assert entry["command"].endswith("/ttt-e2e") and parse(entry["args"], COMMANDS).run is COMMANDS["mcp"].run
    assert by_url["mcpServers"]["ttt-e2e"]["url"] == "http://127.0.0.1:8001/mcp" and "mcp --http 8001" in text


def test_a_missing_library_is_named(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mcp.server", None)
    assert run(*options) == 1
    assert 'pip install "ttt-e2e[mcp]"' in capsys.readouterr().err
