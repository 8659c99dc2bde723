"""What /v1/responses, /v1/conversations and /v1/messages refuse: each in the API's form, with the field's name."""

import json
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from server_helpers import FakeEngine, TestClient, client_of, error_of

from ttt_e2e.errors import UserError
from ttt_e2e.server.chat import ChatFormat

RESPONSES, CONVERSATIONS, MESSAGES = "/v1/responses", "/v1/conversations", "/v1/messages"
HELLO = [{"role": "user", "content": "Hello"}]
IMAGE = {"type": "input_image", "image_url": "https://example.com/x.png"}
FUNCTION = {"type": "function", "name": "f", "parameters": {}}
TOOL = {"name": "f", "input_schema": {}}
TOOL_USE = {"type": "tool_use", "id": "x", "name": "f", "input": {}}
NOT_JSON = {"type": "string", "pattern": "("}
BODIES: dict[str, dict[str, Any]] = {
    RESPONSES: {"input": "Hello", "max_output_tokens": 1, "store": False},
    CONVERSATIONS: {},
    MESSAGES: {"messages": HELLO, "max_tokens": 1},
}
REFUSED: list[tuple[str, str, list[Any]]] = [
    (RESPONSES, "input", [5, [], [5], [{"role": "tool", "content": "x"}], [{"role": "user"}], {}]),
    (RESPONSES, "input", [[{"role": "user", "content": [IMAGE]}], [{"type": "function_call_output", "output": "x"}]]),
    (RESPONSES, "input", [[{**HELLO[0], "surprise": 1}], [{"role": "user", "content": [{"type": "text"}]}]]),
    (RESPONSES, "instructions", [5, [], HELLO]),
    (RESPONSES, "previous_response_id", [5, "", "resp_0", "sess-" + 32 * "0", "resp_" + 32 * "0"]),
    (RESPONSES, "conversation", [5, "", "conv_0", "resp_" + 32 * "0", {}, {"id": 5}, {"id": "x", "y": 1}]),
    (RESPONSES, "store", ["yes", 1]),
    (RESPONSES, "stream", ["yes", 1]),
    (RESPONSES, "max_output_tokens", [0, 131073, "5", 1.5]),
    (RESPONSES, "temperature", [-0.1, 2.1, "1"]),
    (RESPONSES, "top_p", [0, 1.1]),
    (RESPONSES, "metadata", [5, {"a": 5}, {"a" * 65: ""}, {"a": "b" * 513}, {str(i): "" for i in range(17)}]),
    (RESPONSES, "background", [True]),
    (RESPONSES, "include", [["message.output_text.logprobs"]]),
    (RESPONSES, "prompt", [{"id": "x"}]),
    (RESPONSES, "input", [[{"type": "function_call", "call_id": "x", "name": "f"}]]),
    (RESPONSES, "input", [[{"type": "function_call_output", "call_id": "x", "output": [IMAGE]}]]),
    (RESPONSES, "text", [{"format": {"type": "grammar"}}, {"verbosity": "x"}, {"format": {"type": "json_schema"}}]),
    (RESPONSES, "text", [{"format": {"type": "json_schema", "name": "a b", "schema": {}}}]),
    (RESPONSES, "text", [{"format": {"type": "json_schema", "name": "x", "schema": NOT_JSON}}]),
    (RESPONSES, "tools", [[{"type": "web_search"}], [FUNCTION], [FUNCTION, FUNCTION], [{**FUNCTION, "name": "a b"}]]),
    (RESPONSES, "tools", [[{**FUNCTION, "parameters": {"type": "array"}}], [{**FUNCTION, "surprise": 1}]]),
    (RESPONSES, "tool_choice", ["required", "any", {"type": "function", "name": "f"}, {"type": "web_search"}]),
    (RESPONSES, "parallel_tool_calls", [1, "no"]),
    (RESPONSES, "top_logprobs", [1]),
    (RESPONSES, "truncation", ["other"]),
    (RESPONSES, "stream_options", [{"include_usage": True}]),
    (RESPONSES, "surprise", [1, False]),
    (RESPONSES, "max_tokens", [5]),
    (RESPONSES, "messages", [HELLO]),
    (RESPONSES, "temprature", [1]),
    (
        CONVERSATIONS,
        "items",
        [5, [5], [HELLO[0]] * 21, [{"role": "user", "content": [IMAGE]}], [{"type": "compaction"}]],
    ),
    (CONVERSATIONS, "metadata", [5, {"a": 5}]),
    (CONVERSATIONS, "surprise", [1, None]),
    (MESSAGES, "messages", [5, [], [5], [{"role": "tool", "content": "x"}], [{"role": "user"}], [*HELLO, *HELLO, {}]]),
    (MESSAGES, "messages", [[*HELLO, {"role": "assistant", "content": "Hi"}]]),
    (MESSAGES, "messages", [[{"role": "user", "content": [{"type": "image", "source": {}}]}]]),
    (MESSAGES, "messages", [[{"role": "user", "content": [{"type": "thinking", "thinking": "Hm", "signature": "x"}]}]]),
    (MESSAGES, "max_tokens", [None, 0, 131073, "5", 1.5]),
    (MESSAGES, "system", [5, [{"type": "document"}]]),
    (MESSAGES, "stop_sequences", ["x", [""], [5], ["x"] * 17]),
    (MESSAGES, "temperature", [-0.1, 2.1, "1"]),
    (MESSAGES, "top_p", [0, 1.1]),
    (MESSAGES, "top_k", [-2, 0.5]),
    (MESSAGES, "stream", ["yes", 1]),
    (
        MESSAGES,
        "messages",
        [[{"role": "user", "content": [TOOL_USE]}]],
    ),
    (MESSAGES, "messages", [[{"role": "system", "content": [{"type": "tool_result", "tool_use_id": "x"}]}, *HELLO]]),
    (MESSAGES, "tools", [[{"name": "f"}], [TOOL], [TOOL, TOOL], [{"type": "bash_20250124", "name": "bash"}]]),
    (MESSAGES, "tools", [[{**TOOL, "input_schema": {"type": "string"}}], [{**TOOL, "surprise": 1}]]),
    (
        MESSAGES,
        "tools",
        [[{**TOOL, "defer_loading": True}], [{**TOOL, "allowed_callers": ["code_execution_20250825"]}]],
    ),
    (MESSAGES, "tool_choice", [{"type": "any"}, {"type": "tool"}, {"type": "tool", "name": "f"}, {"type": "x"}]),
    (MESSAGES, "thinking", [{"type": "enabled", "budget_tokens": 1024}]),
    (MESSAGES, "output_config", [{"format": {}}, {"task_budget": {"type": "tokens", "total": 20_000}}]),
    (MESSAGES, "context_management", [{"edits": [{"type": "clear_tool_uses_20250919"}]}, {"surprise": 1}]),
    (MESSAGES, "compaction", [{"type": "summarize"}]),
    (MESSAGES, "fallbacks", [[{"model": "tiny"}], "default"]),
    (MESSAGES, "thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_0"}]),
    (MESSAGES, "output_config", [{"format": {"type": "json_schema", "schema": NOT_JSON}}]),
    (MESSAGES, "container", ["x"]),
    (MESSAGES, "mcp_servers", [[{}]]),
    (MESSAGES, "learn", [True, 1]),
    (MESSAGES, "session", [5]),
    (MESSAGES, "surprise", [1, False]),
    (MESSAGES, "stop", ["x"]),
]
HARMLESS: dict[str, dict[str, Any]] = {
    RESPONSES: {
        "background": False,
        "client_metadata": {"session_id": "x"},
        "include": [],
        "max_tool_calls": 3,
        "prompt_cache_key": "x",
        "reasoning": {"effort": "high", "summary": "auto"},
        "safety_identifier": "x",
        "service_tier": "auto",
        "stream_options": {"include_obfuscation": False},
        "top_logprobs": 0,
        "truncation": "auto",
        "user": "x",
    },
    MESSAGES: {
        "cache_control": {"type": "ephemeral"},
        "fallbacks": [],
        "metadata": {"user_id": "x"},
        "service_tier": "auto",
    },
}


