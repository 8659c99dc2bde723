"""JSON and calls of functions with the official clients, over a real engine whose untrained model writes anything."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from chat_families import FAMILIES
from engine_helpers import TEMPLATE, TOKENIZER
from pydantic import BaseModel, Field
from server_helpers import FakeEngine, client_of, error_of, parse_events, served
from tool_families import SHORT_CHAT

from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.records import TextChunk
from ttt_e2e.server.engine.store import Store

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
anthropic = pytest.importorskip("anthropic", reason="Anthropic's client is not installed")

UNIT = {"type": "object", "properties": {"unit": {"enum": ["celsius", "kelvin"]}}, "required": ["unit"]}
WEATHER = {"name": "weather", "description": "How it is.", "parameters": UNIT | {"additionalProperties": False}}
TIME = {"name": "time", "parameters": {"type": "object", "additionalProperties": False}}
TOOLS = [{"type": "function", "function": one} for one in (WEATHER, TIME)]
ASK = [{"role": "user", "content": "How is it?"}]
SEED = {"temperature": 1.5, "extra_body": {"seed": 5}}


class Person(BaseModel):
    name: Literal["Anna", "Bén"]
    age: int = Field(ge=0, le=120)
    likes: list[bool] = Field(max_length=2)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(Engine(TEMPLATE.fork(), Store(tmp_path_factory.mktemp("store"))), chat=SHORT_CHAT) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(address: str) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client:
        yield client


def ask(client: Any, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": ASK, "max_tokens": 300} | SEED | more)


def call_of(message: Any) -> tuple[str, Any]:
    (call,) = message.tool_calls
    return call.function.name, json.loads(call.function.arguments)


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_chat_completions_parse(client: Any) -> None:
    body = {"model": "tiny", "messages": ASK, "max_tokens": 300, "response_format": Person} | SEED
    done = client.chat.completions.parse(**body, n=2, frequency_penalty=1.5, logit_bias={"5": 3}, logprobs=True)
    people = [choice.message.parsed for choice in done.choices]
    assert all(isinstance(one, Person) for one in people) and {one.finish_reason for one in done.choices} == {"stop"}
    for choice in done.choices:  # every token is told, with the model's own probability
        assert "".join(token.token for token in choice.logprobs.content if "\ufffd" not in token.token)
        assert min(token.logprob for token in choice.logprobs.content) < -3
    with client.chat.completions.stream(**body) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == client.chat.completions.parse(**body).choices[0].message.parsed


def test_json_object_and_what_is_cut_off(client: Any) -> None:
    whole = ask(client, response_format={"type": "json_object"}, logit_bias={str(TOKENIZER.encode("}")[0]): 30})
    assert isinstance(json.loads(whole.choices[0].message.content), dict) and whole.choices[0].finish_reason == "stop"
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "a" * 9}}}
    usual = ask(client, response_format=format)
    tokens = usual.usage.completion_tokens
    # It is complete with the last token that may come, and is not without it.
    for limit, reason in ((tokens, "stop"), (tokens - 1, "length")):
        cut = ask(client, response_format=format, max_tokens=limit)
        assert cut.choices[0].finish_reason == reason and (cut.usage.completion_tokens == limit)
    assert json.loads(usual.choices[0].message.content) == "a" * 9


def test_responses_parse(client: Any) -> None:
    body = {"model": "tiny", "input": "Who?", "max_output_tokens": 300, "text_format": Person} | SEED
    whole = client.responses.parse(**body)
    assert isinstance(whole.output_parsed, Person) and whole.status == "completed"
    assert whole.text.format.type == "json_schema" and "age" in whole.text.format.schema_["properties"]
    with client.responses.stream(**body) as stream:
        assert stream.get_final_response().output_parsed == whole.output_parsed
    assert (
        client.responses.retrieve(whole.id).text
        == client.responses.create(
            model="tiny", input="x", max_output_tokens=1, text={"format": whole.text.format.to_dict()}
        ).text
    )


def test_anthropics_output_format(claude: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    config = {"format": {"type": "json_schema", "schema": schema}}
    done = claude.messages.create(model="tiny", messages=ASK, max_tokens=50, output_config=config)
    assert set(json.loads(done.content[0].text)) == {"a"} and done.stop_reason == "end_turn"


# -- calls -------------------------------------------------------------------------------------------------------------


def test_calls_in_chat_completions(client: Any) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        more = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
        done = ask(client, **more).choices[0]
        name, arguments = call_of(done.message)
        assert done.finish_reason == "tool_calls" and done.message.content is None
        assert arguments["unit"] in ("celsius", "kelvin") if name == "weather" else arguments == {}
        assert name == "weather" or choice == "required"
        chunks = [chunk.choices[0] for chunk in ask(client, **more, stream=True)]
        deltas = [one for chunk in chunks for one in chunk.delta.tool_calls or ()]
        first = deltas[0]
        assert (first.function.name, first.type, len(first.id), first.index) == (name, "function", 9, 0)
        assert "".join(one.function.arguments for one in deltas) == done.message.tool_calls[0].function.arguments
        assert chunks[-1].finish_reason == "tool_calls" and not any(chunk.delta.content for chunk in chunks)
        with client.chat.completions.stream(
            **{"model": "tiny", "messages": ASK, "max_tokens": 300} | SEED, tools=TOOLS, tool_choice=choice
        ) as stream:
            assert stream.get_final_completion().choices[0].message.tool_calls[0].function.name == name
    free = ask(client, tools=TOOLS, tool_choice="none", max_tokens=5)
    assert free.choices[0].message.content == ask(client, max_tokens=5).choices[0].message.content
    assert ask(client, tools=TOOLS, max_tokens=5).usage.prompt_tokens > free.usage.prompt_tokens


def test_a_session_learns_calls_and_results_once(client: Any) -> None:
    """Also as responses, and as messages of Anthropic's API: the session that is left is the same."""
    sessions, tokens = [client.post("/sessions", cast_to=object)["id"] for _ in range(2)], []
    call = (
        ask(
            client,
            tools=TOOLS,
            tool_choice={"type": "function", "function": {"name": "weather"}},
            extra_body={"seed": 5, "session": sessions[0], "learn": True},
        )
        .choices[0]
        .message
    )
    result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "wet"}
    memory = {"seed": 6, "session": sessions[0], "learn": True}
    for messages in ([result], [result], ASK):  # with the tools, which have been named, and without
        for tools in (TOOLS, openai.omit):
            done = ask(client, messages=messages, tools=tools, max_tokens=4, extra_body=memory | {"learn": False})
            tokens.append(done.usage.prompt_tokens)
    assert len({*tokens[:4]}) == 1 and len({*tokens[4:]}) == 1
    other = [{"type": "function", "function": TIME}]
    assert (
        ask(
            client, messages=[result], tools=other, max_tokens=4, extra_body=memory | {"learn": False}
        ).usage.prompt_tokens
        > tokens[0]
    )
    answer = ask(client, messages=[result], tools=TOOLS, max_tokens=4, extra_body=memory)
    learned = client.get(f"/sessions/{sessions[0]}", cast_to=object)

    functions = [{"type": "function", **one} for one in (WEATHER, TIME)]
    body = {"model": "tiny", "tools": functions, "temperature": 1.5}
    first = client.responses.create(
        **body,
        input="How is it?",
        max_output_tokens=300,
        tool_choice={"type": "function", "name": "weather"},
        extra_body={"seed": 5},
    )
    (item,) = first.output
    assert (item.type, item.name, item.arguments) == ("function_call", "weather", call.tool_calls[0].function.arguments)
    assert client.responses.retrieve(first.id).to_dict() == first.to_dict() and first.tools[0].name == "weather"
    output = [{"type": "function_call_output", "call_id": item.call_id, "output": "wet"}]
    second = client.responses.create(
        **body, input=output, max_output_tokens=4, previous_response_id=first.id, extra_body={"seed": 6}
    )
    assert second.output_text == answer.choices[0].message.content and second.usage.input_tokens == tokens[0]
    assert client.get(f"/sessions/sess-{second.id[5:]}", cast_to=object)["text_digest"] == learned["text_digest"]
    assert [one.type for one in client.responses.input_items.list(second.id)] == ["function_call_output"]

    with anthropic.Anthropic(base_url=str(client.base_url).removesuffix("/v1/"), api_key="none") as claude:
        tools = [{"name": one["name"], "input_schema": one["parameters"]} for one in (WEATHER, TIME)]
        tools[0]["description"] = WEATHER["description"]
        body = {"model": "tiny", "tools": tools}
        memory = {"temperature": 1.5, "session": sessions[1], "learn": True}
        choice = {"type": "tool", "name": "weather"}
        used = claude.messages.create(
            **body, messages=ASK, max_tokens=300, tool_choice=choice, extra_body={"seed": 5} | memory
        )
        assert used.stop_reason == "tool_use" and [block.type for block in used.content] == ["tool_use"]
        assert used.content[0].input == json.loads(call.tool_calls[0].function.arguments)
        block = {"type": "tool_result", "tool_use_id": used.content[0].id, "content": "wet"}
        said = claude.messages.create(
            **body, messages=[{"role": "user", "content": [block]}], max_tokens=4, extra_body={"seed": 6} | memory
        )
    assert said.content[0].text == second.output_text
    assert client.get(f"/sessions/{sessions[1]}", cast_to=object)["text_digest"] == learned["text_digest"]


