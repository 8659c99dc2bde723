"""The whole service: over a real engine, as a process, and after the process was killed."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra serve is not installed")

import httpx
from engine_helpers import file_of
from helpers import small_model, start_command, with_fact
from server_helpers import (
    PATIENCE,
    PLAIN_TEXT,
    PLAIN_TEXT_EVENTS,
    TestClient,
    client_at,
    client_of,
    error_of,
    parse_events,
    served,
    until,
)

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.inference.session import Session
from ttt_e2e.model.checkpoint import save_model
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.server.engine.database import DATABASE
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.store import Store
from ttt_e2e.server.keys import KEYS_VARIABLE

TEXT = "Die Straße war naß – 雨が降った 🌧️. The rain had stopped; the street was still wet.\n" * 8
LONG_TEXT = TEXT.encode() * 1000  # takes minutes to read
SERVE = (sys.executable, "-m", "ttt_e2e", "serve")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != KEYS_VARIABLE}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 280)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    return small_model(vocab_size=tokenizer.vocab_size).eval().requires_grad_(False)


@pytest.fixture
def client(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Iterator[TestClient]:
    with client_of(Engine(Session(model, tokenizer), Store(tmp_path / "sessions"))) as client:
        yield client


def read(client: Any, text: str) -> dict[str, Any]:
    """A session that has read a text."""
    path = f"/v1/sessions/{client.post('/v1/sessions').json()['id']}"
    response = client.post(f"{path}/read", content=text.encode(), headers=PLAIN_TEXT)
    assert response.status_code == 200, response.text
    return client.get(path).json()


def alone(model: Transformer, tokenizer: Tokenizer, text: str) -> Session:
    session = Session(model, tokenizer)
    session.read(text)
    return session


def test_session_equals_one_without_the_service(
    client: TestClient, model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    made = read(client, TEXT)
    expected = alone(model, tokenizer, TEXT).info()
    assert (made["tokens"], made["text_digest"]) == (expected.tokens, expected.text_digest)
    file = tmp_path / "x.session"
    file.write_bytes(client.get(f"/v1/sessions/{made['id']}/export").content)
    assert Session.load(file, model, tokenizer).info().text_digest == expected.text_digest
    back = client.post("/v1/sessions/import", content=file.read_bytes()).json()
    assert back["id"] != made["id"] and back["text_digest"] == expected.text_digest

    body = {"prompt": "The", "max_tokens": 12, "temperature": 0}
    written = "".join(alone(model, tokenizer, TEXT).generate("The", max_tokens=12, temperature=0))
    for session in (made["id"], back["id"]):
        done = client.post("/v1/completions", json={**body, "session": session}).json()
        assert done["choices"][0]["text"] == written
        assert done["usage"] == {"prompt_tokens": 1, "completion_tokens": 12, "total_tokens": 13}
    fresh = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert fresh == "".join(Session(model, tokenizer).generate("The", max_tokens=12, temperature=0))

    learned = client.post(f"/v1/sessions/{made['id']}/completions", json={**body, "learn": True}).json()
    changed = client.get(f"/v1/sessions/{made['id']}").json()
    assert changed["tokens"] > made["tokens"] and len(learned["choices"]) == 1
    assert client.get(f"/v1/sessions/{back['id']}").json() == back


def test_official_client_over_a_real_engine(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "temperature": 0}
    with served(Engine(Session(model, tokenizer), Store(tmp_path / "s"))) as address:
        with client_at(address) as client:
            memory = {"session": read(client, TEXT)["id"]}
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as official:
            fresh = official.completions.create(prompt="The", **body)
            assert fresh.choices[0].text == "".join(
                Session(model, tokenizer).generate("The", max_tokens=9, temperature=0)
            )
            assert fresh.usage.completion_tokens == 9
            expected = "".join(alone(model, tokenizer, TEXT).generate("The", max_tokens=9, temperature=0))
            parts = official.completions.create(prompt="The", **body, stream=True, extra_body=memory)
            assert "".join(part.choices[0].text for part in parts) == expected
            messages = [{"role": "user", "content": "Who?"}]
            whole = official.chat.completions.create(messages=messages, **body, extra_body=memory)
            parts = official.chat.completions.create(messages=messages, **body, stream=True, extra_body=memory)
            assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
            with pytest.raises(openai.NotFoundError) as caught:
                official.completions.create(prompt="The", **body, extra_body={"session": "sess-" + 32 * "0"})
            assert caught.value.code == "session_not_found"


def test_progress_events_have_increasing_tokens(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt_e2e.server.api.sessions.EVENT_SECONDS", 0.0)
    session = client.post("/v1/sessions").json()["id"]
    response = client.post(f"/v1/sessions/{session}/read", content=TEXT.encode(), headers=PLAIN_TEXT_EVENTS)
    *events, done = parse_events(response.text)
    assert len(events) > 10 and done == "data: [DONE]"
    assert [one["tokens"] for one in events] == sorted(one["tokens"] for one in events)
    assert all(0 < one["loss"] < 100 for one in events)
    assert [one["session"] is None for one in events] == [True] * (len(events) - 1) + [False]
    assert events[-1]["session"] == client.get(f"/v1/sessions/{session}").json()


def test_damaged_sessions_have_an_error_and_others_work(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    store = tmp_path / "sessions"
    with client_of(Engine(Session(model, tokenizer), Store(store))) as client:
        sound, damaged, short, odd = (read(client, TEXT)["id"] for _ in range(4))
    with_fact(file_of(store, odd), "memory_bytes", 153.5)
    for session in (damaged, short):
        content = bytearray(file_of(store, session).read_bytes())
        content[-20] ^= 1
        file_of(store, session).write_bytes(content if session == damaged else content[:7])
    with client_of(Engine(Session(model, tokenizer), Store(store))) as client:
        assert "/" not in error_of(client.post("/v1/sessions/import", content=bytes(content)), 400)["message"]
        for session in (damaged, short, odd):
            for response in (
                client.post("/v1/completions", json={"prompt": "x", "session": session}),
                client.get(f"/v1/sessions/{session}/export"),
                client.get(f"/v1/sessions/{session}"),
                client.post(f"/v1/sessions/{session}/read", content=TEXT.encode(), headers=PLAIN_TEXT),
            ):
                error = error_of(response, 500)
                assert error["code"] == "session_damaged" and "/" not in error["message"]
        listed = {one["id"]: one["error"] for one in client.get("/v1/sessions").json()["data"]}
        assert listed.pop(sound) is None and set(listed) == {damaged, short, odd} and all(listed.values())
        body = {"prompt": "x", "session": sound, "max_tokens": 2}
        assert client.post("/v1/completions", json=body).status_code == 200
        assert client.delete(f"/v1/sessions/{damaged}").status_code == 200


def test_chat_in_a_session_continues_with_new_messages(client: TestClient) -> None:
    session = client.post("/v1/sessions").json()["id"]
    counts = []
    for message in ("Hello", "More"):
        body = {"messages": [{"role": "user", "content": message}], "max_tokens": 5, "session": session, "learn": True}
        response = client.post("/v1/chat/completions", json=body).json()
        assert response["choices"][0]["finish_reason"] in ("stop", "length")
        counts.append(client.get(f"/v1/sessions/{session}").json()["tokens"])
    assert 1 < counts[0] < counts[1]


def test_engine_limits_have_openais_form(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    engine = Engine(Session(model, tokenizer), Store(tmp_path / "s"), max_sessions=1, max_session_tokens=20)
    with client_of(engine) as client:
        session = client.post("/v1/sessions").json()["id"]
        for response in (
            client.post("/v1/sessions"),
            client.post(f"/v1/sessions/{session}/fork"),
            client.post(f"/v1/sessions/{session}/read", content=TEXT.encode(), headers=PLAIN_TEXT),
            client.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 100}),
            client.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 100, "stream": True}),
            client.post(f"/v1/sessions/{session}/completions", json={"prompt": "x", "max_tokens": 100, "learn": True}),
        ):
            assert response.status_code == 400 and response.json()["error"]["code"] == "limit_reached"


def test_an_answer_that_is_not_kept_ends_at_the_limit_of_sessions(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some clients always request as many tokens as any model may write."""
    monkeypatch.setattr(tokenizer, "end_ids", frozenset())  # no generated text ends by itself
    engine = Engine(Session(model, tokenizer), Store(tmp_path / "s"), max_session_tokens=20)
    with client_of(engine) as client:
        session = client.post("/v1/sessions").json()["id"]
        for path in ("/v1/completions", f"/v1/sessions/{session}/completions"):
            answer = client.post(path, json={"prompt": "x", "max_tokens": 64_000}).json()
            assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["total_tokens"] == 20


