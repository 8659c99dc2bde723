"""The server by its official client, in this process: the tools, errors, progress, cancellation and resources."""

import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
from engine_helpers import F64, TEMPLATE, TOKENIZER, text_of
from helpers import small_model
from mcp import Client, MCPError
from starlette.testclient import TestClient

from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Session
from ttt_e2e.mcp_server.allowed_files import AllowedFiles
from ttt_e2e.mcp_server.server import SessionServer
from ttt_e2e.mcp_server.sessions import SessionFolder

FIRST, SECOND = text_of(1), text_of(2)
FACT = "The harbour master keeps the spare key in a blue teapot.\n"
MODES = ("auto", "legacy")  # the protocol without a handshake, and the one before

pytestmark = pytest.mark.usefixtures("one_thread")


def server_of(path: Path, files: Sequence[Path] = (), template: Session = TEMPLATE) -> SessionServer:
    return SessionServer(SessionFolder(path / "sessions", template.fork()), AllowedFiles(files))


def with_client(
    path: Path,
    work: Callable[[Client], Awaitable[None]],
    mode: str = "auto",
    files: Sequence[Path] = (),
    template: Session = TEMPLATE,
) -> None:
    async def main() -> None:
        async with Client(server_of(path, files, template), mode=mode) as client:
            with anyio.fail_after(300):
                await work(client)

    anyio.run(main)


async def result(client: Client, tool: str, **arguments: Any) -> Any:
    called = await client.call_tool(tool, arguments)
    assert not called.is_error, called.content
    assert called.structured_content is not None
    content: dict[str, Any] = called.structured_content
    return content.get("result", content)


async def error(client: Client, tool: str, **arguments: Any) -> str:
    called = await client.call_tool(tool, arguments)
    (content,) = called.content
    assert called.is_error and content.type == "text" and "\n" not in content.text
    return content.text


