"""The request log and the metrics: complete, and without anybody's text, key or session id."""

import asyncio
import json
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from server_helpers import PLAIN_TEXT, FakeEngine, TestClient, client_of, log_lines

from ttt_e2e.server.keys import Keys
from ttt_e2e.server.middleware.logs import RequestLogMiddleware
from ttt_e2e.server.middleware.metrics import ServiceMetrics

ANNA, BERT = "a-long-key-for-anna-1", "another-key-for-bert"


def test_log_has_a_line_per_request_and_no_secrets(engine: FakeEngine) -> None:
    anna, bert, wrong = ({"authorization": f"Bearer {key}"} for key in (ANNA, BERT, "wrong-" + ANNA))
    with log_lines() as lines, client_of(engine, keys=Keys({"anna": ANNA, "bert": BERT})) as client:
        session = client.post("/v1/sessions", headers=anna).json()["id"]
        client.post(f"/v1/sessions/{session}/read", headers={**anna, **PLAIN_TEXT}, content="private words here")
        body = {"prompt": "private words", "max_tokens": 4, "n": 2, "session": session}
        response = client.post("/v1/completions", headers=anna, json=body)
        client.get("/private/path", headers=wrong)
        client.post("/v1/completions", headers=bert, json={"stop": ["private"] * 9})
    found = [json.loads(line) for line in lines]
    assert [(one["key"], one["route"], one["status"]) for one in found] == [
        ("anna", "/v1/sessions", 201),
        ("anna", "/v1/sessions/{session}/read", 200),
        ("anna", "/v1/completions", 200),
        (None, "-", 401),
        ("bert", "/v1/completions", 400),
    ]
    assert [(one["tokens_read"], one["tokens_written"]) for one in found[:3]] == [(0, 0), (3, 0), (4, 8)]
    assert found[2]["request"] == response.headers["x-request-id"]
    assert all(one["ms"] >= 0 and one["time"] for one in found)
    log = "".join(lines)
    for secret in (ANNA, BERT, session, "private"):
        assert secret not in log


def test_request_that_is_cut_off_at_shutdown_gets_a_response() -> None:
    """uvicorn cancels requests that take too long after it was told to stop."""
    sent: list[Any] = []

    async def cut_off(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/begun":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise asyncio.CancelledError

    async def send(message: Any) -> None:
        sent.append(message)

    async def get(path: str) -> None:
        scope = {"type": "http", "method": "GET", "path": path, "headers": []}
        await RequestLogMiddleware(cut_off, ServiceMetrics(dict))(scope, None, send)  # type: ignore[arg-type]

    with log_lines() as lines:
        asyncio.run(get("/"))
        assert [message.get("status") for message in sent] == [503, None]
        assert json.loads(sent[1]["body"])["error"]["code"] == "stopping"
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(get("/begun"))
    assert json.loads(lines[0])["status"] == 503


def test_metrics(client: TestClient) -> None:
    client.post("/v1/completions", json={"prompt": "a b", "max_tokens": 5})
    client.get("/v1/models/1")
    client.get("/v1/models/2")
    client.get("/nothing/1")
    client.request("BREW", "/v1/models")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    found = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    requests = 'ttt_e2e_requests_total{{method="{}",route="{}",status="{}"}}'
    assert found[requests.format("POST", "/v1/completions", 200)] == "1.0"
    assert found[requests.format("GET", "/v1/models/{model}", 404)] == "2.0"
    assert found[requests.format("-", "-", 404)] == "1.0"
    assert "BREW" not in response.text
    assert found["ttt_e2e_tokens_written_total"] == "5.0"
    assert found["ttt_e2e_token_seconds_count"] == "4.0"
    assert found["ttt_e2e_sessions_in_memory"] == "0.0"
    assert found['ttt_e2e_request_seconds_count{route="/v1/completions"}'] == "1.0"
