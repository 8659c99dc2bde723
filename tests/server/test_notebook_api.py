"""Notebooks over HTTP: created, searched, and named as sources of answers in each API's own form."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from engine_helpers import TEMPLATE
from server_helpers import (
    PLAIN_TEXT,
    FakeEngine,
    FakeSession,
    TestClient,
    client_of,
    error_of,
    parse_events,
    served,
    words,
)

from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.store import Store

MOBY = "Call me Ishmael."
SOURCE = {"document": "moby.txt", "start": 0, "stop": 16, "length": 16, "text": MOBY, "score": 1.5}
ASK = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ishmael. Who?"}]}
SHOWN = f"[{MOBY}]Ishmael. Who?"


@pytest.fixture
def session(client: TestClient) -> str:
    """The id of a session with a notebook that has read a text."""
    id: str = client.post("/v1/sessions", json={"notebook": True}).json()["id"]
    answer = client.post(f"/v1/sessions/{id}/read?name=moby.txt", content=MOBY, headers=PLAIN_TEXT)
    assert answer.json()["session"]["notebook"] == {"characters": 16, "bytes": 32, "documents": ["moby.txt"]}
    return id


def test_chat_and_completions_have_sources(client: TestClient, engine: FakeEngine, session: str) -> None:
    body = {"session": session, "max_tokens": 2}
    message = client.post("/v1/chat/completions", json=ASK | body).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": words(2), "refusal": None, "sources": [SOURCE]}
    assert engine.calls[-1].prompt == f"\nSystem: Be brief.\nUser: {SHOWN}\nAssistant:"
    parts = [{"type": "text", "text": "Ishmael."}, {"type": "text", "text": "Who?"}]
    client.post("/v1/chat/completions", json=body | {"messages": [{"role": "user", "content": parts}]})
    assert engine.calls[-1].prompt == f"\nUser: [{MOBY}]Ishmael.\nWho?\nAssistant:"
    stream = client.post("/v1/chat/completions", json=ASK | body | {"stream": True, "n": 2})
    choices = [event["choices"][0] for event in parse_events(stream.text)[:-1]]
    starts = [choice for choice in choices if "sources" in choice["delta"]]
    assert sorted(start["index"] for start in starts) == [0, 1]
    assert all(start["delta"]["sources"] == [SOURCE] and start["delta"]["content"] == "" for start in starts)

    for path in ("/v1/completions", f"/v1/sessions/{session}/completions"):
        prompts = {"prompt": ["Ishmael. Who?", "nobody"], "max_tokens": 2}
        more = {} if "sessions" in path else {"session": session}
        choices = client.post(path, json=prompts | more).json()["choices"]
        assert [choice["sources"] for choice in choices] == [[SOURCE], []]
        assert sorted(call.prompt for call in engine.calls[-2:]) == sorted([SHOWN, "nobody"])
        streamed = client.post(path, json={"prompt": "Ishmael.", "stream": True, "max_tokens": 2} | more)
        events = parse_events(streamed.text)
        assert events[0]["choices"][0]["sources"] == [SOURCE] and "sources" not in events[-2]["choices"][0]


def test_a_session_that_learns_keeps_the_question_alone(client: TestClient, engine: FakeEngine, session: str) -> None:
    body = {"session": session, "learn": True, "max_tokens": 1}
    client.post("/v1/completions", json=body | {"prompt": " Ishmael."})
    assert engine.calls[-1].prompt == f"[{MOBY}] Ishmael."
    assert engine.all[session].text == "Call me Ishmael. Ishmael. w1ä"


@pytest.mark.parametrize("stream", [False, True])
def test_responses_cite_files(client: TestClient, engine: FakeEngine, session: str, stream: bool) -> None:
    body = {"input": "Ishmael. Who?", "instructions": "Be brief.", "conversation": session, "max_output_tokens": 2}
    answer = client.post("/v1/responses", json=body | {"stream": stream})
    citation = {"type": "file_citation", "file_id": session, "filename": "moby.txt", "index": len(words(2))}
    response = answer.json() if not stream else None
    if stream:
        events = [line for line in answer.text.split("\n\n") if line]
        kinds = [event.partition("\n")[0].removeprefix("event: ") for event in events]
        assert kinds.count("response.output_text.annotation.added") == 1
        assert kinds.index("response.output_text.annotation.added") < kinds.index("response.output_text.done")
        response = json.loads(events[-1].partition("data: ")[2])["response"]
    assert response["sources"] == [SOURCE] and response["output"][0]["content"][0]["annotations"] == [citation]
    assert SHOWN in engine.calls[-1].prompt and "brief" in engine.calls[-1].prompt
    assert MOBY not in engine.all[session].text.removeprefix(MOBY) and "brief" not in engine.all[session].text
    # The stored response shares the notebook, so that the next one has it too.
    follow = {"input": "Ishmael?", "previous_response_id": response["id"], "max_output_tokens": 2}
    assert client.post("/v1/responses", json=follow | {"input": "me Ishmael."}).json()["sources"] == [SOURCE]
    assert client.get(f"/v1/responses/{response['id']}").json() == response
    assert client.post("/v1/responses", json=body | {"notebook": False}).json()["sources"] is None


def test_messages_have_anthropics_citations(client: TestClient, session: str) -> None:
    body = {"messages": ASK["messages"][1:], "session": session, "max_tokens": 2}
    citation = {"type": "char_location", "cited_text": MOBY, "document_index": 0, "document_title": "moby.txt"}
    citation |= {"start_char_index": 0, "end_char_index": 16}
    (block,) = client.post("/v1/messages", json=body).json()["content"]
    assert block == {"type": "text", "text": words(2), "citations": [citation]}
    text = client.post("/v1/messages", json=body | {"stream": True}).text
    assert text.count('"citations_delta"') == 1 and MOBY in text
    assert "citations" not in client.post("/v1/messages", json=body | {"notebook": False}).json()["content"][0]


def test_recall(client: TestClient, session: str) -> None:
    path = f"/v1/sessions/{session}/recall"
    assert client.post(path, json={"query": "Call"}).json() == {"object": "list", "data": [SOURCE]}
    assert client.post(path, json={"query": "nobody", "count": 20}).json()["data"] == []
    plain = client.post("/v1/sessions").json()["id"]
    error = error_of(client.post(f"/v1/sessions/{plain}/recall", json={"query": "x"}), 400)
    assert (error["code"], error["param"]) == ("no_notebook", "session")


def test_bad_fields_are_refused_by_name(client: TestClient, engine: FakeEngine, session: str) -> None:
    plain = client.post("/v1/sessions").json()["id"]
    completion = {"prompt": "Ishmael.", "max_tokens": 1}
    for path, body, param in (
        ("/v1/sessions", {"notebook": 1}, "notebook"),
        ("/v1/sessions", {"surprise": 1}, "surprise"),
        (f"/v1/sessions/{session}/recall", {}, "query"),
        (f"/v1/sessions/{session}/recall", {"query": "x", "count": 0}, "count"),
        (f"/v1/sessions/{session}/recall", {"query": "x", "count": 21}, "count"),
        (f"/v1/sessions/{session}/recall", {"query": "x" * 2001}, "query"),
        (f"/v1/sessions/{session}/recall", {"query": "x", "surprise": 1}, "surprise"),
        ("/v1/completions", completion | {"notebook": True}, "notebook"),
        ("/v1/completions", completion | {"notebook": True, "session": plain}, "notebook"),
        ("/v1/completions", completion | {"notebook": "yes", "session": session}, "notebook"),
        ("/v1/completions", completion | {"notebook": True, "session": session, "echo": True}, "notebook"),
        ("/v1/completions", {"prompt": [5], "notebook": True, "session": session}, "notebook"),
        ("/v1/completions", completion | {"passages": 0, "session": session}, "passages"),
        ("/v1/completions", completion | {"passages": 21, "session": session}, "passages"),
        ("/v1/completions", completion | {"passages": 2, "session": plain}, "passages"),
        ("/v1/completions", completion | {"passages": 2, "notebook": False, "session": session}, "passages"),
        ("/v1/chat/completions", ASK | {"notebook": True}, "notebook"),
        ("/v1/responses", {"input": "x", "notebook": True}, "notebook"),
        (f"/v1/sessions/{session}/read?name={'x' * 201}", {}, "name"),
    ):
        assert error_of(client.post(path, json=body), 400)["param"] == param, (path, body)
    message = {"messages": ASK["messages"][1:], "max_tokens": 1, "notebook": True}
    assert client.post("/v1/messages", json=message).json()["error"]["message"].startswith("notebook")
    assert engine.calls == []
    for body in (completion | {"echo": True, "session": session}, {"prompt": [5], "session": session, "max_tokens": 1}):
        assert "sources" not in client.post("/v1/completions", json=body).json()["choices"][0]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with client_of(Engine(TEMPLATE.fork(), Store(tmp_path_factory.mktemp("data")))) as client:
        yield client


def test_a_book_is_uploaded_searched_and_exported(real: TestClient, tmp_path: Path) -> None:
    """With the real engine, by a form, whose file has a name."""
    id = real.post("/v1/sessions", json={"notebook": True}).json()["id"]
    story = "The rain had stopped. " * 5 + "The street was wet."
    read: dict[str, Any] = real.post(f"/v1/sessions/{id}/read", files={"file": ("story.txt", story)}).json()
    assert read["session"]["notebook"]["documents"] == ["story.txt"] and read["bytes"] == len(story)
    (found,) = real.post(f"/v1/sessions/{id}/recall", json={"query": "street", "count": 1}).json()["data"]
    assert found["document"] == "story.txt" and "street" in found["text"] and found["length"] == len(story)
    assert story[found["start"] : found["stop"]] == found["text"]
    choice = real.post("/v1/completions", json={"prompt": "rain", "session": id, "max_tokens": 2}).json()["choices"][0]
    assert "sources" in choice
    exported = real.get(f"/v1/sessions/{id}/export")
    assert f'filename="{id}.tar"' in exported.headers["content-disposition"]
    binary = {"content-type": "application/octet-stream"}
    made = real.post("/v1/sessions/import", content=exported.content, headers=binary).json()
    assert made["notebook"] == read["session"]["notebook"]
    fork = real.post(f"/v1/sessions/{id}/fork").json()
    assert real.delete(f"/v1/sessions/{id}").status_code == 200
    assert real.post(f"/v1/sessions/{fork['id']}/recall", json={"query": "street"}).json()["data"]


def test_official_clients_read_the_citations(engine: FakeEngine) -> None:
    openai, anthropic = pytest.importorskip("openai"), pytest.importorskip("anthropic")
    id = "sess-" + 32 * "a"
    engine.all[id] = FakeSession(id, "local", MOBY, notebook=[("moby.txt", MOBY)])
    ask = [{"role": "user", "content": "Ishmael?"}, {"role": "user", "content": "Call whom?"}]
    with (
        served(engine) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as first,
        anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as second,
    ):
        body = {"model": "tiny", "input": ask, "conversation": id, "max_output_tokens": 2}
        (annotation,) = first.responses.create(**body).output[0].content[0].annotations
        assert (annotation.type, annotation.file_id, annotation.filename) == ("file_citation", id, "moby.txt")
        (added,) = [one for one in first.responses.create(**body, stream=True) if "annotation" in one.type]
        assert added.annotation.filename == "moby.txt"
        answer = first.chat.completions.create(model="tiny", messages=ask, max_tokens=2, extra_body={"session": id})
        assert answer.choices[0].message.sources == [SOURCE]
        body = {"model": "tiny", "messages": ask, "max_tokens": 2, "extra_body": {"session": id}}
        whole = second.messages.create(**body)
        with second.messages.stream(**body) as stream:
            streamed = stream.get_final_message()
        for message in (whole, streamed):
            (citation,) = message.content[0].citations
            assert (citation.type, citation.document_title, citation.cited_text) == ("char_location", "moby.txt", MOBY)
