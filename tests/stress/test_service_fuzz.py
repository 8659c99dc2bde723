"""Requests of two keys, most of them with something wrong in them: no 5xx but 503, and nothing crosses between keys."""

import json
import random
import shlex
from pathlib import Path
from typing import Any

import psutil
import pytest
from stress_helpers import SECONDS, TEXT, Figures, damage, rounds

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from server_helpers import TestClient

from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.session import Session
from ttt_e2e.server.app import create_app
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.store import Store
from ttt_e2e.server.keys import Keys
from ttt_e2e.server.settings import Settings

pytestmark = pytest.mark.stress

KEYS = {"anna": "anna-0123456789abcdef", "bert": "bert-0123456789abcdef"}
SECRETS = {"anna": "quince marmalade", "bert": "velvet trombone"}
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e308, 1 << 31, 1 << 63, 10**40, "", "x", "\ud800", "\0", "a" * 3000),
    *([], {}, [[]], [None], {"a": {}}, [""], ["x"] * 20, {"type": "text"}, [{"type": "text", "text": "hi"}], "<|bos|>"),
]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "The geese", "max_tokens": 3, "temperature": 0, "session": "SESSION", "n": 1},
    "/v1/chat/completions": {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}],
        "max_tokens": 3,
        "stream": False,
        "session": "SESSION",
        "learn": True,
    },
    "/v1/sessions/SESSION/completions": {"prompt": ["The", "A"], "max_tokens": 2, "stop": ["x"], "stream": True},
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Who?"}]}],
        "instructions": "Be brief.",
        "conversation": "SESSION",
        "max_output_tokens": 3,
        "metadata": {"a": "b"},
    },
    "/v1/responses?": {"input": "Who?", "previous_response_id": "RESPONSE", "max_output_tokens": 3, "stream": True},
    "/v1/conversations": {"items": [{"type": "message", "role": "user", "content": "Who?"}], "metadata": {"a": "b"}},
    "/v1/conversations/SESSION": {"metadata": {"c": "d"}},
    "/v1/conversations/SESSION/items": {"items": [{"role": "assistant", "content": "I."}]},
    "/v1/messages": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}],
        "system": "Be brief.",
        "max_tokens": 3,
        "stop_sequences": ["x"],
        "session": "SESSION",
        "learn": True,
    },
}
FIELDS = shlex.split(
    "model prompt messages max_tokens max_completion_tokens temperature top_p top_k min_p seed n stop stream learn "
    "user stream_options logprobs echo best_of suffix tools tool_choice response_format metadata store name logit_bias "
    "frequency_penalty presence_penalty repetition_penalty chat_template_kwargs nonsense session role content "
    "input instructions conversation previous_response_id id type text reasoning background items system "
    "stop_sequences thinking top_logprobs"
)
PATHS = shlex.split(
    "/ /health /metrics /openapi.json /v1/models /v1/models/tiny /v1/models/x /v1/sessions /v1/sessions/SESSION "
    "/v1/sessions/SESSION/fork /v1/sessions/SESSION/read /v1/sessions/SESSION/export /v1/sessions/import "
    "/v1/sessions/../x /v1/sessions/%00 /v1/sessions/sess-0 /v2 /v1/completions/ // "
    "/v1/responses/RESPONSE /v1/responses/RESPONSE/input_items /v1/conversations/SESSION "
    "/v1/conversations/SESSION/items /v1/conversations/SESSION/items?limit=0 /v1/conversations/SESSION/items/msg_0 "
    "/v1/messages /v1/embeddings"
)
METHODS = shlex.split("GET POST PUT DELETE PATCH HEAD OPTIONS BREW")


def mutate(choices: random.Random, value: Any) -> Any:
    """`value` with one place changed."""
    if isinstance(value, dict) and value and choices.random() < 0.8:
        name = choices.choice([*value, choices.choice(FIELDS)])
        kind = choices.randrange(4)
        if kind == 0:
            return {k: v for k, v in value.items() if k != name}
        return {**value, name: mutate(choices, value.get(name)) if kind == 1 else choices.choice(VALUES)}
    if isinstance(value, list) and value and choices.random() < 0.7:
        at = choices.randrange(len(value))
        return [*value[:at], mutate(choices, value[at]), *value[at + choices.randrange(2) :]]
    return choices.choice(VALUES)


class Client:
    """One key, what its sessions must be, and requests in its name."""

    def __init__(self, name: str, http: TestClient) -> None:
        self.name, self.http = name, http
        self.headers = {"authorization": f"Bearer {KEYS[name]}"}
        self.sessions: dict[str, Any] = {}

    def send(self, method: str, path: str, **more: Any) -> Any:
        more["headers"] = {**self.headers, **more.get("headers", {})}
        return self.http.request(method, path, **more)

    def refresh(self) -> None:
        found = self.send("GET", "/v1/sessions")
        assert found.status_code == 200
        self.sessions = {one["id"]: one for one in found.json()["data"]}


