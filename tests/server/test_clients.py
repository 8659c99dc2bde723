"""Clients that people have, with their ordinary OpenAI providers, against the whole service."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from engine_helpers import TEMPLATE, text_of
from pydantic import BaseModel
from server_helpers import PLAIN_TEXT, client_at, served
from tool_families import SHORT_CHAT

from ttt_e2e.inference.session import Session
from ttt_e2e.server.chat import ChatFormat
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.store import Store

GREEDY = {"temperature": 0, "max_tokens": 9}
HELLO = {"role": "user", "content": "Who?"}


class Service(NamedTuple):
    url: str  # of the API
    id: str  # a session
    session: Session  # what it holds

    def completion(self, prompt: str, *, alone: bool = True) -> str:
        """The text that follows the prompt, after what the session holds or alone."""
        return "".join((TEMPLATE if alone else self.session).generate(prompt, **GREEDY))

    def answer(self, *messages: dict[str, str], alone: bool = True) -> str:
        """What follows messages."""
        prompt = ChatFormat().prompt([*messages], "nothing" if alone else "text")
        assert isinstance(prompt, str)
        return self.completion(prompt, alone=alone)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    session, text = TEMPLATE.fork(), text_of(1)
    session.read(text)
    with served(Engine(TEMPLATE.fork(), Store(tmp_path_factory.mktemp("sessions")))) as address:
        with client_at(address) as client:
            id = client.post("/v1/sessions").json()["id"]
            client.post(f"/v1/sessions/{id}/read", content=text.encode(), headers=PLAIN_TEXT)
        yield Service(f"{address}/v1", id, session)


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    HELLO,
    {"role": "assistant", "content": " Anna."},
    {"role": "user", "content": "Where?"},
]


# -- LangChain ---------------------------------------------------------------------------------------------------------


def test_langchain_chat_model(service: Service) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    settings = dict(model="tiny", base_url=service.url, api_key="none", max_retries=0, **GREEDY)
    chat = langchain.ChatOpenAI(**settings)
    message, expected = chat.invoke("Who?"), service.answer(HELLO)
    assert message.text == expected and message.usage_metadata["output_tokens"] == 9
    assert message.response_metadata["finish_reason"] == "length"
    parts = list(chat.stream("Who?"))
    assert "".join(part.text for part in parts) == expected and len(parts) > 3
    assert [one.text for one in chat.batch(["Who?", "Where?"])] == [expected, service.answer(CONVERSATION[-1])]
    assert chat.invoke(CONVERSATION).text == service.answer(*CONVERSATION) != expected

    remembering = langchain.ChatOpenAI(extra_body={"session": service.id}, **settings)
    recalled = service.answer(HELLO, alone=False)
    assert remembering.invoke("Who?").text == recalled != expected
    assert "".join(part.text for part in remembering.stream("Who?")) == recalled
    assert remembering.batch(["Who?"])[0].text == recalled
    with pytest.raises(Exception, match="no such session") as caught:
        chat.bind(extra_body={"session": "sess-" + 32 * "0"}).invoke("Who?")
    assert caught.value.status_code == 404


def test_langchain_completion_model(service: Service) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    settings = dict(model="tiny", base_url=service.url, api_key="none", max_retries=0, **GREEDY)
    model, expected = langchain.OpenAI(**settings), service.completion("The")
    assert model.invoke("The") == "".join(model.stream("The")) == expected
    assert model.batch(["The", "Die"]) == [expected, service.completion("Die")]
    remembering = langchain.OpenAI(extra_body={"session": service.id}, **settings)
    assert remembering.invoke("The") == service.completion("The", alone=False) != expected


class Weather(BaseModel):
    """How the weather is."""

    place: Literal["Rome", "Oslo"]
    wet: bool


def test_langchain_structured_output_and_tools(tmp_path: Path) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

    with served(Engine(TEMPLATE.fork(), Store(tmp_path)), chat=SHORT_CHAT) as address:
        settings = dict(model="tiny", base_url=f"{address}/v1", api_key="none", max_retries=0, max_tokens=99, seed=1)
        chat = langchain.ChatOpenAI(**settings)
        for method in ("json_schema", "function_calling"):
            assert isinstance(chat.with_structured_output(Weather, method=method).invoke("How?"), Weather)
        assert isinstance(chat.with_structured_output(Weather.model_json_schema(), strict=True).invoke("How?"), dict)
        schema = {"title": "Weather", **Weather.model_json_schema(), "additionalProperties": False}
        model = chat.bind_tools([Weather, schema | {"title": "Time"}], tool_choice="Weather")
        message = model.invoke("How?")
        (call,) = message.tool_calls
        assert call["name"] == "Weather" and Weather(**call["args"])
        whole: Any = None
        for part in model.stream("How?"):
            whole = part if whole is None else whole + part
        assert isinstance(whole, AIMessage) and whole.tool_calls[0]["args"] == call["args"]
        # An agent's turn: its question, the call, and the result.
        result = ToolMessage("wet", tool_call_id=call["id"])
        answer = chat.bind_tools([Weather]).bind(max_tokens=3).invoke([HumanMessage("How?"), message, result])
        assert answer.usage_metadata["input_tokens"] > message.usage_metadata["input_tokens"]
        responses = langchain.ChatOpenAI(**settings | {"seed": None}, use_responses_api=True, extra_body={"seed": 1})
        assert isinstance(responses.with_structured_output(Weather).invoke("How?"), Weather)
        (call,) = responses.bind_tools([Weather], tool_choice="Weather").invoke("How?").tool_calls
        assert Weather(**call["args"])


# -- LiteLLM -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it downloads a list of prices when it is imported
    return pytest.importorskip("litellm", reason="the extra clients is not installed")


def test_litellm(service: Service, litellm: Any) -> None:
    settings = dict(model="openai/tiny", api_base=service.url, api_key="none", max_retries=0, **GREEDY)
    done, expected = litellm.completion(messages=[HELLO], **settings), service.answer(HELLO)
    assert done.choices[0].message.content == expected and done.usage.completion_tokens == 9
    assert done.choices[0].finish_reason == "length"
    parts = list(litellm.completion(messages=[HELLO], stream=True, **settings))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected and len(parts) > 3
    whole = litellm.completion(messages=CONVERSATION, **settings)
    assert whole.choices[0].message.content == service.answer(*CONVERSATION)

    recalled = service.answer(HELLO, alone=False)
    for memory in ({"extra_body": {"session": service.id}}, {"session": service.id}):
        remembering = litellm.completion(messages=[HELLO], **memory, **settings)
        assert remembering.choices[0].message.content == recalled != expected
    with pytest.raises(litellm.NotFoundError, match="no such session"):
        litellm.completion(messages=[HELLO], session="sess-" + 32 * "0", **settings)


def test_litellm_text_completion(service: Service, litellm: Any) -> None:
    settings = dict(model="text-completion-openai/tiny", api_base=service.url, api_key="none", **GREEDY)
    expected = service.completion("The")
    assert litellm.text_completion(prompt="The", **settings).choices[0].text == expected
    parts = litellm.text_completion(prompt="The", stream=True, **settings)
    assert "".join(part.choices[0].text or "" for part in parts) == expected