@pytest.mark.parametrize("mode", MODES)
def test_all_tools_and_resources(tmp_path: Path, mode: str) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/second.txt").write_text(SECOND)
    progress: list[tuple[float, float | None]] = []

    async def report(done: float, total: float | None, message: str | None) -> None:
        progress.append((done, total))

    async def work(client: Client) -> None:
        tools = (await client.list_tools()).tools
        assert [tool.name for tool in tools] == ["read", "ask", "recall", "fork", "forget"]
        assert all(tool.description and "\n  " not in tool.description for tool in tools)
        called = await client.call_tool("read", {"text": FIRST, "session": "book"}, progress_callback=report)
        assert called.structured_content and called.structured_content["tokens"] == len(TOKENIZER.encode(FIRST))
        assert progress == [(len(FIRST.encode()), len(FIRST.encode()))]
        second = await result(client, "read", path="second.txt", session="book")
        alone = TEMPLATE.fork()
        for text in (FIRST, SECOND):
            alone.read(text)
        assert second["session"]["tokens"] == alone.info().tokens
        asked = await result(client, "ask", prompt="The rain", session="book", max_tokens=9, temperature=0)
        assert asked["text"] == "".join(alone.generate("The rain", max_tokens=9, temperature=0))
        assert asked["sources"] == []  # none fits into half of this window
        found = await result(client, "recall", query=SECOND.split()[0], session="book", count=20)
        texts = {None: FIRST, "second.txt": SECOND}
        assert {one["document"] for one in found} == set(texts)
        assert all(texts[one["document"]][one["start"] : one["stop"]] == one["text"] for one in found)
        named = {"name": "a title\n", "session": "titled"}
        for text in (FIRST, SECOND):
            await result(client, "read", text=text, **named)
        found = await result(client, "recall", query=SECOND.split()[0], session="titled", count=20)
        assert all(one["document"] == r"a title\n" for one in found)  # in one line
        assert max(one["stop"] for one in found) == len(FIRST + SECOND)  # the second continues the first
        await result(client, "forget", session="titled")
        forked = await result(client, "fork", session="book", new_session="a copy")
        assert (forked["name"], forked["tokens"]) == ("a copy", second["session"]["tokens"])
        listed = json.loads((await client.read_resource("ttt-e2e://sessions")).contents[0].text)  # type: ignore
        assert [one["name"] for one in listed] == ["a copy", "book"] and listed[0] == forked
        uris = [str(resource.uri) for resource in (await client.list_resources()).resources]
        assert uris == ["ttt-e2e://sessions", "ttt-e2e://sessions/a%20copy", "ttt-e2e://sessions/book"]
        described = json.loads((await client.read_resource(uris[1])).contents[0].text)  # type: ignore[union-attr]
        assert described == forked
        assert "forgotten" in await result(client, "forget", session="a copy")
        with pytest.raises(MCPError, match="no session 'a copy'"):
            await client.read_resource(uris[1])

    with_client(tmp_path, work, mode, [tmp_path / "texts"])
    progress.clear()

    async def after_a_restart(client: Client) -> None:
        assert await result(client, "recall", query=SECOND.split()[0], session="book")

    with_client(tmp_path, after_a_restart, mode)


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_names_the_passages_that_the_model_was_shown(tmp_path: Path, mode: str) -> None:
    model = small_model(F64, vocab_size=TOKENIZER.vocab_size, sliding_window=400).requires_grad_(False)
    alone, question = Session(model, TOKENIZER, dtype=F64), "Where is the spare key?"

    def generated(prompt: str) -> str:
        return "".join(alone.generate(prompt, max_tokens=9, temperature=0))

    async def work(client: Client) -> None:
        for name, text in (("first.txt", FIRST), ("keys.txt", FACT), ("second.txt", SECOND)):
            await result(client, "read", text=text, name=name)
            alone.read(text)
        ask = {"prompt": question, "max_tokens": 9, "temperature": 0}
        asked = await result(client, "ask", **ask)
        found = await result(client, "recall", query=question)
        assert asked["sources"] == found[:2]  # the third has no room in half of this window
        source = found[0]
        assert (source["document"], source["text"]) == ("keys.txt", FACT)
        shown = await result(client, "ask", passages=1, **ask)
        place = f"[{len(FIRST)}-{len(FIRST + FACT)}]"
        assert shown == {"text": generated(f"\n\n{place}\n{FACT.strip()}\n\n{question}"), "sources": [source]}
        assert await result(client, "ask", passages=0, **ask) == {"text": generated(question), "sources": None}
        nothing = await result(client, "ask", **ask | {"prompt": "zebra"})
        assert nothing == {"text": generated("zebra"), "sources": []}
        alone.save(tmp_path / "sessions/plain.session")
        plain = await result(client, "ask", session="plain", **ask)
        assert plain == {"text": generated(question), "sources": None}

    with_client(tmp_path, work, mode, template=alone.fork())


def test_errors_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(client: Client) -> None:
        cases: list[tuple[str, dict[str, Any], str]] = [
            ("read", {}, "Give either"),
            ("read", {"text": "a", "path": "b"}, "Give either"),
            ("read", {"path": "b"}, "reads no files"),
            ("read", {"text": "a", "session": "../a"}, "not a name"),
            ("read", {"text": "half a \ud800 pair"}, "surrogate"),
            ("read", {"text": 5}, "text: "),
            ("read", {"txt": "a"}, "no argument 'txt'; it has: name, path, session, text"),
            ("ask", {}, "prompt: "),
            ("ask", {"prompt": "a"}, "no session 'default'"),
            ("ask", {"prompt": "a", "max_tokens": 0}, "max_tokens: "),
            ("ask", {"prompt": "a", "passages": 21}, "passages: "),
            ("ask", {"prompt": "a", "temperature": -1}, "temperature: "),
            ("recall", {"query": "a", "count": 21}, "count: "),
            ("recall", {"query": "a" * 2001}, "query: "),
            ("recall", {"query": "a", "session": "gone"}, "no session 'gone'"),
            ("fork", {"new_session": "b"}, "no session 'default'"),
            ("fork", {"new_session": "b", "session": "b"}, "name of its own"),
            ("forget", {"session": "gone"}, "no session 'gone'"),
            ("fly", {}, "fly"),
        ]
        for tool, arguments, part in cases:
            assert part in await error(client, tool, **arguments), (tool, arguments)
        assert json.loads((await client.read_resource("ttt-e2e://sessions")).contents[0].text) == []  # type: ignore

        def broken(*_: object) -> None:
            raise RuntimeError("a secret")

        monkeypatch.setattr(SessionFolder, "forget", broken)
        assert "secret" not in await error(client, "forget", session="gone")

    with_client(tmp_path, work)


