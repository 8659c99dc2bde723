"""Error responses: OpenAI's form, the right status, and no secrets."""

import json

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from server_helpers import FakeEngine, TestClient, error_of, log_lines

from ttt_e2e.errors import UserError


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
def test_body_that_is_not_a_json_object_is_refused(client: TestClient, body: str) -> None:
    headers = {"content-type": "application/json"}
    error_of(client.post("/v1/completions", content=body.encode("latin-1"), headers=headers), 400)


def test_json_without_its_content_type_is_refused(client: TestClient) -> None:
    error = error_of(client.post("/v1/completions", content='{"prompt": "x"}'), 400)
    assert "application/json" in error["message"]


def test_wrong_method_gets_the_allowed_ones(client: TestClient) -> None:
    assert client.put("/v1/sessions").headers["allow"] == "GET, POST"
    assert client.put("/v1/sessions/x").headers["allow"] == "DELETE, GET"
    assert client.post("/").headers["allow"] == "GET"


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
