"""Fields that the server does not act on: refused where they would change the answer, else ignored and named."""

import json
from typing import Any, get_type_hints

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from pydantic import ValidationError
from server_helpers import FakeEngine, TestClient, error_of, served

from ttt_e2e.server.api.chat_schemas import ChatCompletionRequest
from ttt_e2e.server.api.schemas import CompletionRequest

HELLO = [{"role": "user", "content": "Hello"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "x", "max_tokens": 1},
    CHAT: {"messages": HELLO, "max_tokens": 1},
}

MODELS = {COMPLETIONS: CompletionRequest, CHAT: ChatCompletionRequest}

# What clients of OpenAI's API and of the servers that imitate it send although it changes no text here.
HARMLESS: dict[str, Any] = {
    "metadata": {"user": "5"},
    "store": True,
    "reasoning_effort": "low",
    "prompt_cache_key": "key",
    "prompt_cache_retention": "24h",
    "safety_identifier": "me",
    "user": "me",
    "verbosity": "low",
    "service_tier": "priority",
    "parallel_tool_calls": True,
    "prediction": {"type": "content", "content": "x"},
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "function_call": "auto",
    "logprobs": False,
    "top_logprobs": 0,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "frequency_penalty": 0.0,
    "presence_penalty": 0,
    "logit_bias": {},
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "repetition_penalty": 1.0,
    "length_penalty": 1,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": False,
    "min_tokens": 0,
    "ignore_eos": False,
    "stop_token_ids": [],
    "use_beam_search": False,
    "include_stop_str_in_output": False,
    "priority": 3,
    "cache_salt": "salt",
    "request_id": "mine",
    "do_sample": True,
    "watermark": False,
    "cache_prompt": True,
    "id_slot": -1,
    "repeat_penalty": 1.0,
    "repeat_last_n": 64,
    "mirostat": 0,
    "mirostat_tau": 5.0,
    "dry_multiplier": 0.0,
    "xtc_probability": 0,
    "typical_p": 1.0,
    "grammar": "",
    "surprise": {"of": ["any", "kind"]},
}
# The same kind of field with a value that would change the text.
CHANGING: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "response_format": {"type": "grammar"},
    "modalities": ["text", "audio"],
    "suffix": "x",
    "web_search_options": {},
    "repetition_penalty": 1.1,
    "repeat_penalty": True,
    "skip_special_tokens": False,
    "min_tokens": 5,
    "ignore_eos": True,
    "stop_token_ids": [1],
    "use_beam_search": True,
    "guided_json": {},
    "structured_outputs": {"regex": "x"},
    "chat_template": "x",
    "truncate_prompt_tokens": 5,
    "mirostat": 2,
    "n_predict": 5,
    "grammar": "root ::= x",
    "typical_p": 0.5,
}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_harmless_fields_change_nothing_and_are_named(client: TestClient, engine: FakeEngine, path: str) -> None:
    body = BODIES[path] | {"seed": 1}
    plain = client.post(path, json=body)
    assert plain.status_code == 200 and "x-ignored-fields" not in plain.headers
    for name, value in HARMLESS.items():
        response = client.post(path, json={**body, name: value})
        assert response.status_code == 200, (name, response.text)
        assert response.headers.get("x-ignored-fields") == (None if name in MODELS[path].model_fields else name)
        response = client.post(path, json={**body, name: None})
        assert response.status_code == 200 and "x-ignored-fields" not in response.headers
    assert all(call == engine.calls[0] for call in engine.calls)
    response = client.post(path, json={**body, **HARMLESS, "stream": True})
    ignored = [name for name in HARMLESS if name not in MODELS[path].model_fields]
    shown = [*ignored[:50], "..."] if len(ignored) > 50 else ignored
    assert response.headers["x-ignored-fields"].split(", ") == shown


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_fields_that_would_change_the_text_are_refused(client: TestClient, engine: FakeEngine, path: str) -> None:
    for name, value in CHANGING.items():
        error = error_of(client.post(path, json={**BODIES[path], name: value}), 400)
        assert error["param"] == name and error["message"].startswith(f"{name}: "), error
    assert engine.calls == []


@pytest.mark.parametrize(("path", "field"), [(COMPLETIONS, "messages"), (CHAT, "prompt")])
def test_text_in_the_field_of_another_endpoint_is_refused(client: TestClient, path: str, field: str) -> None:
    assert error_of(client.post(path, json={**BODIES[path], field: "x"}), 400)["param"] == field


def test_every_field_of_openais_api_is_accepted_as_null(client: TestClient) -> None:
    pytest.importorskip("openai", reason="OpenAI's client is not installed")
    from openai.types import completion_create_params
    from openai.types.chat import completion_create_params as chat_create_params

    for path, module in ((COMPLETIONS, completion_create_params), (CHAT, chat_create_params)):
        names = get_type_hints(module.CompletionCreateParamsNonStreaming)
        assert "presence_penalty" in names
        required = {"messages", "prompt"}
        body = {**BODIES[path], **{name: None for name in names if name not in required | {"max_tokens"}}}
        assert client.post(path, json=body).status_code == 200


def test_values_that_mean_the_default(client: TestClient, engine: FakeEngine) -> None:
    client.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "top_k": -1, "seed": -1, "n": 2, "best_of": 2})
    client.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "seed": -1})
    client.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "seed": -5})
    first, second, other, negative = (call.sampling for call in engine.calls)
    assert first.top_k == 0 and len({first.seed, other.seed}) == 2 and second.seed == (first.seed + 1) % 2**63
    assert negative.seed == 2**63 - 5


