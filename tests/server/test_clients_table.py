"""The table of docs/reference/clients.md: every row is a call of an official client to a real service."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from engine_helpers import TEMPLATE, TOKENIZER
from pydantic import BaseModel
from server_helpers import PATIENCE, served
from tool_families import SHORT_CHAT

from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.store import Store

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
anthropic = pytest.importorskip("anthropic", reason="Anthropic's client is not installed")

TABLE = Path(__file__).parents[2] / "docs/reference/clients.md"
M: dict[str, Any] = {"model": "tiny"}
HELLO = [{"role": "user", "content": "Hello"}]
IDS = TOKENIZER.encode("The rain").tolist()
SCHEMA = {"type": "json_schema", "name": "x", "schema": {"type": "object"}}
NOTHING = {"type": "object", "additionalProperties": False}
TOOL = {"type": "function", "name": "f", "parameters": NOTHING}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": NOTHING}}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = [*HELLO, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "1", "content": "5"}]
CLAUDES = [{"name": "f", "input_schema": NOTHING}]
HOT: dict[str, Any] = {"temperature": 2, "top_p": 1, "seed": 1}  # soon draws the end of the text
THOUGHT = [{"type": "thinking", "thinking": "Hm", "signature": "x"}, {"type": "redacted_thinking", "data": "x"}]
REASONED = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm"}], "content": []}
IMAGE = "data:image/png;base64,AAAA"
Client = Any


def text(client: Client, **more: Any) -> Any:
    return client.completions.create(**M, **{"prompt": "The rain", "max_tokens": 2} | more)


def chat(client: Client, **more: Any) -> Any:
    return client.chat.completions.create(**M, **{"messages": HELLO, "max_completion_tokens": 2} | more)


def respond(client: Client, **more: Any) -> Any:
    return client.responses.create(**M, **{"input": "Hello", "max_output_tokens": 2} | more)


def message(client: Client, **more: Any) -> Any:
    return client.messages.create(**M, **{"messages": HELLO, "max_tokens": 2} | more)


def in_a_conversation(client: Client) -> Any:
    return respond(client, conversation=client.conversations.create(items=HELLO).id, input="More")


def items(client: Client) -> Any:
    id = client.conversations.create().id
    item = client.conversations.items.create(id, items=HELLO).data[0].id
    assert client.conversations.items.retrieve(item, conversation_id=id).id == item
    assert [one.id for one in client.conversations.items.list(id)] == [item]
    return client.conversations.items.delete(item, conversation_id=id)


def conversation(client: Client) -> Any:
    id = client.conversations.create(metadata={"a": "b"}).id
    assert client.conversations.update(id, metadata={"c": "d"}).metadata == {"c": "d"}
    assert client.conversations.retrieve(id).metadata == {"c": "d"}
    return client.conversations.delete(id)


def stored(client: Client) -> Any:
    id = respond(client).id
    assert client.responses.retrieve(id).id == id and client.responses.input_items.list(id).data
    return client.responses.delete(id) or True


class Answer(BaseModel):
    yes: bool


def tool_calls(chunks: Any) -> list[Any]:
    """Of a stream of a chat."""
    return [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]


def types(events: Any) -> list[str]:
    """Of the events or the items of a response, or of the blocks of a message."""
    return [one.type for one in events]


def parsed(client: Client) -> Any:
    done = client.chat.completions.parse(**M, messages=HELLO, response_format=Answer)
    return isinstance(done.choices[0].message.parsed, Answer)


def called(client: Client, **more: Any) -> Any:
    choice = {"type": "function", "function": {"name": "f"}}
    done = chat(client, tools=TOOLS, tool_choice=choice, max_completion_tokens=99)
    return done.choices[0].finish_reason == "tool_calls" and done.choices[0].message.tool_calls


def result(client: Client) -> Any:
    first = respond(client, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_output_tokens=99)
    output = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "5"}
    return respond(client, tools=[TOOL], input=[output], previous_response_id=first.id)


def used(client: Client) -> Any:
    first = message(client, tools=CLAUDES, tool_choice={"type": "tool", "name": "f"}, max_tokens=99)
    block = {"type": "tool_result", "tool_use_id": first.content[0].id, "content": "5"}
    said = [{"role": "assistant", "content": first.content}, {"role": "user", "content": [block]}]
    return first.stop_reason == "tool_use" and message(client, tools=CLAUDES, messages=[*HELLO, *said])


def reasoned(client: Client) -> Any:
    said = [*HELLO, {"role": "assistant", "content": "Yes"}, *HELLO]
    first, second = (respond(client, input=[*HELLO, *more, *said[1:]]) for more in ((REASONED,), ()))
    kept = client.responses.input_items.list(first.id).data
    return first.usage.input_tokens == second.usage.input_tokens and len(kept) == 3


def thought(client: Client) -> Any:
    block = {"type": "text", "text": "Yes"}
    answers = ({"role": "assistant", "content": content} for content in ([*THOUGHT, block], [block]))
    first, second = (message(client, messages=[*HELLO, answer, *HELLO]) for answer in answers)
    return first.usage.input_tokens == second.usage.input_tokens


@anthropic.beta_tool
def f() -> str:
    """A function."""
    return "5"


def run_tool(client: Client) -> Any:
    runner = client.beta.messages.tool_runner(**M, messages=HELLO, max_tokens=99, tools=[f], max_iterations=1)
    return runner.until_done()


def put_together(client: Client) -> Any:
    with client.messages.stream(**M, messages=HELLO, max_tokens=2) as stream:
        return stream.get_final_message()


OPENAI: dict[str, Callable[[Client], Any]] = {
    "`models.list`, `retrieve`": lambda c: c.models.retrieve(next(iter(c.models.list())).id),
    "`completions.create`": text,
    "`completions.create(stream=True)`": lambda c: [*text(c, stream=True, stream_options={"include_usage": True})],
    "`completions.create(prompt=...)`, several texts": lambda c: len(text(c, prompt=["One", "Two"], n=2).choices) == 4,
    "`completions.create(prompt=...)`, token ids": lambda c: len(text(c, prompt=[IDS, IDS]).choices) == 2,
    "`completions.create(echo=, logprobs=)`": lambda c: (
        "".join(text(c, echo=True, logprobs=5, max_tokens=0).choices[0].logprobs.tokens) == "The rain"
    ),
    "`completions.create(n=, best_of=)`": lambda c: text(c, n=1, best_of=3),
    "`completions.create(logit_bias=)`, penalties": lambda c: text(
        c, logit_bias={"5": -100}, frequency_penalty=1, presence_penalty=1
    ),
    "`completions.create(stop=, seed=, temperature=, top_p=)`": lambda c: text(
        c, stop=["x"], seed=1, temperature=0.5, top_p=0.9
    ),
    "`completions.create(suffix=)`": lambda c: text(c, suffix="x"),
    "`chat.completions.create`": chat,
    "`chat.completions.create(max_completion_tokens=64000)`": lambda c: (
        chat(c, max_completion_tokens=64000, **HOT).choices[0].finish_reason == "stop"
    ),
    "`chat.completions.create(stream=True)`": lambda c: (
        {choice.index for chunk in chat(c, stream=True, n=2) for choice in chunk.choices} == {0, 1}
    ),
    "`chat.completions.create(logprobs=, top_logprobs=)`": lambda c: (
        len(chat(c, logprobs=True, top_logprobs=5, seed=1).choices[0].logprobs.content[0].top_logprobs) == 5
    ),
    "`chat.completions.create(logit_bias=)`, penalties": lambda c: chat(
        c, logit_bias={"5": -100}, frequency_penalty=1, presence_penalty=1
    ),
    "`chat.completions.create(response_format=)`, any JSON": lambda c: (
        chat(c, response_format={"type": "json_object"}).choices[0].message.content.startswith("{")
    ),
    "`chat.completions.parse(response_format=)`, a model of pydantic": parsed,
    "`chat.completions.create(tools=)`": lambda c: chat(c, tools=TOOLS, parallel_tool_calls=False),
    "`chat.completions.create(tools=, tool_choice=)`": called,
    "`chat.completions.create(tools=, stream=True)`": lambda c: tool_calls(
        chat(c, tools=TOOLS, tool_choice="required", stream=True, max_completion_tokens=99)
    ),
    "`chat.completions.create`, a message of the role `tool`": lambda c: chat(c, tools=TOOLS, messages=CALLED),
    "`chat.completions.create(tools=)`, not a function": lambda c: chat(
        c, tools=[{"type": "custom", "custom": {"name": "f"}}]
    ),
    "`chat.completions.create(functions=)`": lambda c: chat(c, functions=[{"name": "f"}]),
    "`chat.completions.create`, an image": lambda c: chat(
        c, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}]}]
    ),
    "`chat.completions.create(modalities=)`, audio": lambda c: chat(c, modalities=["text", "audio"]),
    "`responses.create`": lambda c: respond(c, metadata={"a": "b"}, temperature=0.5, top_p=0.9),
    "`responses.create(max_output_tokens=64000)`": lambda c: (
        respond(c, max_output_tokens=64000, extra_body=HOT).status == "completed"
    ),
    "`responses.create(stream=True)`": lambda c: (
        types(respond(c, stream=True, temperature=0))[-1]
        == "response.incomplete"  # after the two tokens that it may have
    ),
    "`responses.create(instructions=)`, messages": lambda c: respond(c, instructions="Be kind.", input=HELLO),
    "`responses.create(previous_response_id=)`": lambda c: (
        respond(c, previous_response_id=respond(c).id).previous_response_id
    ),
    "`responses.create(conversation=)`": in_a_conversation,
    "`responses.create(store=False)`": lambda c: respond(c, store=False),
    "`responses.retrieve`, `delete`, `input_items.list`": stored,
    "`responses.create(text=)`, a JSON schema": lambda c: respond(c, text={"format": SCHEMA}).output_text.startswith(
        "{"
    ),
    "`responses.parse(text_format=)`, a model of pydantic": lambda c: (
        c.responses.parse(**M, input="Hello", text_format=Answer).output_parsed
    ),
    "`responses.create(tools=)`": lambda c: (
        "function_call" in types(respond(c, tools=[TOOL], tool_choice="required", max_output_tokens=99).output)
    ),
    "`responses.create(tools=, stream=True)`": lambda c: (
        "response.function_call_arguments.done"
        in types(respond(c, tools=[TOOL], tool_choice="required", max_output_tokens=99, stream=True))
    ),
    "`responses.create`, a `function_call_output`": result,
    "`responses.create`, `reasoning` of an earlier answer": reasoned,
    "`responses.create`, an `item_reference`": lambda c: respond(
        c, input=[{"type": "item_reference", "id": respond(c).output[0].id}, *HELLO]
    ),
    "`responses.create(tools=)`, a tool of OpenAI's": lambda c: respond(c, tools=[{"type": "web_search"}]),
    "`responses.create(reasoning=)`": lambda c: respond(c, reasoning={"effort": "low"}),
    "`responses.create(text=)`, a verbosity": lambda c: respond(c, text={"verbosity": "low"}),
    "`responses.create(background=True)`": lambda c: respond(c, background=True),
    "`responses.create(include=)`": lambda c: respond(c, include=["message.output_text.logprobs"]),
    "`responses.create(include=)`, encrypted reasoning": lambda c: respond(
        c, store=False, include=["reasoning.encrypted_content"]
    ),
    "`responses.create`, an image": lambda c: respond(
        c, input=[{"role": "user", "content": [{"type": "input_image", "image_url": IMAGE}]}]
    ),
    "`responses.cancel`": lambda c: c.responses.cancel("resp_0"),
    "`conversations.create`, `retrieve`, `update`, `delete`": conversation,
    "`conversations.items.create`, `list`, `retrieve`, `delete`": items,
    "`embeddings.create`": lambda c: c.embeddings.create(**M, input="x"),
    "`moderations.create`": lambda c: c.moderations.create(**M, input="x"),
}
ANTHROPIC: dict[str, Callable[[Client], Any]] = {
    "`models.list`, `retrieve`": lambda c: c.models.retrieve(next(iter(c.models.list())).id).created_at.year > 2000,
    "`messages.create`": lambda c: message(c, system="Be kind.", stop_sequences=["x"]),
    "`messages.create(stream=True)`": lambda c: types(message(c, stream=True))[-1] == "message_stop",
    "`messages.stream`": put_together,
    "`messages.create(max_tokens=64000, stream=True)`": lambda c: (
        [*message(c, max_tokens=64000, stream=True, extra_body=HOT)][-2].delta.stop_reason == "end_turn"
    ),
    "`messages.create(max_tokens=64000, timeout=)`": lambda c: (
        message(c, max_tokens=64000, timeout=PATIENCE, stop_sequences=["e"]).stop_reason != "max_tokens"
    ),
    "`messages.create`, `temperature`, `top_p`, `top_k`": lambda c: message(
        c, extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 5}
    ),
    "`messages.create(tools=)`": lambda c: (
        "tool_use" in types(message(c, tools=CLAUDES, tool_choice={"type": "any"}, max_tokens=99).content)
    ),
    "`messages.create(tools=, stream=True)`": lambda c: (
        "input_json_delta"
        in types(
            event.delta
            for event in message(c, tools=CLAUDES, tool_choice={"type": "any"}, max_tokens=99, stream=True)
            if event.type == "content_block_delta"
        )
    ),
    "`messages.create`, a `tool_result`": used,
    "`messages.create`, `thinking` of an earlier answer": thought,
    "`messages.create(tools=)`, a tool of Anthropic's": lambda c: message(
        c, tools=[{"type": "bash_20250124", "name": "bash"}]
    ),
    "`messages.create(thinking=)`": lambda c: message(c, thinking={"type": "enabled", "budget_tokens": 1024}),
    "`messages.create(thinking=)`, adaptive": lambda c: message(c, thinking={"type": "adaptive"}),
    "`messages.create(output_config=)`, a JSON schema": lambda c: (
        message(c, output_config={"format": {"type": "json_schema", "schema": NOTHING}}).content[0].text.startswith("{")
    ),
    "`messages.create(output_config=)`, an effort": lambda c: message(c, output_config={"effort": "low"}),
    "`messages.create`, an image": lambda c: message(
        c, messages=[{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": IMAGE}}]}]
    ),
    "`beta.messages.tool_runner`": run_tool,
    "`messages.count_tokens`": lambda c: c.messages.count_tokens(**M, messages=HELLO, tools=CLAUDES).input_tokens,
}


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Client]]:
    with (
        served(Engine(TEMPLATE.fork(), Store(tmp_path_factory.mktemp("store"))), chat=SHORT_CHAT) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as first,
        anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as second,
    ):
        yield {"openai": first, "anthropic": second}


def test_the_table_says_what_happens(clients: dict[str, Client]) -> None:
    rows = []
    for name, calls in (("openai", OPENAI), ("anthropic", ANTHROPIC)):
        for call, make in calls.items():
            try:
                assert make(clients[name]), call
                outcome = "works"
            except (openai.APIStatusError, anthropic.APIStatusError) as error:
                body = error.body["error"] if name == "anthropic" else error.body
                assert error.status_code in (400, 404) and body["message"].endswith("."), (call, body)
                outcome = f"refused: {body['message']}"
            rows.append(f"| {name} | {call} | {outcome} |")
    written = re.findall(r"^\| (?:openai|anthropic) .*$", TABLE.read_text("utf-8"), re.MULTILINE)
    assert written == rows, "\n".join(["the table should be:", *rows])
