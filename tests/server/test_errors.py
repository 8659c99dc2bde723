"""Error responses: OpenAI's form, the right status, and no secrets."""

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from server_helpers import FakeEngine, TestClient, error_of, log_lines, served

from ttt_e2e.errors import UserError
from ttt_e2e.server.engine.records import StoppingError


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
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/messages", "/v1/messages"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/api/v1/responses", "/v1/responses"),
        ("/nothing", "/openapi.json"),
    ],
)
def test_the_path_that_was_meant_is_named(client: TestClient, path: str, meant: str) -> None:
    """A client's base URL with /v1 where it has none, or without it, is the commonest mistake in setting it up."""
    message = error_of(client.post(path, json={}), 404)["message"]
    assert f" {meant}" in message and ("base URL" in message) == meant.startswith("/v1")


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
def test_body_that_is_not_a_json_object_is_refused(client: TestClient, body: str) -> None:
    headers = {"content-type": "application/json"}
    error_of(client.post("/v1/completions", content=body.encode("latin-1"), headers=headers), 400)


def test_json_without_its_content_type_is_refused(client: TestClient) -> None:
    error = error_of(client.post("/v1/completions", content='{"prompt": "x"}'), 400)
    assert "application/json" in error["message"]


def test_wrong_method_gets_the_allowed_ones(client: TestClient) -> None:
    assert client.put("/v1/sessions").headers["allow"] == "GET, POST"
    assert client.put("/v1/sessions/x").headers["allow"] == "DELETE, GET"
    assert client.post("/").headers["allow"] == "GET, HEAD"


def test_unexpected_error_is_only_logged_and_without_its_message(client: TestClient, engine: FakeEngine) -> None:
    engine.failure = RuntimeError("the secret text")
    with log_lines() as lines:
        error = error_of(client.post("/v1/completions", json={"prompt": "another secret text"}), 500)
    assert "secret" not in error["message"] and error["type"] == "server_error"
    line = json.loads(lines[0])
    assert line["status"] == 500 and line["error"].startswith("RuntimeError at server_helpers.py:")
    assert "secret" not in lines[0]


def test_disk_error_is_the_servers_and_names_no_path(client: TestClient, engine: FakeEngine) -> None:
    engine.failure = UserError("Cannot write /home/me/x; mend it.")
    engine.failure.__cause__ = OSError(28, "No space left")
    error = error_of(client.post("/v1/completions", json={"prompt": "x"}), 503)
    assert "/home" not in error["message"]


def test_health_fails_when_the_engine_is_not_ready(client: TestClient, engine: FakeEngine) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    engine.ready = False
    error_of(client.get("/health"), 503)


def openai_answer(address: str) -> Any:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        return client.completions.create(model="tiny", prompt="one two", max_tokens=3).choices[0].text


def anthropic_answer(address: str) -> Any:
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=address, api_key="none") as client:
        messages = [{"role": "user", "content": "one two"}]
        return client.messages.create(model="tiny", messages=messages, max_tokens=3).content[0].text


@pytest.mark.parametrize("answer", [openai_answer, anthropic_answer])
def test_official_clients_wait_for_a_service_that_is_started_again(
    answer: Any, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    def restart(seconds: float) -> None:
        waited.append(seconds)
        engine.failure = None

    module = answer.__name__.removesuffix("_answer")
    engine.failure = StoppingError()
    pytest.importorskip(module)
    monkeypatch.setattr(f"{module}._base_client.time", SimpleNamespace(**vars(time) | {"sleep": restart}))
    with served(engine) as address:
        assert answer(address)
    assert waited == [10]


def test_a_disk_that_fails_is_not_to_be_tried_again_soon(client: TestClient, engine: FakeEngine) -> None:
    engine.failure = UserError("Cannot write x; mend it.")
    engine.failure.__cause__ = OSError(28, "No space left")
    assert "retry-after" not in client.post("/v1/completions", json={"prompt": "x"}).headers
