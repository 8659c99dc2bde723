"""OpenAI's API: every field, streams, the official client, and clients that disconnect."""

import asyncio
import itertools
import json
import math
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from server_helpers import (
    FakeEngine,
    TestClient,
    client_at,
    client_of,
    connection_to,
    log_lines,
    parse_events,
    receive_until,
    send_post,
    served,
    until,
    words,
)

from ttt_e2e.errors import UserError
from ttt_e2e.inference.divergence import Diverged
from ttt_e2e.server.api.schemas import MAX_TOKENS
from ttt_e2e.server.api.streams import with_keepalive
from ttt_e2e.server.engine.records import StoppingError
from ttt_e2e.server.keys import Keys

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
anthropic = pytest.importorskip("anthropic", reason="Anthropic's client is not installed")

KEY = "a-long-key-for-tests"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def shared() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def address(shared: FakeEngine) -> Iterator[str]:
    with served(shared, keys=Keys({"test": KEY})) as address:
        yield address


@pytest.fixture(scope="module")
def official(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


# -- the official client -----------------------------------------------------------------------------------------------


def test_official_models(official: Any) -> None:
    assert [model.id for model in official.models.list()] == ["tiny"]
    assert official.models.retrieve("tiny").owned_by == "ttt-e2e"
    with pytest.raises(openai.NotFoundError) as caught:
        official.models.retrieve("gpt")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with anthropic.Anthropic(base_url=str(official.base_url).removesuffix("/v1/"), api_key=KEY, max_retries=0) as other:
        [model] = other.models.list()
        assert model == other.models.retrieve("tiny")
        assert (model.display_name, model.max_tokens) == ("tiny", MAX_TOKENS)


def test_official_completions(official: Any) -> None:
    done = official.completions.create(model="tiny", prompt=["a b", "c"], max_tokens=3, n=2, temperature=0, seed=7)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in done.choices} == {words(3)}
    assert {choice.finish_reason for choice in done.choices} == {"length"}
    usage = done.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 12, 15)
    done = official.completions.create(model="tiny", prompt="a", stop=["w2"], max_tokens=9)
    assert done.choices[0].finish_reason == "stop"


def test_official_completion_stream(official: Any) -> None:
    options = {"include_usage": True}
    stream = official.completions.create(model="tiny", prompt="a b", max_tokens=4, stream=True, stream_options=options)
    parts = list(stream)
    assert "".join(part.choices[0].text for part in parts[:-1]) == words(4)
    assert [part.choices[0].finish_reason for part in parts[:-1]] == [None] * 4 + ["length"]
    assert parts[-1].choices == [] and parts[-1].usage.total_tokens == 6
    assert all(part.usage is None for part in parts[:-1])
    assert len({part.id for part in parts}) == 1
    stream = official.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=4, stream=True)
    texts = [""] * 4
    for part in stream:
        texts[part.choices[0].index] += part.choices[0].text
    assert texts == [words(4)] * 4


def test_official_chat(official: Any) -> None:
    response = official.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=2)
    assert response.choices[0].message.content == words(2)
    assert response.choices[0].message.role == "assistant"
    assert response.usage.completion_tokens == 2
    again = [*HELLO, response.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "More"}]}]
    stream = official.chat.completions.create(model="tiny", messages=again, max_tokens=3, n=2, stream=True)
    texts, roles, ends = ["", ""], ["", ""], ["", ""]
    for part in stream:
        (choice,) = part.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role or ""
        ends[choice.index] += choice.finish_reason or ""
    assert (texts, roles, ends) == ([words(3)] * 2, ["assistant"] * 2, ["length"] * 2)


def test_official_errors(address: str, official: Any) -> None:
    with (
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"),
    ):
        other.models.list()
    with pytest.raises(openai.BadRequestError, match="less than or equal to 2") as caught:
        official.completions.create(model="tiny", prompt="x", temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="no such session"):
        official.completions.create(model="tiny", prompt="x", extra_body={"session": "sess-0"}, stream=True)