def test_calls_in_a_conversation(client: Any) -> None:
    conversation = client.conversations.create()
    body = {"model": "tiny", "conversation": conversation.id, "tools": [{"type": "function", **TIME, "strict": True}]}
    events = list(
        client.responses.create(**body, input="When?", tool_choice="required", parallel_tool_calls=False, stream=True)
    )
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("function_call_arguments.delta")
    assert kinds == [
        *("created", "in_progress", "output_item.added"),
        *["function_call_arguments.delta"] * deltas,
        *("function_call_arguments.done", "output_item.done", "completed"),
    ]
    (call,) = events[-1].response.output
    assert call == events[-2].item and "".join(event.delta for event in events[3 : 3 + deltas]) == call.arguments
    assert {event.item_id for event in events[3:-2]} == {call.id}
    output = {"type": "function_call_output", "call_id": call.call_id, "output": [{"type": "input_text", "text": "12"}]}
    added = client.conversations.items.create(conversation.id, items=[output])
    assert client.conversations.items.retrieve(added.data[0].id, conversation_id=conversation.id).output == "12"
    client.responses.create(**body, max_output_tokens=2)
    kinds = [one.type for one in client.conversations.items.list(conversation.id, order="asc")]
    assert kinds == ["message", "function_call", "function_call_output", "message"]
    whole = [{"role": "user", "content": "When?"}, call.to_dict(), output]  # a client that keeps all itself
    again = client.responses.create(model="tiny", input=whole, store=False, max_output_tokens=2)
    assert again.output[0].type == "message"