@pytest.mark.parametrize(("path", "field", "values"), REFUSED)
def test_refused_values_are_told_by_the_fields_name(
    client: TestClient, engine: FakeEngine, path: str, field: str, values: list[Any]
) -> None:
    for value in values:
        body = {**BODIES[path], field: value}
        for stream in (False, True) if path != CONVERSATIONS and field != "stream" else (False,):
            response = client.post(path, json={**body, "stream": stream} if stream else body)
            assert response.status_code in (400, 404), (body, response.text)
            if path == MESSAGES:
                assert set(response.json()) == {"type", "error"}
                assert response.json()["error"]["message"].startswith(field), response.text
            else:
                assert error_of(response, response.status_code)["param"] == field, response.text
    assert engine.calls == [] and engine.all == {}


@pytest.mark.parametrize("path", HARMLESS)
def test_harmless_fields_are_named(client: TestClient, engine: FakeEngine, path: str) -> None:
    for name, value in HARMLESS[path].items():
        response = client.post(path, json={**BODIES[path], "seed": 1, name: value})
        assert response.status_code == 200, (name, response.text)
        assert response.headers["x-ignored-fields"] == name
    assert all(call == engine.calls[0] for call in engine.calls)


def test_combinations(client: TestClient) -> None:
    conversation = client.post(CONVERSATIONS, json={}).json()["id"]
    both = {**BODIES[RESPONSES], "conversation": conversation, "previous_response_id": "resp_0"}
    assert error_of(client.post(RESPONSES, json=both), 400)["param"] == "conversation"
    nothing = {"conversation": conversation}
    assert error_of(client.post(RESPONSES, json=nothing), 400)["param"] == "input"
    path = f"{CONVERSATIONS}/{conversation}"
    for method, at, body, param in (
        ("POST", path, {}, "metadata"),
        ("POST", path, {"metadata": {}, "surprise": 1}, "surprise"),
        ("POST", f"{path}/items", {}, "items"),
        ("POST", f"{path}/items", {"items": HELLO, "surprise": 1}, "surprise"),
        ("GET", f"{path}/items?limit=0", None, "limit"),
        ("GET", f"{path}/items?limit=x", None, "limit"),
        ("GET", f"{path}/items?order=up", None, "order"),
    ):
        assert error_of(client.request(method, at, json=body), 400)["param"] == param
    for at, param in ((f"{path}/items?after=msg_0", "after"), (f"{path}/items/msg_0", "item_id")):
        assert error_of(client.get(at), 404)["param"] == param
    assert error_of(client.get(f"{CONVERSATIONS}/x"), 404)["param"] == "conversation_id"
    stored = client.post(RESPONSES, json={"input": "x"}).json()["id"]
    assert error_of(client.get(f"{RESPONSES}/{stored}?stream=true"), 400)["param"] == "stream"
    assert error_of(client.get(f"{RESPONSES}/x"), 404)["param"] == "response_id"
    for method, at in (("POST", f"{RESPONSES}/{stored}/cancel"), ("POST", f"{RESPONSES}/compact"), ("GET", RESPONSES)):
        assert client.request(method, at).status_code in (404, 405)