def test_official_embeddings_are_refused(official: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="no embeddings") as caught:
        official.embeddings.create(model="tiny", input="x")
    assert (caught.value.param, caught.value.code) == ("model", "not_supported")


def test_official_sessions(shared: FakeEngine, official: Any) -> None:
    made = official.post("/sessions", cast_to=object)
    at = {"session": made["id"], "learn": True, "top_k": 5, "min_p": 0.1}
    official.completions.create(model="tiny", prompt="Once", max_tokens=2, extra_body=at)
    call = shared.calls[-1]
    assert call.learn and (call.sampling.top_k, call.sampling.min_p) == (5, 0.1)
    assert shared.all[made["id"]].text == "Once" + words(2)
    official.chat.completions.create(model="tiny", messages=HELLO, extra_body={"session": made["id"]})
    assert shared.calls[-1].prompt == "\nUser: Hello\nAssistant:"
    assert not shared.calls[-1].learn


# -- keep-alive --------------------------------------------------------------------------------------------------------


def test_with_keepalive_yields_none_while_an_item_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt_e2e.server.api.streams.KEEPALIVE_SECONDS", 0.001)

    async def main() -> None:
        ready = asyncio.Event()

        async def items() -> AsyncGenerator[str, None]:
            yield "first"
            await ready.wait()
            yield "second"

        found: list[str | None] = []
        async for item in with_keepalive(items()):
            found.append(item)
            if found.count(None) == 3:
                ready.set()
        assert [item for item in found if item] == ["first", "second"]
        assert found.index("second") - found.index("first") > 3

    asyncio.run(main())


def test_stream_has_comments_while_nothing_is_generated(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt_e2e.server.api.streams.KEEPALIVE_SECONDS", 0.001)
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 3}
    engine.hold_from = 1
    with served(engine) as address:
        stream = {**body, "stream": True}
        with client_at(address) as client, client.stream("POST", "/v1/completions", json=stream) as response:
            lines = response.iter_lines()
            assert [line for line in itertools.islice(lines, 10) if line] == [": waiting"] * 5
            engine.hold_from = math.inf
            assert [line[:6] for line in lines if line and line != ": waiting"] == ["data: "] * 5
        engine.hold_from = 1
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            chunks = client.completions.create(**body, stream=True)  # the response begins with a comment
            engine.hold_from = math.inf
            assert "".join(chunk.choices[0].text for chunk in chunks) == words(3)


# -- fields ------------------------------------------------------------------------------------------------------------


