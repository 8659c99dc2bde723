"""The service before its addresses: errors, keys, owners, limits, logs, metrics, chat templates, the command."""

import asyncio
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import starlette.formparsers
import torch

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from server_helpers import FakeEngine, TestClient, client_of, log_lines, served, until

from ttt_e2e.cli import serve as command
from ttt_e2e.errors import UserError
from ttt_e2e.inference.pretrained_metadata import ChatTemplate
from ttt_e2e.server import uploads
from ttt_e2e.server.app import Settings, create_app
from ttt_e2e.server.chat import Chat
from ttt_e2e.server.keys import ENVIRONMENT, LOCAL, Keys, check_host, load_keys
from ttt_e2e.server.limits import Bucket, Limits
from ttt_e2e.server.logs import RequestLog
from ttt_e2e.server.metrics import Metrics

ANNA, BERT = "a-long-key-for-anna-1", "another-key-for-bert"
KEYS = Keys({"anna": ANNA, "bert": BERT})


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with client_of(engine) as client:
        yield client


def as_(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def error_of(answer: Any, status: int) -> dict[str, Any]:
    """The error that an answer is; it has OpenAI's form."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    message = body["error"]["message"]
    assert message.endswith(".") and "Traceback" not in message
    return body["error"]


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/sessions/", 404),
        ("GET", "/docs", 404),
        ("PUT", "/v1/sessions", 405),
        ("GET", "/v1/completions", 405),
        ("GET", "/v1/models/other", 404),
        ("POST", "/v1/completions", 400),
    ],
)
def test_every_error_has_openais_form(client: TestClient, method: str, path: str, status: int) -> None:
    error_of(client.request(method, path), status)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "5",
        "null",
        "[]",
        '{"prompt"',
        '{"prompt": "\\u12"}',
        "[" * 100_000,
        '{"seed": ' + 5000 * "9" + "}",
        "\xff\xfe",
    ],
)
def test_bodies_that_are_no_json_object(client: TestClient, body: str) -> None:
    answer = client.post(
        "/v1/completions", content=body.encode("latin-1"), headers={"content-type": "application/json"}
    )
    error_of(answer, 400)


def test_a_wrong_method_is_told_the_right_ones(client: TestClient) -> None:
    assert client.put("/v1/sessions").headers["allow"] == "GET, POST"
    assert client.put("/v1/sessions/x").headers["allow"] == "DELETE, GET"
    assert client.post("/").headers["allow"] == "GET"


def test_json_must_be_called_so(client: TestClient) -> None:
    error = error_of(client.post("/v1/completions", content='{"prompt": "x"}'), 400)
    assert "application/json" in error["message"]


def test_what_nobody_expected_is_told_to_the_log_alone(client: TestClient, engine: FakeEngine) -> None:
    engine.trouble = RuntimeError("the secret text")
    with log_lines() as lines:
        error = error_of(client.post("/v1/completions", json={"prompt": "another secret text"}), 500)
    assert "secret" not in error["message"] and error["type"] == "server_error"
    line = json.loads(lines[0])
    assert line["status"] == 500 and line["error"].startswith("RuntimeError at server_tools.py:")
    assert "secret" not in lines[0]


def test_trouble_with_the_disk_is_the_servers(client: TestClient, engine: FakeEngine) -> None:
    engine.trouble = UserError("Cannot write /home/me/x; mend it.")
    engine.trouble.__cause__ = OSError(28, "No space left")
    error = error_of(client.post("/v1/completions", json={"prompt": "x"}), 503)
    assert "/home" not in error["message"]


# -- keys and owners ---------------------------------------------------------------------------------------------------


@pytest.fixture
def keyed(engine: FakeEngine) -> Iterator[TestClient]:
    with client_of(engine, keys=KEYS, host="far.example") as client:
        yield client


@pytest.mark.parametrize("path", ["/v1/models", "/v1/sessions", "/v1/nothing", "/metrics"])
@pytest.mark.parametrize(
    "headers", [{}, as_("wrong"), as_(""), {"authorization": ANNA}, {"authorization": f"Basic {ANNA}"}, as_(ANNA + "x")]
)
def test_without_a_right_key_nobody_comes_in(keyed: TestClient, path: str, headers: dict[str, str]) -> None:
    answer = keyed.get(path, headers=headers)
    assert error_of(answer, 401)["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_page_and_health_are_open(keyed: TestClient) -> None:
    assert keyed.get("/").status_code == keyed.get("/health").status_code == 200
    assert keyed.get("/health").json() == {"status": "ok"}


def test_other_peoples_sessions_look_like_missing_ones(keyed: TestClient) -> None:
    anna, bert = as_(ANNA), as_(BERT)
    made = keyed.post("/v1/sessions", headers=anna).json()["id"]
    missing = "sess-" + 32 * "0"
    assert [one["id"] for one in keyed.get("/v1/sessions", headers=anna).json()["data"]] == [made]
    assert keyed.get("/v1/sessions", headers=bert).json()["data"] == []

    def tries(session: str) -> Iterator[Any]:
        at = f"/v1/sessions/{session}"
        yield keyed.get(at, headers=bert)
        yield keyed.delete(at, headers=bert)
        yield keyed.post(f"{at}/fork", headers=bert)
        yield keyed.get(f"{at}/export", headers=bert)
        yield keyed.post(f"{at}/read", headers={**bert, "content-type": "text/plain"}, content="x")
        yield keyed.post(f"{at}/read", headers={**bert, "content-type": "text/plain"}, content=b"\xff")
        yield keyed.post(f"{at}/completions", headers=bert, json={"prompt": "x"})
        yield keyed.post("/v1/completions", headers=bert, json={"prompt": "x", "session": session})
        messages = [{"role": "user", "content": "x"}]
        yield keyed.post("/v1/chat/completions", headers=bert, json={"messages": messages, "session": session})

    for others, nobodys in zip(tries(made), tries(missing), strict=True):
        assert error_of(others, 404) == error_of(nobodys, 404)
    assert keyed.get(f"/v1/sessions/{made}", headers=anna).status_code == 200


def test_owners_are_hashes_of_keys() -> None:
    anna = KEYS.caller(f"bearer  {ANNA} ")
    assert anna is not None and anna.name == "anna"
    assert len(anna.owner) == 64 and ANNA not in anna.owner
    assert Keys().caller("") == LOCAL
    assert KEYS.caller("Bearer \udcff") is None


def test_keys_from_file_or_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# people\n\nanna {ANNA}\n  bert\t{BERT}\n")
    for keys in (load_keys(file, {}), load_keys(None, {ENVIRONMENT: f"anna {ANNA}, bert {BERT}"})):
        callers = [keys.caller(f"Bearer {key}") for key in (ANNA, BERT)]
        assert [caller and caller.name for caller in callers] == ["anna", "bert"]
    assert not load_keys(None, {}) and not load_keys(None, {ENVIRONMENT: " "})
    with pytest.raises(UserError, match="leave one of them out"):
        load_keys(file, {ENVIRONMENT: f"anna {ANNA}"})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "empty"),
        ("# nothing\n", "holds no key"),
        (f"{ANNA}\n", "line 1: there must be a name and a key"),
        (f"\nanna {ANNA} x\n", "line 2: there must be"),
        ("anna short\n", "16 to 512"),
        (f"anna {ANNA}ä\n", "ASCII"),
        (f"anna {ANNA}\nanna {BERT}\n", "twice"),
        (f"anna {ANNA}\nbert {ANNA}\n", "another name"),
    ],
)
def test_files_that_hold_no_sound_keys(tmp_path: Path, text: str, match: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(UserError, match=match) as caught:
        load_keys(file, {})
    assert ANNA not in str(caught.value)


def test_hosts_without_keys() -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        check_host(host, Keys())
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"):
        check_host(host, KEYS)
        with pytest.raises(UserError, match="--keys"):
            check_host(host, Keys())


def test_pages_of_other_sites_are_kept_out(client: TestClient) -> None:
    assert error_of(client.get("/v1/sessions", headers={"host": "evil.example"}), 403)["code"] == "wrong_host"
    for origin in ("https://evil.example", "null"):
        assert error_of(client.post("/v1/sessions", headers={"origin": origin}), 403)["code"] == "wrong_origin"
    assert client.post("/v1/sessions", headers={"origin": "http://localhost"}).status_code == 201
    for host in ("127.0.0.1:8000", "[::1]:8000", "localhost:1"):
        assert client.get("/v1/sessions", headers={"host": host}).status_code == 200


# -- limits ------------------------------------------------------------------------------------------------------------


def test_a_bucket_gives_so_many_a_minute() -> None:
    now = 0.0
    bucket = Bucket(60, lambda: now)
    assert [bucket.take() for _ in range(60)] == [0.0] * 60
    assert bucket.take() == pytest.approx(1.0)
    now = 0.5
    assert bucket.take() == pytest.approx(0.5)
    now = 1.0
    assert bucket.take() == 0.0 and bucket.take() > 0
    now = 1000.0
    assert [bucket.take() > 0 for _ in range(61)] == [False] * 60 + [True]


def test_rate_is_limited_by_key(engine: FakeEngine) -> None:
    with client_of(engine, keys=KEYS, limits=Limits(rate=3)) as client:
        assert [client.get("/v1/models", headers=as_(ANNA)).status_code for _ in range(3)] == [200] * 3
        answer = client.get("/v1/models", headers=as_(ANNA))
        error_of(answer, 429)
        assert 1 <= int(answer.headers["retry-after"]) <= 20
        assert client.get("/v1/models", headers=as_(BERT)).status_code == 200
        assert client.get("/metrics", headers=as_(ANNA)).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_have_a_limit(engine: FakeEngine, chunked: bool) -> None:
    with client_of(engine, limits=Limits(body=1000)) as client:
        session = client.post("/v1/sessions").json()["id"]

        def body(size: int) -> Any:
            return (b"a " * 10 for _ in range(size // 20)) if chunked else b"a " * (size // 2)

        for path, kind in (
            (f"/v1/sessions/{session}/read", "text/plain"),
            ("/v1/sessions/import", "application/octet-stream"),
            ("/v1/completions", "application/json"),
        ):
            answer = client.post(path, content=body(2000), headers={"content-type": kind})
            assert error_of(answer, 413)["code"] == "too_large"
        answer = client.post(f"/v1/sessions/{session}/read", content=body(1000), headers={"content-type": "text/plain"})
        assert answer.json()["tokens"] == 500
        assert engine.all[session].text.count("a") == 500
        form = {"file": ("x.txt", b"a " * 1000)}
        error_of(client.post(f"/v1/sessions/{session}/read", files=form), 413)


def test_a_session_file_may_be_larger_than_a_text(engine: FakeEngine) -> None:
    with client_of(engine, limits=Limits(body=1000, file=3000)) as client:
        at, kind = "/v1/sessions/import", {"content-type": "application/octet-stream"}
        assert client.post(at, content=b"session:" + b"a " * 1000, headers=kind).status_code == 201
        answer = client.post(at, content=b"session:" + b"a " * 2000, headers=kind)
        assert "--max-body" in answer.json()["error"]["message"]
        error_of(answer, 413)


def test_a_key_has_so_many_requests_open_and_no_more(engine: FakeEngine) -> None:
    engine.pause = 0.3
    with client_of(engine, keys=KEYS, limits=Limits(open=2)) as client, ThreadPoolExecutor(2) as pool:
        ask = {"prompt": "x", "max_tokens": 4}
        answers = [pool.submit(client.post, "/v1/completions", json=ask, headers=as_(ANNA)) for _ in range(2)]
        until(lambda: engine.running == 2)
        error_of(client.get("/v1/models", headers=as_(ANNA)), 429)
        assert client.get("/v1/models", headers=as_(BERT)).status_code == 200
        assert [answer.result().status_code for answer in answers] == [200, 200]
        assert client.get("/v1/models", headers=as_(ANNA)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "["}, 403),
        ({"origin": "http://["}, 403),
        ({"content-type": "text/plain; charset*=utf-8''x; charset*0=y"}, 415),
    ],
)
def test_headers_that_are_none(engine: FakeEngine, headers: dict[str, str], status: int) -> None:
    with client_of(engine) as client:
        session = client.post("/v1/sessions").json()["id"]
        answer = client.post(
            f"/v1/sessions/{session}/read", content=b"a", headers={"content-type": "text/plain", **headers}
        )
        error_of(answer, status)


def test_a_disk_that_is_full_while_a_text_comes_in(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def nearly_full(file: Any, chunk: bytes) -> None:
        raise UserError("No more.") from OSError(28, "No space left on device")

    def no_folder(**options: Any) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    class Little:
        def __init__(self) -> None:
            self.kept = b""

        def write(self, chunk: bytes) -> int:
            self.kept += chunk[:3]
            return len(chunk[:3])

        def full(self, chunk: bytes) -> int:
            raise OSError(28, "No space left on device")

    little = Little()
    uploads._write(little, b"all of it is kept")  # type: ignore[arg-type]
    assert little.kept == b"all of it is kept"
    monkeypatch.setattr(Little, "write", Little.full)
    with pytest.raises(UserError, match="No space left") as caught:
        uploads._write(little, b"x")  # type: ignore[arg-type]
    assert isinstance(caught.value.__cause__, OSError)
    with client_of(engine) as client:
        session = client.post("/v1/sessions").json()["id"]
        at = f"/v1/sessions/{session}/read"
        with monkeypatch.context() as patch:
            patch.setattr(uploads, "_write", nearly_full)
            error_of(client.post(at, content=b"a", headers={"content-type": "text/plain"}), 503)
        with monkeypatch.context() as patch:
            patch.setattr(uploads.tempfile, "TemporaryFile", no_folder)
            error_of(client.post(at, content=b"a", headers={"content-type": "text/plain"}), 503)
        with monkeypatch.context() as patch:  # a form's file is kept by the parser first
            patch.setattr(starlette.formparsers.SpooledTemporaryFile, "write", Little.full)
            error_of(client.post(at, files={"file": ("x.txt", b"a")}), 503)
        assert engine.all[session].text == ""


def test_who_sends_too_much_is_told_so_over_a_socket(engine: FakeEngine) -> None:
    body = b"a " * 2_000_000
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with served(create_app(engine, Settings("tiny", limits=Limits(body=1000)))) as address:  # type: ignore[arg-type]
        host, port = address.removeprefix("http://").split(":")
        for _ in range(5):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(head + body)
                answer = b""
                while part := connection.recv(1 << 16):
                    answer += part
            assert b"413" in answer.splitlines()[0] and b"more than 1,000 bytes" in answer
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(head.removesuffix(b"\r\n") + b"expect: 100-continue\r\n\r\n")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413")  # and nobody asks for the body


def test_health_says_no_where_the_model_is_of_no_use(engine: FakeEngine) -> None:
    with client_of(engine) as client:
        assert client.get("/health").json() == {"status": "ok"}
        engine.ready = False
        error_of(client.get("/health"), 503)


# -- logs and metrics --------------------------------------------------------------------------------------------------


def test_a_line_a_request(engine: FakeEngine) -> None:
    with log_lines() as lines, client_of(engine, keys=KEYS) as client:
        session = client.post("/v1/sessions", headers=as_(ANNA)).json()["id"]
        read = f"/v1/sessions/{session}/read"
        client.post(read, headers={**as_(ANNA), "content-type": "text/plain"}, content="private words here")
        ask = {"prompt": "private words", "max_tokens": 4, "n": 2, "session": session}
        answer = client.post("/v1/completions", headers=as_(ANNA), json=ask)
        client.get("/private/path", headers=as_("wrong-" + ANNA))
        client.post("/v1/completions", headers=as_(BERT), json={"private": "private"})
    found = [json.loads(line) for line in lines]
    assert [(one["key"], one["route"], one["status"]) for one in found] == [
        ("anna", "/v1/sessions", 201),
        ("anna", "/v1/sessions/{session}/read", 200),
        ("anna", "/v1/completions", 200),
        (None, "-", 401),
        ("bert", "/v1/completions", 400),
    ]
    assert [(one["tokens_read"], one["tokens_written"]) for one in found[:3]] == [(0, 0), (3, 0), (4, 8)]
    assert found[2]["request"] == answer.headers["x-request-id"]
    assert all(one["ms"] >= 0 and one["time"] for one in found)
    written = "".join(lines)
    for secret in (ANNA, BERT, session, "private"):
        assert secret not in written


def test_what_is_cut_off_at_the_end_is_told_so() -> None:
    """uvicorn cancels what is not done when it has waited long enough."""
    sent: list[Any] = []

    async def cut(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/begun":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise asyncio.CancelledError

    async def send(message: Any) -> None:
        sent.append(message)

    async def ask(path: str) -> None:
        scope = {"type": "http", "method": "GET", "path": path, "headers": []}
        await RequestLog(cut, Metrics(dict))(scope, None, send)  # type: ignore[arg-type]

    with log_lines() as lines:
        asyncio.run(ask("/"))
        assert [message.get("status") for message in sent] == [503, None]
        assert json.loads(sent[1]["body"])["error"]["code"] == "stopping"
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(ask("/begun"))
    assert json.loads(lines[0])["status"] == 503


def test_metrics(client: TestClient) -> None:
    client.post("/v1/completions", json={"prompt": "a b", "max_tokens": 5})
    client.get("/v1/models/1")
    client.get("/v1/models/2")
    client.get("/nothing/1")
    client.request("BREW", "/v1/models")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    requests = 'ttt_e2e_requests_total{{method="{}",route="{}",status="{}"}}'
    assert found[requests.format("POST", "/v1/completions", 200)] == "1.0"
    assert found[requests.format("GET", "/v1/models/{model}", 404)] == "2.0"
    assert found[requests.format("-", "-", 404)] == "1.0"
    assert "BREW" not in answer.text
    assert found["ttt_e2e_tokens_written_total"] == "5.0"
    assert found["ttt_e2e_token_seconds_count"] == "4.0"
    assert found["ttt_e2e_sessions_in_memory"] == "0.0"
    assert found['ttt_e2e_request_seconds_count{route="/v1/completions"}'] == "1.0"


def test_the_engine_starts_and_stops_with_the_service(engine: FakeEngine) -> None:
    with TestClient(create_app(engine, Settings("m")), base_url="http://localhost"):  # type: ignore[arg-type]
        assert engine.started and not engine.stopped
    assert engine.stopped


# -- chats ----------------------------------------------------------------------------------------------------

TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello {{ 7 * 7 }}"}]


def test_the_plain_template() -> None:
    chat = Chat()
    assert chat.prompt(TALK, begun=False) == ["System: Be kind.\nUser: Hello {{ 7 * 7 }}\nAssistant:"]
    assert chat.prompt(TALK[1:], begun=True) == ["\nUser: Hello {{ 7 * 7 }}\nAssistant:"]
    assert chat.stop == ("\nUser:",)


def test_what_a_template_has_after_an_answer() -> None:
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    source += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    chat = Chat(ChatTemplate(source, "", ""), {"<|im_start|>": 7, "<|im_end|>": 8})
    assert chat.closing(TALK) == [8, "\n"] and Chat().closing(TALK) == []
    assert Chat(ChatTemplate("{{ messages[0].content }}", "", "")).closing(TALK) == []


# -- the command -------------------------------------------------------------------------------------------------------


def serve(*argv: str) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(argv))


def test_what_is_wrong_is_said_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    nowhere = ("--model", str(tmp_path / "missing"))
    with pytest.raises(UserError, match="--keys"):
        serve("--host", "0.0.0.0", *nowhere)
    with pytest.raises(UserError, match="holds no key"):
        (tmp_path / "keys").write_text("#")
        serve("--keys", str(tmp_path / "keys"), *nowhere)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(UserError, match=f"Port {port} of 127.0.0.1 is in use"):
            serve("--port", port, *nowhere)
    monkeypatch.setenv(ENVIRONMENT, f"anna {ANNA}")
    with pytest.raises(UserError, match="another --host"):
        serve("--host", "no.such.host.invalid", *nowhere)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"uvicorn; install it with: pip install \"ttt-e2e\[serve\]\""):
        serve()


def test_options_reach_what_they_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reached(Exception):  # noqa: N818 - no error
        pass

    given: dict[str, Any] = {}

    def engine(*_: Any, **options: Any) -> Any:
        given.update(options)
        return SimpleNamespace(file_bytes=5000)

    def app(_: Any, settings: Settings) -> None:
        given.update(settings=settings)
        raise Reached

    monkeypatch.setattr("ttt_e2e.server.engine.Engine", engine)
    monkeypatch.setattr("ttt_e2e.server.app.create_app", app)
    monkeypatch.setattr("ttt_e2e.server.logs.configure", lambda: None)
    options = "--memory 3M --max-sessions 7 --max-session-tokens 900 --max-batch 5 --dtype bfloat16 --rate 11"
    with pytest.raises(Reached):
        serve(*options.split(), "--max-body", "2K", "--port", "0", "--data", str(tmp_path / "sessions"))
    settings = given.pop("settings")
    assert given == dict(
        memory_bytes=3 << 20, max_sessions=7, max_session_tokens=900, max_batch=5, dtype=torch.bfloat16
    )
    assert settings.limits == Limits(body=2048, file=5000, rate=11) and settings.model == "ttt-e2e"


def test_the_page_runs_nothing_but_its_own(client: TestClient) -> None:
    policy = client.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [("--memory", "512M", 512 << 20), ("--memory", "2g", 2 << 30), ("--max-body", "1000", 1000), ("--port", "0", 0)],
)
def test_numbers_on_the_command_line(option: str, text: str, value: int) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert getattr(parser.parse_args([option, text]), option[2:].replace("-", "_")) == value


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--memory", "much"),
        ("--memory", "0"),
        ("--memory", "1.5G"),
        ("--port", "65536"),
        ("--rate", "0"),
        ("--rate", "x"),
    ],
)
def test_no_numbers_on_the_command_line(option: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve(option, text)
    assert text in capsys.readouterr().err
