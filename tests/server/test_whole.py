"""The service as a whole: over a real engine, as a process, and after the process was killed."""

import json
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
from helpers import small_model, with_fact
from server_helpers import TestClient, client_of, served, until

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.inference.session import Session
from ttt_e2e.model.checkpoint import save_model
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.server.app import Settings, create_app
from ttt_e2e.server.engine import Engine
from ttt_e2e.server.store import Store

TEXT = "Die Straße war naß – 雨が降った 🌧️. The rain had stopped; the street was still wet.\n" * 8
EAGER = {"content-type": "text/plain"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 280)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    return small_model(vocab_size=tokenizer.vocab_size).eval().requires_grad_(False)


@pytest.fixture
def client(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Iterator[TestClient]:
    with client_of(Engine(model, tokenizer, Store(tmp_path / "sessions"))) as client:
        yield client


def read(client: Any, text: str, **headers: str) -> dict[str, Any]:
    """A session that has read a text."""
    at = f"/v1/sessions/{client.post('/v1/sessions').json()['id']}"
    answer = client.post(f"{at}/read", content=text.encode(), headers=EAGER | headers)
    assert answer.status_code == 200, answer.text
    return client.get(at).json()


def alone(model: Transformer, tokenizer: Tokenizer, text: str) -> Session:
    session = Session(model, tokenizer)
    session.read(text)
    return session


def test_a_session_is_what_it_would_be_without_the_service(
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

    ask = {"prompt": "The", "max_tokens": 12, "temperature": 0}
    written = "".join(alone(model, tokenizer, TEXT).generate("The", max_tokens=12, temperature=0))
    for session in (made["id"], back["id"]):
        done = client.post("/v1/completions", json={**ask, "session": session}).json()
        assert done["choices"][0]["text"] == written
        assert done["usage"] == {"prompt_tokens": 1, "completion_tokens": 12, "total_tokens": 13}
    fresh = client.post("/v1/completions", json=ask).json()["choices"][0]["text"]
    assert fresh == "".join(Session(model, tokenizer).generate("The", max_tokens=12, temperature=0))

    learned = client.post(f"/v1/sessions/{made['id']}/completions", json={**ask, "learn": True}).json()
    changed = client.get(f"/v1/sessions/{made['id']}").json()
    assert changed["tokens"] > made["tokens"] and len(learned["choices"]) == 1
    assert client.get(f"/v1/sessions/{back['id']}").json() == back


def test_openais_client_over_a_real_engine(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai", reason="the client of OpenAI is not installed")
    ask: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "temperature": 0}
    with served(create_app(Engine(model, tokenizer, Store(tmp_path / "s")), Settings("tiny"))) as address:
        with httpx.Client(base_url=address) as client:
            memory = {"session": read(client, TEXT)["id"]}
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as official:
            fresh = official.completions.create(prompt="The", **ask)
            assert fresh.choices[0].text == "".join(
                Session(model, tokenizer).generate("The", max_tokens=9, temperature=0)
            )
            assert fresh.usage.completion_tokens == 9
            expected = "".join(alone(model, tokenizer, TEXT).generate("The", max_tokens=9, temperature=0))
            parts = official.completions.create(prompt="The", **ask, stream=True, extra_body=memory)
            assert "".join(part.choices[0].text for part in parts) == expected
            messages = [{"role": "user", "content": "Who?"}]
            whole = official.chat.completions.create(messages=messages, **ask, extra_body=memory)
            parts = official.chat.completions.create(messages=messages, **ask, stream=True, extra_body=memory)
            assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
            with pytest.raises(openai.NotFoundError) as caught:
                official.completions.create(prompt="The", **ask, extra_body={"session": "sess-" + 32 * "0"})
            assert caught.value.code == "session_not_found"


def test_reading_as_a_stream_tells_how_the_loss_falls(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt_e2e.server.sessions_api._EVENT_SECONDS", 0.0)
    session = client.post("/v1/sessions").json()["id"]
    headers = EAGER | {"accept": "text/event-stream"}
    answer = client.post(f"/v1/sessions/{session}/read", content=TEXT.encode(), headers=headers)
    events = [json.loads(part[6:]) for part in answer.text.split("\n\n")[:-2]]
    assert len(events) > 10
    assert [one["tokens"] for one in events] == sorted(one["tokens"] for one in events)
    assert all(0 < one["loss"] < 100 for one in events)
    assert [one["session"] is None for one in events] == [True] * (len(events) - 1) + [False]
    assert events[-1]["session"] == client.get(f"/v1/sessions/{session}").json()


def test_damaged_sessions_say_so_and_others_go_on(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = tmp_path / "sessions"
    with client_of(Engine(model, tokenizer, Store(store))) as client:
        sound, damaged, short, odd = (read(client, TEXT)["id"] for _ in range(4))
    with_fact(store / f"{odd}.session", "memory_bytes", 153.5)
    for session in (damaged, short):
        content = bytearray((store / f"{session}.session").read_bytes())
        content[-20] ^= 1
        (store / f"{session}.session").write_bytes(content if session == damaged else content[:7])
    with client_of(Engine(model, tokenizer, Store(store))) as client:
        answers = [client.post("/v1/sessions/import", content=bytes(content))]
        for session in (damaged, short):
            answers.append(client.post("/v1/completions", json={"prompt": "x", "session": session}))
            answers.append(client.get(f"/v1/sessions/{session}/export"))
        for answer in answers:
            assert answer.status_code == 400 and "/" not in answer.json()["error"]["message"]
        listed = {one["id"]: one["error"] for one in client.get("/v1/sessions").json()["data"]}
        assert listed[sound] is None and listed[short] is not None and "does not hold" in listed[odd]
        assert client.get(f"/v1/sessions/{odd}").status_code == 400
        ask = {"prompt": "x", "session": sound, "max_tokens": 2}
        assert client.post("/v1/completions", json=ask).status_code == 200
        assert client.delete(f"/v1/sessions/{damaged}").status_code == 200


def test_a_chat_in_a_session_sends_new_messages_only(client: TestClient) -> None:
    session = client.post("/v1/sessions").json()["id"]
    counts = []
    for message in ("Hello", "More"):
        ask = {"messages": [{"role": "user", "content": message}], "max_tokens": 5, "session": session, "learn": True}
        answer = client.post("/v1/chat/completions", json=ask).json()
        assert answer["choices"][0]["finish_reason"] in ("stop", "length")
        counts.append(client.get(f"/v1/sessions/{session}").json()["tokens"])
    assert 1 < counts[0] < counts[1]


def test_limits_of_the_engine_have_openais_form(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    engine = Engine(model, tokenizer, Store(tmp_path / "s"), max_sessions=1, max_session_tokens=20)
    with client_of(engine) as client:
        session = client.post("/v1/sessions").json()["id"]
        for answer in (
            client.post("/v1/sessions"),
            client.post(f"/v1/sessions/{session}/fork"),
            client.post(f"/v1/sessions/{session}/read", content=TEXT.encode(), headers=EAGER),
            client.post("/v1/completions", json={"prompt": "x", "max_tokens": 100}),
            client.post("/v1/completions", json={"prompt": "x", "max_tokens": 100, "stream": True}),
        ):
            assert answer.status_code == 400 and answer.json()["error"]["code"] == "limit_reached"


def test_a_client_that_leaves_leaves_the_engine_idle(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    engine = Engine(model, tokenizer, Store(tmp_path / "s"))
    with served(create_app(engine, Settings("tiny"))) as address, httpx.Client(base_url=address) as client:
        session = client.post("/v1/sessions").json()
        ask = {"prompt": "x", "max_tokens": 16_000, "n": 4, "stream": True, "temperature": 2, "top_p": 1}
        with client.stream("POST", "/v1/completions", json=ask) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert engine.numbers()["running"] > 0
        headers = EAGER | {"accept": "text/event-stream"}
        at = f"/v1/sessions/{session['id']}"
        with client.stream("POST", f"{at}/read", content=TEXT.encode() * 100, headers=headers) as answer:
            lines = answer.iter_lines()
            next(lines)
        until(lambda: engine.numbers()["running"] == 0)
        assert client.get(at).json() == session


@contextmanager
def process(model: Path, data: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`ttt-e2e serve` as a process of its own, and its address."""
    program = (
        "import argparse, sys; from ttt_e2e.cli import serve; parser = argparse.ArgumentParser(); "
        "command.add_arguments(parser); sys.exit(command.run(parser.parse_args()))"
    )
    options = ["--model", str(model), "--data", str(data), "--port", "0", "--threads", "1"]
    running = subprocess.Popen([sys.executable, "-c", program, *options], stderr=subprocess.PIPE, text=True)
    try:
        assert running.stderr is not None
        line = next((line for line in running.stderr if line.startswith("Serving ")), "")
        address = line.split()[3].rstrip(",")
        yield running, address
    finally:
        running.kill()
        running.wait(20)


@pytest.mark.slow
def test_what_was_acknowledged_outlives_a_kill(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    save_model(model, tmp_path / "tiny", tmp_path / "tokenizer.json")
    with process(tmp_path / "tiny", tmp_path / "data") as (running, address):
        with httpx.Client(base_url=address, timeout=60) as client:
            assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["tiny"]
            made = read(client, TEXT)
            with client.stream(
                "POST",
                f"/v1/sessions/{made['id']}/read",
                content=TEXT.encode() * 200,
                headers=EAGER | {"accept": "text/event-stream"},
            ) as answer:
                lines = answer.iter_lines()
                next(lines)
                running.send_signal(signal.SIGKILL)
                with pytest.raises(httpx.TransportError):
                    list(lines)
        running.wait(20)
    with process(tmp_path / "tiny", tmp_path / "data") as (running, address):
        with httpx.Client(base_url=address, timeout=60) as client:
            (found,) = client.get("/v1/sessions").json()["data"]
            assert found == made | {"in_memory": False}
            ask = {"prompt": "The", "max_tokens": 5, "session": made["id"]}
            assert client.post("/v1/completions", json=ask).status_code == 200
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 0
        assert running.stderr is not None
        for line in running.stderr:
            json.loads(line)
    left = {path.name for path in (tmp_path / "data").iterdir()}
    assert left == {"lock", f"{made['id']}.json", f"{made['id']}.session"}


@pytest.mark.slow
def test_a_model_that_is_of_no_use_ends_in_a_sentence(tokenizer: Tokenizer, tmp_path: Path) -> None:
    broken = small_model(vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        broken.final_norm.weight.fill_(float("nan"))
    tokenizer.save(tmp_path / "tokenizer.json")
    save_model(broken, tmp_path / "broken", tmp_path / "tokenizer.json")
    options = ["--model", str(tmp_path / "broken"), "--data", str(tmp_path / "data"), "--port", "0"]
    ended = subprocess.run([sys.executable, "-m", "ttt_e2e", "serve", *options], capture_output=True, text=True)
    assert ended.returncode in (1, 2) and "Traceback" not in ended.stderr
    assert "not fit for use" in ended.stderr.splitlines()[-1]