def test_fields_reach_the_engine(client: TestClient, engine: FakeEngine) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.25, "seed": 5}
    fields |= {"frequency_penalty": 1.5, "presence_penalty": -0.5}
    body = {"prompt": "x", "max_tokens": 3, "n": 2, "stop": "end", "logit_bias": {"7": -2}, **fields}
    assert client.post("/v1/completions", json=body).status_code == 200
    for number, call in enumerate(engine.calls):
        assert call.max_tokens == 3 and call.stop == ("end",)
        assert vars(call.sampling) == {**fields, "seed": 5 + number, "logit_bias": {7: -2.0}}
    engine.calls.clear()
    client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
    client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "temperature": None})
    first, second = (call.sampling for call in engine.calls)
    assert (first.temperature, first.top_p) == (0.8, 0.95)
    assert first.seed != second.seed
    client.post("/v1/completions", json={"prompt": None})
    assert engine.calls[-1].prompt == ""
    refused = {"role": "assistant", "content": None, "refusal": "No."}  # as OpenAI's response has it
    client.post("/v1/chat/completions", json={"messages": [*HELLO, refused, *HELLO], "max_tokens": 1})
    assert engine.calls[-1].prompt == "User: Hello\nAssistant: No.\nUser: Hello\nAssistant:"
    parts = [{"type": "text", "text": text} for text in ("One", "two", "")]
    client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}], "max_tokens": 1})
    assert engine.calls[-1].prompt == "User: One\ntwo\n\nAssistant:"  # as vLLM joins them
    for message in ({"role": "user", "content": None}, {"role": "assistant"}):
        assert client.post("/v1/chat/completions", json={"messages": [message]}).status_code == 400
    client.post("/v1/completions", json={})
    assert engine.calls[-1].max_tokens == 200 and engine.calls[-1].prompt == ""


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", ["NaN", "Infinity", "-Infinity", "-0.1", "2.1", "1e999", '"1"', "true", "[]"]),
        ("top_p", ["0", "-1", "1.1", "NaN", "false"]),
        ("min_p", ["-0.1", "1.1", "NaN"]),
        ("top_k", ["-2", "1.5", "NaN", "99999999999999999999"]),
        ("seed", ["-9223372036854775809", "9223372036854775808", "0.5"]),
        ("n", ["0", "9", "-1", "true", "1.0"]),
        ("max_tokens", ["0", "-1", "131073", "1e3", "99999999999999999999999", "NaN"]),
        ("max_completion_tokens", ["0", "131073"]),
        ("stop", ['""', '["a", ""]', '["1","2","3","4","5"]', "1", '{"a": 1}']),
        ("stream", ["1", '"true"']),
        ("stream_options", ["{}", '{"include_usage": true}', "1"]),
        ("learn", ["1", "true"]),
        ("session", ["5", "[]"]),
        ("frequency_penalty", ["2.1", "-3", "false", "NaN", '"1"']),
        ("presence_penalty", ["2.1", "[]"]),
        ("logit_bias", ['{"a": 1}', '{"-1": 1}', '{"5": 101}', '{"5": "1"}', '{"1000": 1}', "[]"]),
        ("logprobs", ["-1", "21", "1.5", '"1"']),
        ("best_of", ["0", "9", "true", "1.5"]),
        ("echo", ["1", '"true"']),
        ("temprature", ["1", "null"]),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_invalid_values_are_refused(
    client: TestClient, engine: FakeEngine, path: str, field: str, values: list[str]
) -> None:
    start = '"prompt": "x"' if path == "/v1/completions" else f'"messages": {json.dumps(HELLO)}'
    for value in values:
        body = f'{{{start}, "{field}": {value}}}'
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400, (body, response.text)
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert engine.calls == []