def test_kinds_of_items_are_named(client: TestClient) -> None:
    """A history of another server's answers may hold others."""
    for kind in ("compaction", "web_search_call", ""):
        body = {"model": "tiny", "input": [*HELLO, {"type": kind}]}
        message = client.post(RESPONSES, json=body).json()["error"]["message"]
        kinds = "message, function_call, function_call_output, item_reference or reasoning"
        assert message == f"input.1: an item is a {kinds}; omit others."


def test_a_conversation_has_limited_items(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt_e2e.server.api.documents._MAX_CHARACTERS", 1000)
    path = f"{CONVERSATIONS}/{client.post(CONVERSATIONS, json={}).json()['id']}"
    body = {"items": [{"role": "user", "content": "x" * 500}]}
    assert client.post(f"{path}/items", json=body).status_code == 200
    for response in (
        client.post(f"{path}/items", json=body),
        client.post(CONVERSATIONS, json={"items": 3 * body["items"]}),
    ):
        assert error_of(response, 400)["code"] == "limit_reached"
    assert len(client.get(f"{path}/items").json()["data"]) == 1


@pytest.mark.parametrize("text", ["\ud800", "a\ud800b"])
def test_half_a_surrogate_pair_is_refused(client: TestClient, text: str) -> None:
    for path, field, value in (
        (RESPONSES, "input", text),
        (RESPONSES, "instructions", text),
        (RESPONSES, "metadata", {"a": text}),
        (RESPONSES, "metadata", {text: "a"}),
        (CONVERSATIONS, "metadata", {"a": text}),
        (CONVERSATIONS, "items", [{"role": "user", "content": text}]),
        (MESSAGES, "system", text),
        (MESSAGES, "messages", [{"role": "user", "content": text}]),
    ):
        body = json.dumps(
            {**BODIES[path], "store": True, field: value} if path == RESPONSES else {**BODIES[path], field: value}
        )
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400, (path, field, response.text)


def test_every_field_of_openais_responses_is_known(client: TestClient) -> None:
    pytest.importorskip("openai", reason="OpenAI's client is not installed")
    from openai.types.responses import response_create_params

    names = response_create_params.ResponseCreateParamsNonStreaming.__annotations__
    assert "previous_response_id" in names
    assert client.post(RESPONSES, json=dict.fromkeys(names) | BODIES[RESPONSES]).status_code == 200


def test_every_field_of_anthropics_messages_is_known(client: TestClient) -> None:
    pytest.importorskip("anthropic", reason="Anthropic's client is not installed")
    from anthropic.types.beta import message_create_params

    names = message_create_params.MessageCreateParamsBase.__annotations__.keys() - {"betas"}  # these are a header
    assert "context_management" in names
    assert client.post(MESSAGES, json=dict.fromkeys(names) | BODIES[MESSAGES]).status_code == 200


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
def test_a_template_that_refuses_messages_names_the_field(engine: FakeEngine, path: str) -> None:
    class Refusing(ChatFormat):
        def prompt(self, *_: Any, **__: Any) -> str:
            raise UserError("messages.0: the chat template refuses it (roles must alternate); send others.")

    with client_of(engine, chat=Refusing()) as client:
        error = client.post(path, json=BODIES[path]).json()["error"]
    assert "roles must alternate" in error["message"]
    assert error["message"].startswith("messages") if path == MESSAGES else error["param"] == "input"