def make_request(choices: random.Random, client: Client, ids: list[str], exported: bytes) -> Any:
    """A request of this key to its own session or to the other's."""
    session = choices.choice([*ids, "sess-" + "0" * 32])
    kind = choices.randrange(8)
    if kind < 4:
        path, body = choices.choice(list(BODIES.items()))
        for _ in range(choices.randrange(4)):
            changed = mutate(choices, body)
            body = changed if isinstance(changed, dict) else body
        content = named(json.dumps(body), session).encode()
        if choices.random() < 0.15:
            content = damage(choices, content)
        headers = {"content-type": choice_of_type(choices)}
        return client.send("POST", named(path, session), content=content, headers=headers)
    if kind == 4:
        text = choices.choice(
            (SECRETS[client.name].encode(), TEXT.encode(), b"", b"\xff\xfe", b"a\0b", TEXT.encode()[:99])
        )
        headers = {"content-type": choices.choice(("text/plain", "text/plain; charset=utf-8", "text/html", ""))}
        return client.send("POST", f"/v1/sessions/{session}/read", content=text, headers=headers)
    if kind == 5:
        content = exported if choices.random() < 0.2 else damage(choices, exported)
        return client.send("POST", "/v1/sessions/import", content=content)
    if kind == 6:
        length = choices.choice((0, 10, 100_000))
        headers = {choices.choice(("accept", "host", "x-a", "expect", "range", "origin")): "x" * length}
        return client.send(choices.choice(METHODS), named(choices.choice(PATHS), session), headers=headers)
    return client.send(choices.choice(METHODS), named(choices.choice(PATHS), session))


def named(text: str, session: str) -> str:
    """`text` with this session in it, which may be a conversation or a response."""
    return text.replace("SESSION", session).replace("RESPONSE", f"resp_{session[5:]}")


def choice_of_type(choices: random.Random) -> str:
    types = (
        "application/json",
        "application/json",
        "application/json",
        "text/plain",
        "application/json; charset=x",
        "",
    )
    return choices.choice(types)


def test_requests_of_two_keys(shipped: Path, tmp_path: Path, figures: Figures) -> None:
    model, tokenizer = load_model(shipped)
    engine = Engine(Session(model, tokenizer), Store(tmp_path / "sessions"), max_sessions=1000)
    settings = Settings("tiny", keys=Keys(KEYS), requests_per_minute=10**9, body_bytes=1 << 20)
    process, memory = psutil.Process(), 0
    with TestClient(create_app(engine, settings), raise_server_exceptions=False) as http:
        clients = [Client(name, http) for name in KEYS]
        for client in clients:
            for _ in range(3):
                made = client.send("POST", "/v1/sessions")
                assert made.status_code == 201
                id = made.json()["id"]
            text = f"{SECRETS[client.name]} {TEXT}".encode()
            assert client.send("POST", f"/v1/sessions/{id}/read", content=text, headers={"content-type": "text/plain"})
            exported = client.send("GET", f"/v1/sessions/{id}/export").content
            client.refresh()
        for number, (name, choices) in enumerate(rounds()):
            client, other = clients if number % 2 else clients[::-1]
            ids = [*list(client.sessions)[-5:], *list(other.sessions)[-2:]]
            response = make_request(choices, client, ids, exported)
            where = f"{name}: {client.name} {response.request.method} {response.request.url} {response.status_code}"
            assert response.status_code < 500 or response.status_code == 503, f"{where} {response.text[:500]}"
            figures.add("requests")
            figures.add("refused", response.status_code >= 400)
            if response.status_code >= 400 and response.request.method != "HEAD":
                keys = {"type", "error"} if response.request.url.path.startswith("/v1/messages") else {"error"}
                assert set(response.json()) == keys, f"{where} {response.text[:500]}"
            body = response.content
            assert b"Traceback" not in body and str(tmp_path).encode() not in body, where
            for secret in (SECRETS[other.name].encode(), KEYS[other.name].encode()):
                assert secret not in body, f"{where}: {other.name}'s secret"
            before = dict(other.sessions)
            client.refresh()
            if number % 10 == 0:
                other.refresh()
                states = {id: {**one, "in_memory": True} for id, one in other.sessions.items()}
                assert states == {id: {**one, "in_memory": True} for id, one in before.items()}, where
            for id in list(client.sessions)[8:]:
                client.send("DELETE", f"/v1/sessions/{id}")
                del client.sessions[id]
            if number == 500:
                memory = process.memory_info().rss
        growth = process.memory_info().rss - memory
        if memory:
            figures.add("MB of growth", growth >> 20)
            assert growth < (50 << 20) * max(1, SECONDS / 600), f"memory grew by {growth >> 20} MB"