@pytest.mark.parametrize("mode", MODES)
def test_a_cancelled_reading_changes_nothing(tmp_path: Path, mode: str) -> None:
    async def work(client: Client) -> None:
        await result(client, "read", text=FIRST)
        with anyio.CancelScope() as scope:

            async def cancel(*_: object) -> None:
                scope.cancel()

            await client.call_tool("read", {"text": SECOND * 400}, progress_callback=cancel)
        assert scope.cancelled_caught
        read = await result(client, "read", text=SECOND)  # it waits until the cancelled one has ended
        alone = TEMPLATE.fork()
        for text in (FIRST, SECOND):
            alone.read(text)
        assert read["session"]["tokens"] == alone.info().tokens

    with_client(tmp_path, work, mode)


def test_a_server_that_stops_ends_a_reading_with_a_sentence(tmp_path: Path) -> None:
    server = server_of(tmp_path)

    async def stop(*_: object) -> None:
        server.stop()

    async def main() -> None:
        async with Client(server) as client:
            called = await client.call_tool("read", {"text": SECOND * 400}, progress_callback=stop)
            assert called.is_error and "is stopping" in str(called.content)

    anyio.run(main)
    assert list(tmp_path.glob("sessions/*")) == []


def test_readings_of_one_session_wait_for_each_other(tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(lambda number=number: result(client, "read", text=text_of(number, 5)))
            group.start_soon(lambda: result(client, "read", text=SECOND, session="another"))
        listed = json.loads((await client.read_resource("ttt-e2e://sessions/default")).contents[0].text)  # type: ignore
        assert listed["text_bytes"] == sum(len(text_of(number, 5).encode()) for number in range(4))

    with_client(tmp_path, work)


def test_only_files_in_the_allowed_folders_are_found(tmp_path: Path) -> None:
    for name in ("a/deep", "b", "secret"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a/deep/1.txt", "b/2.txt", "secret/3.txt"):
        (tmp_path / name).write_text("text")
    (tmp_path / "a/link").symlink_to(tmp_path / "secret/3.txt")
    (tmp_path / "a/inside").symlink_to(tmp_path / "b/2.txt")
    (tmp_path / "a/folder").symlink_to(tmp_path / "secret")
    (tmp_path / "a/circle").symlink_to(tmp_path / "a/circle")
    files = AllowedFiles([tmp_path / "a", tmp_path / "b"])
    for name in ("deep/1.txt", "2.txt", str(tmp_path / "b/2.txt"), "inside", "../b/2.txt"):
        assert files.find(name).read_text() == "text"
    for name, why in {
        "../secret/3.txt": "may not read",
        str(tmp_path / "secret/3.txt"): "may not read",
        str(tmp_path / "secret/none"): "may not read",  # whether there is one stays unsaid
        "link": "may not read",
        "folder/3.txt": "may not read",
        "/etc/passwd": "may not read",
        "none.txt": "no file",
        "deep": "not a regular file",
        "a\0b": "not the path",
        "x" * 5000: "not the path|no file",
        "circle": "not the path|no file",
    }.items():
        with pytest.raises(UserError, match=why):
            files.find(name)
    with pytest.raises(UserError, match="not a folder"):
        AllowedFiles([tmp_path / "b/2.txt"])


def test_requests_over_http_must_name_this_machine(tmp_path: Path) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    headers = {"accept": "application/json, text/event-stream", "content-type": "application/json"}
    with TestClient(server_of(tmp_path).http_app("127.0.0.2")) as client:
        for host, origin, refused in (
            ("127.0.0.2:8001", None, False),
            ("localhost", None, False),
            ("[::1]:9", "http://localhost:8001", False),
            ("evil.example", None, True),
            ("evil.example:8001", None, True),
            ("localhost.evil.example:8001", None, True),
            ("localhost:8001", "http://evil.example", True),
        ):
            sent = headers | {"host": host} | ({"origin": origin} if origin else {})
            status = client.post("/mcp", json=body, headers=sent).status_code
            assert (status in (403, 421)) == refused, (host, origin, status)
