"""OpenAI's addresses: every field, streams, the official client unchanged, and clients that leave."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

import httpx
from server_helpers import FakeEngine, TestClient, client_of, log_lines, served, until

from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Diverged
from ttt_e2e.server.app import Settings, create_app
from ttt_e2e.server.keys import Keys
from ttt_e2e.server.limits import Limits
from ttt_e2e.server.records import Stopping

openai = pytest.importorskip("openai", reason="the client of OpenAI is not installed")

KEY = "a-long-key-for-tests"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with client_of(engine) as client:
        yield client


@pytest.fixture(scope="module")
def shared() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def address(shared: FakeEngine) -> Iterator[str]:
    with served(create_app(shared, Settings("tiny", Keys({"test": KEY})))) as address:  # type: ignore[arg-type]
        yield address


@pytest.fixture(scope="module")
def official(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def words(count: int) -> str:
    return "".join(f" w{i}ä" for i in range(1, count + 1))


def events(text: str) -> list[Any]:
    """The events of a stream; each is data and an empty line."""
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


# -- the official client -----------------------------------------------------------------------------------------------


def test_official_models(official: Any) -> None:
    assert [model.id for model in official.models.list()] == ["tiny"]
    assert official.models.retrieve("tiny").owned_by == "ttt-e2e"
    with pytest.raises(openai.NotFoundError) as caught:
        official.models.retrieve("gpt")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_official_completions(official: Any) -> None:
    done = official.completions.create(model="tiny", prompt=["a b", "c"], max_tokens=3, n=2, temperature=0, seed=7)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in done.choices} == {words(3)}
    assert {choice.finish_reason for choice in done.choices} == {"length"}
    usage = done.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 12, 15)
    done = official.completions.create(model="tiny", prompt="a", stop=["w2"], max_tokens=9)
    assert done.choices[0].finish_reason == "stop"


def test_official_completions_as_a_stream(official: Any) -> None:
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
    answer = official.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=2)
    assert answer.choices[0].message.content == words(2)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.completion_tokens == 2
    again = [*HELLO, answer.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "More"}]}]
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


def test_official_sessions(shared: FakeEngine, official: Any) -> None:
    made = official.post("/sessions", cast_to=object)
    at = {"session": made["id"], "learn": True, "top_k": 5, "min_p": 0.1}
    official.completions.create(model="tiny", prompt="Once", max_tokens=2, extra_body=at)
    asked = shared.asked[-1]
    assert asked["learn"] and (asked["options"].top_k, asked["options"].min_p) == (5, 0.1)
    assert shared.all[made["id"]].text == "Once" + words(2)
    official.chat.completions.create(model="tiny", messages=HELLO, extra_body={"session": made["id"]})
    assert shared.asked[-1]["prompt"] == "\nUser: Hello\nAssistant:"
    assert not shared.asked[-1]["learn"]


def test_a_stream_that_waits_says_that_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt_e2e.server.streams.WAITING", 0.02)
    ask = {"model": "tiny", "prompt": "Once", "max_tokens": 3}
    with served(create_app(FakeEngine(pause=0.2), Settings("tiny"))) as address:  # type: ignore[arg-type]
        text = httpx.post(f"{address}/v1/completions", json={**ask, "stream": True}).text
        parts = text.split("\n\n")
        assert parts[0] == ": waiting" and parts.count(": waiting") > 5
        assert [part[:6] for part in parts if part and part != ": waiting"] == ["data: "] * 5
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            written = client.completions.create(**ask, stream=True)
            assert "".join(part.choices[0].text for part in written) == words(3)


# -- fields ------------------------------------------------------------------------------------------------------------


def test_what_is_asked_for_reaches_the_engine(client: TestClient, engine: FakeEngine) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.25, "seed": 5}
    ask = {"prompt": "x", "max_tokens": 3, "n": 2, "stop": "end", **fields}
    assert client.post("/v1/completions", json=ask).status_code == 200
    for number, asked in enumerate(engine.asked):
        assert asked["max_tokens"] == 3 and asked["stop"] == ("end",)
        assert vars(asked["options"]) == {**fields, "seed": 5 + number}
    engine.asked.clear()
    client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
    client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "temperature": None})
    first, second = (asked["options"] for asked in engine.asked)
    assert (first.temperature, first.top_p) == (0.8, 0.95)
    assert first.seed != second.seed
    client.post("/v1/completions", json={"prompt": None})
    assert engine.asked[-1]["prompt"] == ""
    refused = {"role": "assistant", "content": None, "refusal": "No."}  # as OpenAI's answer has it
    client.post("/v1/chat/completions", json={"messages": [*HELLO, refused, *HELLO], "max_tokens": 1})
    assert engine.asked[-1]["prompt"] == "User: Hello\nAssistant: No.\nUser: Hello\nAssistant:"
    for message in ({"role": "user", "content": None}, {"role": "assistant"}):
        assert client.post("/v1/chat/completions", json={"messages": [message]}).status_code == 400
    client.post("/v1/completions", json={})
    assert engine.asked[-1]["max_tokens"] == 200 and engine.asked[-1]["prompt"] == ""


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", ["NaN", "Infinity", "-Infinity", "-0.1", "2.1", "1e999", '"1"', "true", "[]"]),
        ("top_p", ["0", "-1", "1.1", "NaN", "false"]),
        ("min_p", ["-0.1", "1.1", "NaN"]),
        ("top_k", ["-1", "1.5", "NaN", "99999999999999999999"]),
        ("seed", ["-1", "9223372036854775808", "0.5"]),
        ("n", ["0", "9", "-1", "true", "1.0"]),
        ("max_tokens", ["0", "-1", "16385", "1e3", "99999999999999999999999", "NaN"]),
        ("max_completion_tokens", ["0", "16385"]),
        ("stop", ['""', '["a", ""]', '["1","2","3","4","5"]', "1", '{"a": 1}']),
        ("stream", ["1", '"true"']),
        ("stream_options", ["{}", '{"include_usage": true}', '{"other": 1}', "1"]),
        ("learn", ["1", "true"]),
        ("session", ["5", "[]"]),
        ("user", ["5"]),
        ("frequency_penalty", ["0.1", "false", "NaN"]),
        ("presence_penalty", ["1"]),
        ("logit_bias", ['{"5": 1}']),
        ("surprise", ["1", "null"]),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_values_out_of_range(client: TestClient, engine: FakeEngine, path: str, field: str, values: list[str]) -> None:
    start = '"prompt": "x"' if path == "/v1/completions" else f'"messages": {json.dumps(HELLO)}'
    for value in values:
        body = f'{{{start}, "{field}": {value}}}'
        answer = client.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, (body, answer.text)
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert engine.asked == []


@pytest.mark.parametrize(
    ("path", "field", "value", "harmless"),
    [
        ("/v1/completions", "logprobs", 0, None),
        ("/v1/completions", "echo", True, False),
        ("/v1/completions", "best_of", 2, 1),
        ("/v1/completions", "suffix", "x", ""),
        ("/v1/completions", "prompt", [1, 2], ["x"]),
        ("/v1/completions", "prompt", [], "x"),
        ("/v1/completions", "prompt", ["x"] * 17, ["x"] * 16),
        ("/v1/completions", "service_tier", "priority", "auto"),
        ("/v1/completions", "frequency_penalty", 0.5, 0.0),
        ("/v1/chat/completions", "logprobs", True, False),
        ("/v1/chat/completions", "tools", [{}], []),
        ("/v1/chat/completions", "tool_choice", "auto", "none"),
        ("/v1/chat/completions", "response_format", {"type": "json_object"}, {"type": "text"}),
        ("/v1/chat/completions", "modalities", ["audio"], ["text"]),
        ("/v1/chat/completions", "reasoning_effort", "high", None),
        ("/v1/chat/completions", "store", True, False),
        ("/v1/chat/completions", "messages", [], HELLO),
        ("/v1/chat/completions", "messages", [{"role": "tool", "content": "x"}], HELLO),
        ("/v1/chat/completions", "messages", [{"role": "user"}], HELLO),
        ("/v1/chat/completions", "messages", [{**HELLO[0], "name": "x"}], [{**HELLO[0], "name": None}]),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": [{"type": "image_url"}]}], HELLO),
    ],
)
def test_what_cannot_be_served_is_refused(client: TestClient, path: str, field: str, value: Any, harmless: Any) -> None:
    ask = {"prompt": "x"} if path == "/v1/completions" else {"messages": HELLO}
    answer = client.post(path, json={**ask, field: value})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field
    assert client.post(path, json={**ask, "max_tokens": 1, field: harmless}).status_code == 200


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        ({"learn": True}, "session to learn in"),
        ({"learn": True, "n": 2, "session": "s"}, "one choice of one prompt"),
        ({"learn": True, "prompt": ["a", "b"], "session": "s"}, "one choice of one prompt"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "leave one of them out"),
        ({"stream_options": {"include_usage": True}}, "set stream"),
    ],
)
def test_fields_that_contradict_each_other(client: TestClient, ask: dict[str, Any], says: str) -> None:
    answer = client.post("/v1/completions", json=ask)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]


def test_names_that_are_half_a_surrogate_pair(client: TestClient) -> None:
    body = '{"prompt": "x", "\\ud800": 1}'
    answer = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400


# -- trouble on the way, and clients that leave ------------------------------------------------------------------------


def test_trouble_before_the_first_piece_has_a_status(client: TestClient, engine: FakeEngine) -> None:
    engine.trouble = UserError("No such text.")
    answer = client.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert answer.status_code == 400 and answer.json()["error"]["message"] == "No such text."


@pytest.mark.parametrize(
    ("trouble", "status", "says"),
    [
        (Diverged("Learning diverged.", 5), 422, "Learning diverged."),
        (RuntimeError("secret"), 500, "went wrong"),
        (Stopping(), 503, "stopping"),
    ],
)
def test_trouble_in_mid_stream(
    client: TestClient, engine: FakeEngine, trouble: Exception, status: int, says: str
) -> None:
    engine.trouble, engine.sound = trouble, 3
    with log_lines() as lines:
        answer = client.post("/v1/completions", json={"prompt": "x", "stream": True})
    *parts, last = events(answer.text)
    assert len(parts) == 2
    assert says in last["error"]["message"] and "secret" not in answer.text + lines[0]
    assert ("RuntimeError" in lines[0]) == (status == 500)
    answer = client.post("/v1/completions", json={"prompt": ["x", "y"], "n": 8})
    assert answer.status_code == status and says in answer.json()["error"]["message"]
    until(lambda: engine.running == 0)


def test_a_stream_says_when_it_is_done(client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = events(answer.text)
    assert parts[-1] == "data: [DONE]"
    assert [part["choices"][0]["delta"] for part in parts[:-1]] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": " w1ä"},
        {"content": " w2ä"},
        {},
    ]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_what_it_asked_for(stream: bool) -> None:
    engine = FakeEngine(pause=0.01)
    app = create_app(engine, Settings("tiny"))  # type: ignore[arg-type]
    ask = {"prompt": "x", "max_tokens": 16_000, "n": 3, "stream": stream}
    with log_lines() as lines, served(app) as address:
        with httpx.Client(base_url=address, timeout=20) as client:
            if stream:
                with client.stream("POST", "/v1/completions", json=ask) as answer:
                    parts = answer.iter_lines()
                    next(parts)
                    assert engine.running == 3
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/completions", json=ask, timeout=0.5)
        until(lambda: engine.running == 0 and lines)
        assert engine.written_tokens < 1000
        assert json.loads(lines[0])["status"] == 499
        assert httpx.get(f"{address}/health").status_code == 200


def test_so_many_generations_of_a_key_run_at_once() -> None:
    engine = FakeEngine(pause=0.001)
    with client_of(engine, limits=Limits(generations=2)) as client:
        answer = client.post("/v1/completions", json={"prompt": ["a", "b"], "n": 3, "max_tokens": 2})
    assert [choice["text"] for choice in answer.json()["choices"]] == [words(2)] * 6
    assert engine.most_running == 2
