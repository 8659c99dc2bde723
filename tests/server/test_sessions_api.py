"""The addresses of sessions: make, read, fork, export, import, delete."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

import httpx
from server_helpers import FakeEngine, TestClient, client_of, log_lines, served, until

from ttt_e2e.inference.session import Diverged
from ttt_e2e.server.app import Settings, create_app

EAGER = {"content-type": "text/plain"}
EVENTS = {**EAGER, "accept": "text/event-stream"}
TEXT = "Die Straße war naß. " * 30


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with client_of(engine) as client:
        yield client
    assert list(tmp_path.iterdir()) == []  # nothing temporary is left


@pytest.fixture
def session(client: TestClient) -> str:
    made = client.post("/v1/sessions")
    assert made.status_code == 201
    return made.json()["id"]


def error_of(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


def test_a_session_from_beginning_to_end(client: TestClient) -> None:
    made = client.post("/v1/sessions").json()
    assert made["object"] == "session" and made["tokens"] == 1 and made["error"] is None
    at = f"/v1/sessions/{made['id']}"
    read = client.post(f"{at}/read", content=TEXT.encode(), headers=EAGER).json()
    assert (read["object"], read["tokens"], read["loss"]) == ("session.read", 120, 235 / 120)
    assert read["session"] == client.get(at).json()
    assert read["session"]["tokens"] == 121

    file = client.get(f"{at}/export")
    assert file.headers["content-type"] == "application/octet-stream"
    assert file.headers["content-disposition"] == f'attachment; filename="{made["id"]}.session"'
    assert int(file.headers["content-length"]) == len(file.content)
    back = client.post("/v1/sessions/import", content=file.content)
    assert back.status_code == 201 and back.json()["text_digest"] == read["session"]["text_digest"]
    fork = client.post(f"{at}/fork")
    assert fork.status_code == 201 and fork.json()["text_digest"] == read["session"]["text_digest"]

    listed = client.get("/v1/sessions").json()
    assert [one["id"] for one in listed["data"]] == [made["id"], back.json()["id"], fork.json()["id"]]
    assert client.delete(at).json() == {"id": made["id"], "object": "session.deleted", "deleted": True}
    assert [one["id"] for one in client.get("/v1/sessions").json()["data"]] == [back.json()["id"], fork.json()["id"]]
    error_of(client.delete(at), 404)


def test_a_text_as_a_file_of_a_form(client: TestClient, engine: FakeEngine, session: str) -> None:
    at = f"/v1/sessions/{session}/read"
    assert client.post(at, files={"file": ("x.bin", TEXT.encode())}).json()["tokens"] == 120
    large = ("word " * 500_000).encode()  # beyond what a form keeps in memory
    assert client.post(at, files={"other": large}).json()["tokens"] == 500_000
    for form in (
        dict(files={"a": b"x", "b": b"y"}),
        dict(files={"a": b"x"}, data={"b": "y"}),
        dict(content=b"", headers={"content-type": "multipart/form-data"}),
        dict(content=b"junk", headers={"content-type": "multipart/form-data; boundary=x"}),
        dict(content=b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nhi\r\n--x--\r\n')
        | dict(headers={"content-type": "multipart/form-data; boundary=x"}),
        dict(content=b'--x\r\nContent-Disposition: form-data; name="\xff"; filename="b"\r\n\r\nhi\r\n--x--\r\n')
        | dict(headers={"content-type": "multipart/form-data; boundary=x; charset=undefined"}),
    ):
        assert "one file" in error_of(client.post(at, **form), 400)
    assert len(engine.all[session].text.split()) >= 500_000 and "junk" not in engine.all[session].text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "The text is empty"),
        (b"\xff\xfehello", "The text is not valid UTF-8 at byte 0"),
        (b"good " * 300_000 + b"\xc3", "The text is not valid UTF-8 at byte 1500000"),
        (b"good\x00bad", "The text looks binary: byte 4 is zero"),
        (b"half \xed\xa0\x80 pair", "not valid UTF-8 at byte 5"),
    ],
)
@pytest.mark.parametrize("form", [False, True])
def test_texts_that_are_none_are_refused_whole(
    client: TestClient, engine: FakeEngine, session: str, content: bytes, says: str, form: bool
) -> None:
    at = f"/v1/sessions/{session}/read"
    sent = dict(files={"file": content}) if form else dict(content=content, headers=EAGER)
    assert says in error_of(client.post(at, **sent), 400)
    assert engine.all[session].text == ""


@pytest.mark.parametrize(
    "kind",
    [
        *("", "application/json", "application/x-www-form-urlencoded", "text/html", "text/plain; charset=latin-1"),
        *("text", "garbage", "multipart/form-data/x"),  # no types at all
    ],
)
def test_other_types_are_refused(client: TestClient, session: str, kind: str) -> None:
    answer = client.post(f"/v1/sessions/{session}/read", content=b"x", headers={"content-type": kind} if kind else {})
    error_of(answer, 415)


def test_reading_as_a_stream(client: TestClient, session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt_e2e.server.sessions_api._EVENT_SECONDS", 0.0)
    with log_lines() as lines:
        answer = client.post(f"/v1/sessions/{session}/read", content="a " * 12, headers=EVENTS)
    *events, done = answer.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    found = [json.loads(event.removeprefix("data: ")) for event in events]
    assert [one["tokens"] for one in found] == [0, 5, 10, 12]
    assert [one["recent_loss"] for one in found] == [None, 2.0, 2.0, 1.0]
    assert [one["session"] is None for one in found] == [True, True, True, False]
    assert found[-1]["session"]["id"] == session and found[-1]["loss"] == 22 / 12
    assert json.loads(lines[0])["tokens_read"] == 12


def test_events_of_a_reading_are_put_together(
    client: TestClient, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ttt_e2e.server.sessions_api._EVENT_SECONDS", 1000.0)
    answer = client.post(f"/v1/sessions/{session}/read", content="a " * 12, headers=EVENTS)
    found = [json.loads(event[6:]) for event in answer.text.split("\n\n")[:-2]]
    assert [one["tokens"] for one in found] == [0, 12]
    assert found[-1]["recent_loss"] == pytest.approx((10 * 2.0 + 2 * 1.0) / 12)


def test_a_reading_that_diverges(client: TestClient, engine: FakeEngine, session: str) -> None:
    engine.trouble, engine.sound = Diverged("Learning diverged at token 7.", 7), 1
    at = f"/v1/sessions/{session}/read"
    assert error_of(client.post(at, content=TEXT, headers=EAGER), 422) == "Learning diverged at token 7."
    answer = client.post(at, content=TEXT, headers=EVENTS)
    assert json.loads(answer.text.split("\n\n")[-2][6:])["error"]["code"] == "diverged"
    assert "[DONE]" not in answer.text
    engine.sound = 0
    error_of(client.post(at, content=TEXT, headers=EVENTS), 422)
    assert engine.all[session].text == ""
    until(lambda: engine.running == 0)


def test_files_that_are_no_sessions(client: TestClient) -> None:
    for content in (b"", b"junk"):
        assert "no session" in error_of(client.post("/v1/sessions/import", content=content), 400)
    assert client.get("/v1/sessions").json()["data"] == []


def test_too_many_sessions(client: TestClient) -> None:
    for _ in range(100):
        assert client.post("/v1/sessions").status_code == 201
    assert "delete one" in error_of(client.post("/v1/sessions"), 400)


@pytest.mark.parametrize("session", ["x", "..", "%2e%2e%2fsecret", "sess-" + 31 * "0", "sess-%00", "%ff", "a" * 5000])
def test_ids_that_are_none(client: TestClient, session: str) -> None:
    for method, rest in (("GET", ""), ("DELETE", ""), ("POST", "/fork"), ("GET", "/export")):
        error_of(client.request(method, f"/v1/sessions/{session}{rest}"), 404)


def test_completions_of_a_session(client: TestClient, engine: FakeEngine, session: str) -> None:
    at = f"/v1/sessions/{session}/completions"
    answer = client.post(at, json={"prompt": "Once", "max_tokens": 2, "learn": True})
    assert answer.json()["choices"][0]["text"] == " w1ä w2ä"
    assert engine.all[session].text == "Once w1ä w2ä"
    assert client.post(at, json={"max_tokens": 2, "stream": True}).text.endswith("data: [DONE]\n\n")
    error_of(client.post(at, json={"prompt": "x", "session": session}), 400)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_in_a_reading_leaves_nothing(stream: bool) -> None:
    engine = FakeEngine(pause=0.01)
    app = create_app(engine, Settings("tiny"))  # type: ignore[arg-type]
    with served(app) as address, httpx.Client(base_url=address, timeout=20) as client:
        session = client.post("/v1/sessions").json()["id"]
        at, long = f"/v1/sessions/{session}/read", "word " * 50_000
        if stream:
            with client.stream("POST", at, content=long, headers=EVENTS) as answer:
                parts = answer.iter_lines()
                next(parts)
                assert engine.running == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(at, content=long, headers=EAGER, timeout=0.5)
            assert engine.most_running == 1
        until(lambda: engine.running == 0)
        assert engine.all[session].text == ""


def test_a_large_file_goes_out_and_comes_in_by_parts(engine: FakeEngine) -> None:
    text = "0123456789" * 300_000
    with served(create_app(engine, Settings("tiny"))) as address, httpx.Client(base_url=address) as client:  # type: ignore[arg-type]
        session = client.post("/v1/sessions").json()["id"]
        engine.all[session].text = text
        with client.stream("GET", f"/v1/sessions/{session}/export") as answer:
            parts = list(answer.iter_bytes())
        assert len(parts) > 1
        made = client.post("/v1/sessions/import", content=iter(parts)).json()
        assert engine.all[made["id"]].text == text