def test_ignored_fields_of_messages_are_named_once(client: TestClient, engine: FakeEngine) -> None:
    part = {"type": "text", "text": "Hello", "cache_control": {}}
    message = {"role": "user", "content": [part], "name": "me", "tool_calls": []}
    answer = {"role": "assistant", "content": "Hi", "audio": None, "annotations": [{}], "reasoning_content": "Hm"}
    body = {**BODIES[CHAT], "messages": [message, answer, message], "stream": True}
    response = client.post(CHAT, json={**body, "stream_options": {"include_usage": True, "include_obfuscation": True}})
    assert response.headers["x-ignored-fields"].split(", ") == [
        "stream_options.include_obfuscation",
        *("messages.name", "messages.content.cache_control"),
        *("messages.annotations", "messages.reasoning_content"),
    ]
    assert engine.calls[0].prompt == "User: Hello\nAssistant: Hi\nUser: Hello\nAssistant:"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("temprature", "temprature: no such field; send temperature if that is meant."),
        ("max_token", "max_token: no such field; send max_tokens if that is meant."),
        ("presence_penality", "presence_penality: no such field; send presence_penalty if that is meant."),
    ],
)
def test_misspelt_field_is_an_error(client: TestClient, name: str, message: str) -> None:
    response = client.post(COMPLETIONS, json={**BODIES[COMPLETIONS], name: 1})
    assert error_of(response, 400)["message"] == message


def test_any_name_of_a_field_fits_into_the_header(engine: FakeEngine) -> None:
    with served(engine) as address, httpx.Client(base_url=address) as client:
        for name in ("\r\nx-injected: 1", "ä, b", "", 2000 * "n", "%"):
            names = dict.fromkeys([name, *(f"{name}{i}" for i in range(99))], 1)
            response = client.post(COMPLETIONS, json=BODIES[COMPLETIONS] | names)
            assert response.status_code == 200 and "x-injected" not in response.headers
            header = response.headers["x-ignored-fields"]
            assert len(header) < 20_000 and header.isascii() and header.endswith(", ...")


def test_very_many_unknown_fields_are_refused(client: TestClient) -> None:
    response = client.post(COMPLETIONS, json=BODIES[COMPLETIONS] | dict.fromkeys(map(str, range(101)), 1))
    assert "more than 100 fields" in error_of(response, 400)["message"]


def test_name_that_is_half_a_surrogate_pair_is_refused(client: TestClient) -> None:
    body = json.dumps({**BODIES[COMPLETIONS], "\ud800": 1})
    error_of(client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize(
    ("messages", "start"),
    [
        ([*HELLO, {"role": "critic", "content": "x"}], "messages.1.role: Input should be"),
        ([*HELLO, {"role": "tool", "content": "x"}], "messages.1: a message of the role tool needs tool_call_id"),
        ([{**HELLO[0], "tool_call_id": "x"}], "messages.0: a message of the role tool needs tool_call_id"),
        ([{"role": "assistant", "tool_calls": []}], "messages.0: a message needs content"),
        ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], "messages.0.tool_calls.0.function: Field required."),
        ([*HELLO, *HELLO, {"role": "user"}], "messages.2: a message needs content"),
        ([*HELLO, {"content": "x"}], "messages.1.role: Field required."),
        ([{"role": "user", "content": 5}], "messages.0.content: Input should be a valid string, or: Input should be"),
        ([*HELLO, {"role": "user", "content": [{"type": "text"}]}], "messages.1.content.0.text: Field required."),
        (
            [*HELLO, {"role": "user", "content": [{"type": "text", "text": ""}, {"type": "image_url"}]}],
            "messages.1.content.1.type: Input should be 'text'",
        ),
        ([*HELLO, 5], "messages.1: Input should be"),
        (
            [*HELLO, {**HELLO[0], "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": ""}}]}],
            "messages.1: only an assistant's message has tool_calls.",
        ),
    ],
)
def test_errors_name_the_message(client: TestClient, messages: list[Any], start: str) -> None:
    error = error_of(client.post(CHAT, json={"messages": messages}), 400)
    assert error["message"].startswith(start) and error["param"] == "messages"


@pytest.mark.parametrize(
    ("body", "start"),
    [
        ({"stop": 5}, "stop: Input should be a valid string, or: Input should be a valid list."),
        ({"stop": ["a", ""]}, "stop.1: String should have at least 1 character."),
        ({"prompt": ["a", 5]}, "prompt.1: Input should be a valid string."),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage: Input should be"),
    ],
)
def test_errors_name_the_place_of_a_value(client: TestClient, body: dict[str, Any], start: str) -> None:
    error = error_of(client.post(COMPLETIONS, json=body), 400)
    assert error["message"].startswith(start) and error["param"] == next(iter(reversed(body)))


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [1] * 100_000}],
        [{"role": "user", "content": [1] * 1000}] * 1000,
        [{}] * 1000,
        [{"role": "user", "content": None} | dict.fromkeys(map(str, range(50_000)), 1)],
    ],
)
def test_lists_end_at_their_first_errors(messages: list[Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate({"messages": messages})
    assert caught.value.error_count() < 10
