"""The session endpoints: create, read, fork, export, import, delete."""

import json
import math

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from server_helpers import (
    PLAIN_TEXT,
    PLAIN_TEXT_EVENTS,
    FakeEngine,
    TestClient,
    client_at,
    connection_to,
    error_of,
    log_lines,
    parse_events,
    receive_until,
    send_post,
    served,
    until,
)

from ttt_e2e.inference.divergence import Diverged

TEXT = "Die Straße war naß. " * 30


@pytest.fixture
def session(client: TestClient) -> str:
    made = client.post("/v1/sessions")
    assert made.status_code == 201
    return made.json()["id"]


def test_life_of_a_session(client: TestClient) -> None:
    made = client.post("/v1/sessions").json()
    assert made["object"] == "session" and made["tokens"] == 1 and made["error"] is None
    path = f"/v1/sessions/{made['id']}"
    read = client.post(f"{path}/read", content=TEXT.encode(), headers=PLAIN_TEXT).json()
    assert (read["object"], read["tokens"], read["loss"]) == ("session.read", 120, 235 / 120)
    assert read["session"] == client.get(path).json()
    assert read["session"]["tokens"] == 121

    file = client.get(f"{path}/export")
    assert file.headers["content-type"] == "application/octet-stream"
    assert file.headers["content-disposition"] == f'attachment; filename="{made["id"]}.session"'
    assert int(file.headers["content-length"]) == len(file.content)
    back = client.post("/v1/sessions/import", content=file.content)
    assert back.status_code == 201 and back.json()["text_digest"] == read["session"]["text_digest"]
    fork = client.post(f"{path}/fork")
    assert fork.status_code == 201 and fork.json()["text_digest"] == read["session"]["text_digest"]

    listed = client.get("/v1/sessions").json()
    assert [one["id"] for one in listed["data"]] == [made["id"], back.json()["id"], fork.json()["id"]]
    assert client.delete(path).json() == {"id": made["id"], "object": "session.deleted", "deleted": True}
    assert [one["id"] for one in client.get("/v1/sessions").json()["data"]] == [back.json()["id"], fork.json()["id"]]
    error_of(client.delete(path), 404)


def test_read_as_a_stream(client: TestClient, session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt_e2e.server.api.sessions.EVENT_SECONDS", 0.0)
    with log_lines() as lines:
        response = client.post(f"/v1/sessions/{session}/read", content="a " * 12, headers=PLAIN_TEXT_EVENTS)
    *found, done = parse_events(response.text)
    assert done == "data: [DONE]"
    assert [one["tokens"] for one in found] == [0, 5, 10, 12]
    assert [one["recent_loss"] for one in found] == [None, 2.0, 2.0, 1.0]
    assert [one["session"] is None for one in found] == [True, True, True, False]
    assert found[-1]["session"]["id"] == session and found[-1]["loss"] == 22 / 12
    assert json.loads(lines[0])["tokens_read"] == 12


def test_read_merges_events_that_come_too_fast(
    client: TestClient, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ttt_e2e.server.api.sessions.EVENT_SECONDS", math.inf)
    response = client.post(f"/v1/sessions/{session}/read", content="a " * 12, headers=PLAIN_TEXT_EVENTS)
    *found, done = parse_events(response.text)
    assert [one["tokens"] for one in found] == [0, 12] and done == "data: [DONE]"
    assert found[-1]["recent_loss"] == pytest.approx((10 * 2.0 + 2 * 1.0) / 12)


def test_divergence_leaves_the_session_unchanged(client: TestClient, engine: FakeEngine, session: str) -> None:
    engine.failure, engine.fail_from = Diverged("Learning diverged at token 7.", 7), 1
    path = f"/v1/sessions/{session}/read"
    assert (
        error_of(client.post(path, content=TEXT, headers=PLAIN_TEXT), 422)["message"] == "Learning diverged at token 7."
    )
    response = client.post(path, content=TEXT, headers=PLAIN_TEXT_EVENTS)
    assert json.loads(response.text.split("\n\n")[-2][6:])["error"]["code"] == "diverged"
    assert "[DONE]" not in response.text
    engine.fail_from = 0
    error_of(client.post(path, content=TEXT, headers=PLAIN_TEXT_EVENTS), 422)
    assert engine.all[session].text == ""
    until(lambda: engine.running == 0)


def test_import_rejects_other_files(client: TestClient) -> None:
    for content in (b"", b"junk"):
        assert "not a session" in error_of(client.post("/v1/sessions/import", content=content), 400)["message"]
    assert client.get("/v1/sessions").json()["data"] == []


def test_number_of_sessions_is_limited(client: TestClient) -> None:
    for _ in range(100):
        assert client.post("/v1/sessions").status_code == 201
    assert "delete one" in error_of(client.post("/v1/sessions"), 400)["message"]


@pytest.mark.parametrize("session", ["x", "..", "%2e%2e%2fsecret", "sess-" + 31 * "0", "sess-%00", "%ff", "a" * 5000])
def test_invalid_ids_are_not_found(client: TestClient, session: str) -> None:
    for method, rest in (("GET", ""), ("DELETE", ""), ("POST", "/fork"), ("GET", "/export")):
        error_of(client.request(method, f"/v1/sessions/{session}{rest}"), 404)


def test_completions_of_a_session(client: TestClient, engine: FakeEngine, session: str) -> None:
    path = f"/v1/sessions/{session}/completions"
    response = client.post(path, json={"prompt": "Once", "max_tokens": 2, "learn": True})
    assert response.json()["choices"][0]["text"] == " w1ä w2ä"
    assert engine.all[session].text == "Once w1ä w2ä"
    assert client.post(path, json={"max_tokens": 2, "stream": True}).text.endswith("data: [DONE]\n\n")
    error_of(client.post(path, json={"prompt": "x", "session": session}), 400)


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_while_reading_leaves_the_session_unchanged(engine: FakeEngine, stream: bool) -> None:
    engine.hold_from = 1
    headers = PLAIN_TEXT_EVENTS if stream else PLAIN_TEXT
    with served(engine) as address, client_at(address) as client:
        session = client.post("/v1/sessions").json()["id"]
        with connection_to(address) as connection:
            send_post(connection, f"/v1/sessions/{session}/read", b"word " * 50_000, headers)
            if stream:
                receive_until(connection, b"data: ")
            until(lambda: engine.running == 1)
        until(lambda: engine.running == 0)
        assert engine.all[session].text == ""


def test_large_file_is_exported_and_imported_in_parts(engine: FakeEngine) -> None:
    text = "0123456789" * 300_000
    with served(engine) as address, client_at(address) as client:
        session = client.post("/v1/sessions").json()["id"]
        engine.all[session].text = text
        with client.stream("GET", f"/v1/sessions/{session}/export") as response:
            parts = list(response.iter_bytes())
        assert len(parts) > 1
        made = client.post("/v1/sessions/import", content=iter(parts)).json()
        assert engine.all[made["id"]].text == text