class Scripted(FakeEngine):
    """Writes the given text, three characters at a time."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    async def generate(self, *arguments: Any, **more: Any) -> AsyncIterator[TextChunk]:
        for at in range(0, len(self.text), 3):
            yield TextChunk(self.text[at : at + 3], None, 5, at + 3)
        yield TextChunk("", "stop", 5, len(self.text))


ONE = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
TWO = ONE + '\n<tool_call>\n{"name": "weather", "arguments": {"unit": "kelvin"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("It is <wet>.", "It is <wet>.", []),
        ("", "", []),
        (ONE, None, [("time", "{}")]),
        (f"I will ask.\n{TWO}", "I will ask.", [("time", "{}"), ("weather", '{"unit": "kelvin"}')]),
    ],
)
def test_text_and_calls_in_all_apis(text: str, said: str | None, calls: list[tuple[str, str]]) -> None:
    """Where the model decides itself: what comes before a call is text."""
    with client_of(Scripted(text), chat=FAMILIES["chatml"].chat()) as client:
        body = {"messages": ASK, "tools": TOOLS}
        (choice,) = client.post("/v1/chat/completions", json=body).json()["choices"]
        message, reason = choice["message"], "tool_calls" if calls else "stop"
        functions = [(one["function"]["name"], one["function"]["arguments"]) for one in message.get("tool_calls", ())]
        assert (message["content"], functions, choice["finish_reason"]) == (said, calls, reason)
        events = parse_events(client.post("/v1/chat/completions", json={**body, "stream": True}).text)[:-1]
        deltas = [event["choices"][0]["delta"] for event in events]
        assert "".join(delta.get("content") or "" for delta in deltas) == (said or "")
        assert [event["choices"][0]["finish_reason"] for event in events if event["choices"][0]["finish_reason"]] == [
            reason
        ]
        for number, (name, arguments) in enumerate(calls):
            parts = [one for d in deltas for one in d.get("tool_calls", ()) if one["index"] == number]
            assert parts[0]["function"]["name"] == name
            assert "".join(one["function"]["arguments"] for one in parts) == arguments

        functions = [{"type": "function", **tool["function"]} for tool in TOOLS]
        body = {"input": "How?", "tools": functions, "store": False}
        output = client.post("/v1/responses", json=body).json()["output"]
        assert [(one["name"], one["arguments"]) for one in output if one["type"] == "function_call"] == calls
        texts = [one["content"][0]["text"] for one in output if one["type"] == "message"]
        assert texts == ([] if said is None else [said])
        lines = client.post("/v1/responses", json={**body, "stream": True}).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        assert [event["sequence_number"] for event in events] == [*range(len(events))]
        items: dict[int, dict[str, Any]] = {}
        for event in events:
            if event["type"] == "response.output_item.done":
                items[event["output_index"]] = event["item"]
        final = events[-1]["response"]["output"]
        assert [*items.values()] == final and [*items] == [*range(len(final))]
        assert [one["type"] for one in final] == [one["type"] for one in output]

        body = {
            "messages": ASK,
            "max_tokens": 99,
            "tools": [{"name": one["name"], "input_schema": {}} for one in (TIME, WEATHER)],
        }
        blocks = client.post("/v1/messages", json=body).json()
        assert blocks["stop_reason"] == ("tool_use" if calls else "end_turn")
        assert [(one["name"], one["input"]) for one in blocks["content"] if one["type"] == "tool_use"] == [
            (name, json.loads(arguments)) for name, arguments in calls
        ]
        lines = client.post("/v1/messages", json={**body, "stream": True}).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        started = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
        assert started == [one["type"] for one in blocks["content"]]
        open_blocks = [(e["index"], e["type"][14:]) for e in events if e["type"].startswith("content_block_s")]
        assert open_blocks == [(i, kind) for i in range(len(started)) for kind in ("start", "stop")]
        parts = [e["delta"] for e in events if e["type"] == "content_block_delta"]
        assert "".join(one.get("text", "") for one in parts) == (said or "")
        assert "".join(one.get("partial_json", "") for one in parts) == "".join(arguments for _, arguments in calls)


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)"}}}


def test_schemas_that_cannot_be_followed_are_named(engine: FakeEngine) -> None:
    function = {"name": "bad", "parameters": BAD}
    named = {"name": "x", "schema": BAD}
    with client_of(engine, chat=SHORT_CHAT) as client:
        for path, body, place in (
            ("chat/completions", {"tools": [*TOOLS, {"type": "function", "function": function}]}, "tools.2.function"),
            ("chat/completions", {"response_format": {"type": "json_schema", "json_schema": named}}, "response_format"),
            ("responses", {"tools": [{"type": "function", **function}]}, "tools.0.parameters"),
            ("responses", {"text": {"format": {"type": "json_schema", **named}}}, "text.format.schema"),
            ("messages", {"tools": [{"name": "bad", "input_schema": BAD}]}, "tools.0.input_schema"),
            ("messages", {"output_config": {"format": {"type": "json_schema", "schema": BAD}}}, "output_config.format"),
        ):
            given: dict[str, Any] = {"input": "x"} if path == "responses" else {"messages": ASK, "max_tokens": 9}
            for stream in (False, True):
                response = client.post(f"/v1/{path}", json={**given, **body, "stream": stream})
                error = response.json()["error"] if path == "messages" else error_of(response, 400)
                assert response.status_code == 400 and error["message"].startswith(place), error
                assert "The schema cannot be followed (regex parse error)" in error["message"]
                assert path == "messages" or error["param"] == place.partition(".")[0]
        for path, choice in (
            ("chat/completions", {"type": "function", "function": {"name": "wetter"}}),
            ("responses", {"type": "function", "name": "wetter"}),
            ("messages", {"type": "tool", "name": "wetter"}),
        ):
            tools: list[Any] = [{"type": "function", **WEATHER}] if path == "responses" else TOOLS
            tools = [{"name": "weather", "input_schema": {}}] if path == "messages" else tools
            given = {"input": "x"} if path == "responses" else {"messages": ASK, "max_tokens": 9}
            message = client.post(f"/v1/{path}", json={**given, "tools": tools, "tool_choice": choice}).json()["error"]
            assert message["message"].startswith("tool_choice: there is no function wetter; name one of tools: weather")
    assert engine.calls == []
    with client_of(engine) as client:
        error = error_of(client.post("/v1/chat/completions", json={"messages": ASK, "tools": TOOLS}), 400)
        assert error["param"] == "tools" and "no chat template" in error["message"]