@pytest.mark.parametrize(
    ("path", "field", "value", "harmless"),
    [
        ("/v1/completions", "logprobs", True, 5),
        ("/v1/completions", "top_logprobs", 2, 0),
        ("/v1/completions", "suffix", "x", ""),
        ("/v1/completions", "prompt", [1, "x"], [1, 2]),
        ("/v1/completions", "prompt", [[1], []], [[1], [2]]),
        ("/v1/completions", "prompt", [1, 1000], [1, 999]),
        ("/v1/completions", "prompt", [-1], [0]),
        ("/v1/completions", "prompt", [[[1]]], "x"),
        ("/v1/completions", "prompt", [], "x"),
        ("/v1/completions", "prompt", ["x"] * 21, ["x"] * 20),
        ("/v1/chat/completions", "logprobs", 1, False),
        ("/v1/chat/completions", "top_logprobs", 1, 0),
        ("/v1/chat/completions", "echo", True, False),
        ("/v1/chat/completions", "best_of", 2, 1),
        ("/v1/chat/completions", "tools", [{}], []),
        ("/v1/chat/completions", "tool_choice", "required", "auto"),
        ("/v1/chat/completions", "response_format", {"type": "grammar"}, {"type": "text"}),
        ("/v1/chat/completions", "modalities", ["audio"], ["text"]),
        ("/v1/chat/completions", "messages", [], HELLO),
        ("/v1/chat/completions", "messages", [{"role": "tool", "content": "x"}], HELLO),
        ("/v1/chat/completions", "messages", [{"role": "user"}], HELLO),
        ("/v1/chat/completions", "messages", [{**HELLO[0], "tool_calls": [{}]}], [{**HELLO[0], "tool_calls": []}]),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": [{"type": "image_url"}]}], HELLO),
    ],
)
def test_unsupported_fields_are_refused_unless_default(
    client: TestClient, path: str, field: str, value: Any, harmless: Any
) -> None:
    body = {"prompt": "x"} if path == "/v1/completions" else {"messages": HELLO}
    response = client.post(path, json={**body, field: value})
    assert response.status_code == 400 and response.json()["error"]["param"] == field
    assert client.post(path, json={**body, "max_tokens": 1, field: harmless}).status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"learn": True}, "learn", "needs a session"),
        ({"learn": True, "n": 2, "session": "s"}, "n", "one choice of one prompt"),
        ({"learn": True, "best_of": 2, "session": "s"}, "n", "one choice of one prompt"),
        ({"learn": True, "prompt": ["a", "b"], "session": "s"}, "n", "one choice of one prompt"),
        ({"learn": True, "echo": True, "logprobs": 0, "session": "s"}, "echo", "omit learn"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "omit one of them"),
        ({"max_tokens": 0}, "max_tokens", "needs echo"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
        ({"best_of": 2, "n": 3}, "best_of", "at least n"),
        ({"best_of": 2, "stream": True}, "best_of", "omit stream"),
        ({"best_of": 8, "n": 1, "prompt": ["x"] * 8, "max_tokens": 16384}, "best_of", "reduce max_tokens"),
        ({"logprobs": 20, "n": 4, "max_tokens": 16384}, "logprobs", "reduce max_tokens"),
    ],
)
def test_contradictory_fields_are_refused(client: TestClient, body: dict[str, Any], param: str, message: str) -> None:
    response = client.post("/v1/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == 400 and message in error["message"] and error["param"] == param


# -- errors and disconnects -------------------------------------------------------------------------------------------


def test_error_before_the_first_chunk_has_a_status(client: TestClient, engine: FakeEngine) -> None:
    engine.failure = UserError("No such text.")
    response = client.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert response.status_code == 400 and response.json()["error"]["message"] == "No such text."


@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        (Diverged("Learning diverged.", 5), 422, "Learning diverged."),
        (RuntimeError("secret"), 500, "failed unexpectedly"),
        (StoppingError(), 503, "stopping"),
    ],
)
def test_error_in_a_stream_is_its_last_event(
    client: TestClient, engine: FakeEngine, failure: Exception, status: int, message: str
) -> None:
    engine.failure, engine.fail_from = failure, 3
    with log_lines() as lines:
        response = client.post("/v1/completions", json={"prompt": "x", "stream": True})
    *parts, last = parse_events(response.text)
    assert len(parts) == 2
    assert message in last["error"]["message"] and "secret" not in response.text + lines[0]
    assert ("RuntimeError" in lines[0]) == (status == 500)
    response = client.post("/v1/completions", json={"prompt": ["x", "y"], "n": 8})
    assert response.status_code == status and message in response.json()["error"]["message"]
    until(lambda: engine.running == 0)


def test_stream_of_a_chat_completion(client: TestClient) -> None:
    response = client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = parse_events(response.text)
    assert parts[-1] == "data: [DONE]"
    assert [part["choices"][0]["delta"] for part in parts[:-1]] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": " w1ä"},
        {"content": " w2ä"},
        {},
    ]


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_ends_the_generation(engine: FakeEngine, stream: bool) -> None:
    engine.hold_from = 2
    body = json.dumps({"prompt": "x", "max_tokens": 16_000, "n": 3, "stream": stream}).encode()
    with log_lines() as lines, served(engine) as address, client_at(address) as client:
        with connection_to(address) as connection:
            send_post(connection, "/v1/completions", body, {"content-type": "application/json"})
            if stream:
                receive_until(connection, b"data: ")
            until(lambda: engine.running == 3)
        until(lambda: engine.running == 0 and lines)
        assert json.loads(lines[0])["status"] == 499
        assert client.get("/health").status_code == 200


def test_concurrent_generations_are_limited_per_key(engine: FakeEngine) -> None:
    with client_of(engine, generations=2) as client:
        response = client.post("/v1/completions", json={"prompt": ["a", "b"], "n": 3, "max_tokens": 2})
    assert [choice["text"] for choice in response.json()["choices"]] == [words(2)] * 6
    assert engine.most_running == 2