def test_disconnect_leaves_the_engine_idle(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "end_ids", frozenset())  # no generated text ends by itself
    engine = Engine(Session(model, tokenizer), Store(tmp_path / "s"))
    with served(engine) as address, client_at(address) as client:
        session = client.post("/v1/sessions").json()
        path = f"/v1/sessions/{session['id']}"
        body = {"prompt": ["x"] * 4, "max_tokens": 16_000, "n": 8, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()  # kept: without it, httpx would close the connection
            assert next(lines).startswith('data: {"id"')
            assert engine.stats()["running"] > 0
        with client.stream("POST", f"{path}/read", content=LONG_TEXT, headers=PLAIN_TEXT_EVENTS) as response:
            next(response.iter_lines())
        until(lambda: engine.stats()["running"] == 0)
        assert client.get(path).json() == session


@contextmanager
def process(model: Path, data: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`ttt-e2e serve` as a process of its own, and its address."""
    options = ["--model", str(model), "--data", str(data), "--port", "0", "--threads", "1"]
    running = subprocess.Popen([*SERVE, *options], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        assert running.stderr is not None
        line = next((line for line in running.stderr if line.startswith("Serving ")), "")
        address = line.split()[3].rstrip(",")
        yield running, address
    finally:
        running.kill()
        running.wait(PATIENCE)


@pytest.mark.slow
def test_kill_loses_nothing_that_was_acknowledged(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    save_model(model, tmp_path / "tiny", tmp_path / "tokenizer.json")
    with process(tmp_path / "tiny", tmp_path / "data") as (running, address):
        with client_at(address) as client:
            assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["tiny"]
            made = read(client, TEXT)
            path = f"/v1/sessions/{made['id']}/read"
            with client.stream("POST", path, content=LONG_TEXT, headers=PLAIN_TEXT_EVENTS) as response:
                lines = response.iter_lines()
                next(lines)
                running.send_signal(signal.SIGKILL)
                with pytest.raises(httpx.TransportError):
                    list(lines)
        running.wait(PATIENCE)
    with process(tmp_path / "tiny", tmp_path / "data") as (running, address):
        with client_at(address) as client:
            (found,) = client.get("/v1/sessions").json()["data"]
            assert found == made | {"in_memory": False}
            body = {"prompt": "The", "max_tokens": 5, "session": made["id"]}
            assert client.post("/v1/completions", json=body).status_code == 200
        running.send_signal(signal.SIGTERM)
        assert running.wait(PATIENCE) == 0
        assert running.stderr is not None
        for line in running.stderr:
            json.loads(line)
    left = {path.name for path in (tmp_path / "data").iterdir()}
    assert left == {DATABASE, f"{DATABASE}-journal", file_of(tmp_path / "data", made["id"]).name}


@pytest.mark.slow
def test_service_whose_folder_is_removed_stops(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    save_model(model, tmp_path / "tiny", tmp_path / "tokenizer.json")
    data = tmp_path / "data"
    with process(tmp_path / "tiny", data) as (running, address), client_at(address) as client:
        damaged, made = read(client, TEXT), read(client, TEXT)
        file = file_of(data, damaged["id"])
        file.write_bytes(b"x")
        path = f"/v1/sessions/{damaged['id']}/read"
        for _ in range(2):
            error = error_of(client.post(path, content=TEXT.encode(), headers=PLAIN_TEXT), 500)
            assert str(tmp_path) not in error["message"]
        shutil.rmtree(data)
        path = f"/v1/sessions/{made['id']}/read"
        error = error_of(client.post(path, content=TEXT.encode(), headers=PLAIN_TEXT), 503)
        assert str(tmp_path) not in error["message"]
        assert running.wait(PATIENCE) == 1
        assert running.stderr is not None
        *logged, sentence = running.stderr.read().splitlines()
    assert not data.exists() and "put the folder back and start it again" in sentence and str(data) in sentence
    messages = [json.loads(line).get("message", "") for line in logged]
    assert [str(file) in message for message in messages].count(True) == 1
    assert sum(str(data) in message for message in messages) == 2


@pytest.mark.slow
def test_model_that_is_unfit_for_use_ends_in_a_sentence(tokenizer: Tokenizer, tmp_path: Path) -> None:
    broken = small_model(vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        broken.final_norm.weight.fill_(float("nan"))
    tokenizer.save(tmp_path / "tokenizer.json")
    save_model(broken, tmp_path / "broken", tmp_path / "tokenizer.json")
    options = ["--model", str(tmp_path / "broken"), "--data", str(tmp_path / "data"), "--port", "0"]
    with (tmp_path / "errors").open("w+") as errors, Path(os.devnull).open("r+") as null:
        without_keys = functools.partial(os.environ.pop, KEYS_VARIABLE, None)
        child = start_command(["serve", *options], null.fileno(), null.fileno(), errors.fileno(), without_keys)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (1, 2)
        printed = (tmp_path / "errors").read_text()
    assert "Traceback" not in printed and "not fit for use" in printed.splitlines()[-1]
