"""Anthropic's API with the official client, over a real engine, and what the client cannot see."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from engine_helpers import TEMPLATE, TOKENIZER
from server_helpers import FakeEngine, TestClient, client_of, log_lines, served, words
from tool_families import SHORT_CHAT

from ttt_e2e.inference.divergence import Diverged
from ttt_e2e.server.chat import ChatFormat
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.store import Store
from ttt_e2e.server.keys import Keys

anthropic = pytest.importorskip("anthropic", reason="Anthropic's client is not installed")

KEY = "a-long-key-for-tests"
HELLO = [{"role": "user", "content": "The rain had stopped"}]
GREEDY = {"temperature": 0}  # newer versions of the client have no argument for it
SHORT: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "messages": HELLO, "extra_body": GREEDY}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    engine = Engine(TEMPLATE.fork(), Store(tmp_path_factory.mktemp("store")))
    with served(engine, keys=Keys({"test": KEY})) as address:
        yield address


@pytest.fixture(scope="module")
def official(address: str) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=address, api_key=KEY, max_retries=0) as client:
        yield client


def test_official_messages(official: Any) -> None:
    answer = official.messages.create(**SHORT, system="Be kind.")
    prompt = TOKENIZER.encode("System: Be kind.\nUser: The rain had stopped\nAssistant:")
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "tiny")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(prompt), 8)
    assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)
    expected = "".join(TEMPLATE.fork().generate(TOKENIZER.decode(prompt), max_tokens=8, temperature=0))
    assert [(block.type, block.text) for block in answer.content] == [("text", expected)]
    parts = [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}]
    again = official.messages.create(**SHORT, system=parts)
    assert again.content[0].text == expected
    talk = [*HELLO, {"role": "assistant", "content": answer.content}, {"role": "user", "content": "And?"}]
    assert official.messages.create(**SHORT | {"messages": talk}).usage.input_tokens > len(prompt)


def test_tokens_are_counted_as_for_an_answer(official: Any, address: str) -> None:
    with httpx.Client(base_url=address, headers={"x-api-key": KEY}) as http:
        id = http.post("/v1/sessions").json()["id"]
        http.post(f"/v1/sessions/{id}/read", content="It rained.", headers={"content-type": "text/plain"})
    for extra in ({}, {"session": id}):
        said = {"model": "tiny", "messages": HELLO, "system": "Be kind.", "extra_body": GREEDY | extra}
        count = official.messages.count_tokens(**said).input_tokens
        assert count == official.messages.create(max_tokens=1, **said).usage.input_tokens
    with pytest.raises(anthropic.NotFoundError, match="no such model"):
        official.messages.count_tokens(model="other", messages=HELLO)
    with pytest.raises(anthropic.BadRequestError, match=r"messages.*at least 1 item"):
        official.messages.count_tokens(model="tiny", messages=[])


def test_passages_of_a_notebook_are_counted(client: TestClient) -> None:
    id = client.post("/v1/sessions", json={"notebook": True}).json()["id"]
    client.post(f"/v1/sessions/{id}/read", content="rain is wet", headers={"content-type": "text/plain"})
    counts = []
    for notebook in (True, False):
        body = {"messages": HELLO, "session": id, "notebook": notebook}
        counts.append(client.post("/v1/messages/count_tokens", json=body).json()["input_tokens"])
        answer = client.post("/v1/messages", json=body | {"max_tokens": 1}).json()
        assert counts[-1] == answer["usage"]["input_tokens"]
    assert counts[0] > counts[1]


def test_events_come_in_anthropics_order(official: Any) -> None:
    whole = official.messages.create(**SHORT)
    events = list(official.messages.create(**SHORT, stream=True))
    kinds = [event.type for event in events]
    deltas = kinds.count("content_block_delta")
    assert deltas > 1 and kinds == [  # the client leaves out the ping
        "message_start",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert "".join(event.delta.text for event in events[2 : 2 + deltas]) == whole.content[0].text
    start, ending = events[0].message, events[-2]
    assert start.content == [] and start.stop_reason is None and start.usage.input_tokens == whole.usage.input_tokens
    assert (ending.delta.stop_reason, ending.usage.output_tokens) == ("max_tokens", 8)
    with official.messages.stream(**SHORT) as stream:  # the client puts the events together
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text and final.usage.output_tokens == 8


def test_stop_sequences(official: Any, engine: FakeEngine) -> None:
    text = official.messages.create(**SHORT).content[0].text
    stop = text[-3:]
    answer = official.messages.create(**SHORT, stop_sequences=["never said", stop])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert answer.content[0].text == text[: text.index(stop)]
    chat = ChatFormat()
    chat.stop = ("w2ä",)
    with client_of(engine, chat=chat) as client:  # the end of an answer is none of them
        done = client.post("/v1/messages", json={"messages": HELLO, "max_tokens": 9, "stop_sequences": ["w3"]}).json()
    assert (done["stop_reason"], done["stop_sequence"]) == ("end_turn", None)
    assert done["content"][0]["text"] == words(2)


def test_messages_in_a_session_are_learned_as_chat_completions_are(official: Any) -> None:
    sessions = [official.post("/v1/sessions", cast_to=object)["id"] for _ in range(2)]
    for _ in range(2):
        memory = GREEDY | {"learn": True, "session": sessions[0]}
        answer = official.messages.create(**SHORT | {"extra_body": memory})
        body = {"messages": HELLO, "max_tokens": SHORT["max_tokens"], **memory, "session": sessions[1]}
        chat = official.post("/v1/chat/completions", body=body, cast_to=object)
        assert answer.content[0].text == chat["choices"][0]["message"]["content"]
        assert answer.usage.input_tokens == chat["usage"]["prompt_tokens"]
        one, other = (official.get(f"/v1/sessions/{id}", cast_to=object) for id in sessions)
        assert one["text_digest"] == other["text_digest"] and one["tokens"] > 1
    with pytest.raises(anthropic.BadRequestError, match="learn needs a session"):
        official.messages.create(**SHORT | {"extra_body": {"learn": True}})


def test_keys(address: str) -> None:
    for name, value in (("x-api-key", KEY), ("authorization", f"Bearer {KEY}")):
        headers = {"authorization": anthropic.Omit(), name: value}
        with anthropic.Anthropic(base_url=address, api_key="x", max_retries=0, default_headers=headers) as client:
            assert client.messages.create(**SHORT).role == "assistant"
    for headers in ({}, {"authorization": anthropic.Omit(), "x-api-key": "wrong"}):
        with anthropic.Anthropic(base_url=address, api_key="x", max_retries=0, default_headers=headers) as client:
            with pytest.raises(anthropic.AuthenticationError) as caught:
                client.messages.create(**SHORT)
            assert caught.value.type == "authentication_error"


def test_official_errors(official: Any) -> None:
    for wrong, kind, error, start in (
        ({"model": "gpt"}, "not_found_error", anthropic.NotFoundError, "model: "),
        ({"max_tokens": 0}, "invalid_request_error", anthropic.BadRequestError, "max_tokens: "),
        ({"tools": [{"name": "f"}]}, "invalid_request_error", anthropic.BadRequestError, "tools.0.input_schema: "),
        ({"thinking": {"type": "enabled"}}, "invalid_request_error", anthropic.BadRequestError, "thinking.type: "),
        ({"extra_body": {"surprise": 1}}, "invalid_request_error", anthropic.BadRequestError, "surprise: "),
    ):
        for stream in (False, True):
            with pytest.raises(error) as caught:
                official.messages.create(**SHORT | wrong, stream=stream)
            assert set(caught.value.body) == {"type", "error"} and caught.value.type == kind
            assert caught.value.body["error"]["message"].startswith(start)
    with pytest.raises(anthropic.NotFoundError) as caught:
        official.messages.batches.list()
    assert caught.value.type == "not_found_error"


def test_what_agents_send_changes_nothing(official: Any) -> None:
    """Claude Code and the AI SDK send all of this with every request."""
    plain = official.messages.create(**SHORT, system="Be kind.")
    cached = {"cache_control": {"type": "ephemeral"}}
    agents = official.beta.messages.create(
        **SHORT
        | {"messages": [{"role": "user", "content": [{"type": "text", "text": HELLO[0]["content"], **cached}]}]},
        system=[{"type": "text", "text": "Be kind.", **cached}],
        betas=["claude-code-20250219", "context-management-2025-06-27", "effort-2025-11-24"],
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        metadata={"user_id": "x"},
        output_config={"effort": "high"},
        thinking={"type": "adaptive"},
        tools=[{"name": "f", "input_schema": {"type": "object"}, "eager_input_streaming": True, **cached}],
        tool_choice={"type": "none"},
        extra_query={"beta": "true"},
    )
    assert agents.content[0].text == plain.content[0].text
    assert agents.usage.input_tokens == plain.usage.input_tokens
    for off in ({"edits": []}, None):
        more = {"context_management": off, "thinking": {"type": "disabled"}}
        assert (
            official.beta.messages.create(**SHORT, system="Be kind.", **more).content[0].text == plain.content[0].text
        )


def test_tool_runners_go_on_without_threads(tmp_path: Path) -> None:
    """They begin a thread, unless the server says in this way that it has none."""

    @anthropic.beta_tool
    def weather(city: Literal["Rome", "Oslo"]) -> str:
        """The weather in a city."""
        cities.append(city)
        return "rain"

    cities: list[str] = []
    with (
        log_lines() as log,
        served(Engine(TEMPLATE.fork(), Store(tmp_path)), chat=SHORT_CHAT) as address,
        anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client,
    ):
        choice = {"type": "tool", "name": "weather"}
        runner = client.beta.messages.tool_runner(
            **SHORT | {"max_tokens": 99}, tools=[weather], tool_choice=choice, max_iterations=2
        )
        answers = list(runner)
        assert [answer.stop_reason for answer in answers] == 2 * ["tool_use"] and len(cities) == 2
        assert answers[1].usage.input_tokens > answers[0].usage.input_tokens
        with pytest.raises(anthropic.BadRequestError, match="keeps no threads") as caught:
            client.beta.messages.create(**SHORT, thread={"type": "create"})
        assert caught.value.body["error"]["details"] == {"error_code": "thread_unsupported_request"}
    assert [json.loads(line)["status"] for line in log] == [400, 200, 200, 400]


def test_an_error_in_a_stream_is_raised_by_the_client(engine: FakeEngine) -> None:
    engine.failure, engine.fail_from = Diverged("Learning diverged.", 5), 3
    with (
        served(engine) as address,
        anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client,
        client.messages.create(**SHORT, stream=True) as stream,
        pytest.raises(anthropic.APIStatusError, match="Learning diverged"),
    ):
        list(stream)


def test_other_paths_keep_openais_form(client: TestClient) -> None:
    assert set(client.post("/v1/completions", json=[]).json()) == {"error"}
    for response in (
        client.get("/v1/messages"),
        client.post("/v1/messages", content=b"{"),
        client.put("/v1/messages/x"),
    ):
        assert response.status_code >= 400 and set(response.json()) == {"type", "error"}
