"""Responses and conversations with OpenAI's official client, over a real engine: what they say, keep and learn."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

import httpx
from engine_helpers import STORY, TEMPLATE, TOKENIZER
from server_helpers import FakeEngine, TestClient, client_at, client_of, error_of, parse_events, served, words

from ttt_e2e.inference.divergence import Diverged
from ttt_e2e.server.api import documents
from ttt_e2e.server.chat import ChatFormat
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.store import Store
from ttt_e2e.server.keys import Keys

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")

KEYS = {"anna": "a-long-key-of-anna", "ben": "a-long-key-of-ben"}
SHORT: dict[str, Any] = {"model": "tiny", "max_output_tokens": 6, "temperature": 0}
HELLO = "The rain had stopped"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    engine = Engine(TEMPLATE.fork(), Store(tmp_path_factory.mktemp("store")))
    with served(engine, keys=Keys(KEYS)) as address:
        yield address


@pytest.fixture(scope="module")
def anna(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEYS["anna"], max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def ben(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEYS["ben"], max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
def delete_sessions(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "anna" in request.fixturenames:
        official = request.getfixturevalue("anna")
        for one in official.get("/sessions", cast_to=object)["data"]:
            official.delete(f"/sessions/{one['id']}", cast_to=object)


def session_of(official: Any, id: str) -> dict[str, Any]:
    """The session behind a response or conversation."""
    found: dict[str, Any] = official.get(f"/sessions/sess-{id[5:]}", cast_to=object)
    return found


def learned(official: Any, *turns: str) -> tuple[list[str], dict[str, Any]]:
    """The answers to `turns` in a session that learns from each, by chat completions, and the session."""
    session, texts = official.post("/sessions", cast_to=object)["id"], []
    body = {"model": "tiny", "max_tokens": SHORT["max_output_tokens"], "temperature": 0}
    for turn in turns:
        messages = [{"role": "user", "content": turn}]
        memory = {"session": session, "learn": True}
        whole = official.chat.completions.create(messages=messages, **body, extra_body=memory)
        texts.append(whole.choices[0].message.content)
    return texts, official.get(f"/sessions/{session}", cast_to=object)


# -- responses ---------------------------------------------------------------------------------------------------------


def test_a_response_and_one_that_follows_it_learn_as_a_session_does(anna: Any) -> None:
    texts, session = learned(anna, HELLO, "And then?")
    first = anna.responses.create(input=HELLO, **SHORT, metadata={"chapter": "1"})
    second = anna.responses.create(
        input=[{"role": "user", "content": [{"type": "input_text", "text": "And then?"}]}],
        previous_response_id=first.id,
        **SHORT,
    )
    assert [first.output_text, second.output_text] == texts
    assert session_of(anna, second.id)["text_digest"] == session["text_digest"]
    before = session_of(anna, first.id)
    assert before["tokens"] < session["tokens"]
    other = anna.responses.create(input="No, another.", previous_response_id=first.id, **SHORT)
    assert session_of(anna, first.id) == before != session_of(anna, other.id)

    assert (first.object, first.status, first.metadata) == ("response", "incomplete", {"chapter": "1"})
    assert first.incomplete_details.reason == "max_output_tokens" and first.store
    assert (first.temperature, first.max_output_tokens, second.previous_response_id) == (0, 6, first.id)
    prompt = TOKENIZER.encode(f"User: {HELLO}\nAssistant:")
    assert (first.usage.input_tokens, first.usage.output_tokens) == (len(prompt), 6)
    assert first.usage.total_tokens == len(prompt) + 6
    assert anna.responses.retrieve(first.id).to_dict() == first.to_dict()
    (item,) = anna.responses.input_items.list(first.id)
    assert item.role == "user" and item.content[0].text == HELLO
    anna.responses.delete(first.id)
    for call in (anna.responses.retrieve, anna.responses.delete, anna.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="no such response"):
            call(first.id)
    assert anna.responses.create(input="On", previous_response_id=second.id, **SHORT).output_text


def test_a_reference_is_the_item_that_it_names(anna: Any, ben: Any) -> None:
    """The AI SDK sends answers back by their ids."""
    first = anna.responses.create(input=HELLO, **SHORT)
    said = [{"role": "user", "content": HELLO}, *first.output, {"role": "user", "content": "And?"}]
    again = anna.responses.create(input=said, **SHORT)
    reference = {"type": "item_reference", "id": first.output[0].id}
    named = anna.responses.create(input=[said[0], reference, said[2]], **SHORT)
    assert (named.output_text, named.usage) == (again.output_text, again.usage)
    items = list(anna.responses.input_items.list(named.id, order="asc"))
    assert items[1].id == first.output[0].id and items[1].content[0].text == first.output_text
    conversation = anna.conversations.create(items=[said[0], reference])
    answer = anna.responses.create(input="And?", conversation=conversation.id, **SHORT)
    assert answer.output_text == again.output_text
    for user, id in ((ben, first.output[0].id), (anna, f"{first.output[0].id}00"), (anna, "msg_0"), (anna, "")):
        for call in (
            lambda user=user, id=id: user.responses.create(input=[said[0], {**reference, "id": id}], **SHORT),
            lambda user=user, id=id: user.conversations.create(items=[{**reference, "id": id}]),
        ):
            with pytest.raises(openai.NotFoundError, match=r"(input|items): no stored response has the item"):
                call()


def test_references_read_each_response_once(anna: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation may have many items of few responses, and a stored response may be long."""
    read: list[str] = []
    load = documents.load_document

    async def counted(engine: Any, owner: str, kind: Any, id: str, param: str | None = None) -> Any:
        read.append(id)
        return await load(engine, owner, kind, id, param)

    first, second = (anna.responses.create(input=text, **SHORT) for text in (HELLO, "And then?"))
    monkeypatch.setattr(documents, "load_document", counted)
    references = [{"type": "item_reference", "id": one.output[0].id} for one in (first, second, first, second, first)]
    named = anna.responses.create(input=references, **SHORT)
    assert sorted(read) == sorted([first.id, second.id])
    texts = [item.content[0].text for item in anna.responses.input_items.list(named.id, order="asc")]
    assert texts == [first.output_text, second.output_text, first.output_text, second.output_text, first.output_text]


def test_events_come_in_openais_order(anna: Any) -> None:
    whole = anna.responses.create(input=HELLO, **SHORT)
    events = list(anna.responses.create(input=HELLO, **SHORT, stream=True))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert deltas > 1 and kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events[4 : 4 + deltas]) == whole.output_text
    assert {event.item_id for event in events[3:-2]} == {events[-1].response.output[0].id}
    assert [events[i].response.status for i in (0, 1, -1)] == ["in_progress", "in_progress", "incomplete"]
    assert events[0].response.output == [] and events[0].response.id == events[-1].response.id
    assert anna.responses.retrieve(events[-1].response.id).to_dict() == events[-1].response.to_dict()


def test_the_client_puts_the_events_of_a_complete_response_together(engine: FakeEngine) -> None:
    chat = ChatFormat()
    chat.stop = ("w2ä",)
    with (
        served(engine, chat=chat) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as official,
        official.responses.stream(model="tiny", input=HELLO) as stream,
    ):
        response = stream.get_final_response()
    assert (response.status, response.incomplete_details) == ("completed", None)
    assert response.output_text == words(2) and response.output[0].status == "completed"


def test_a_response_that_is_not_stored_leaves_nothing(anna: Any) -> None:
    first = anna.responses.create(input=HELLO, **SHORT)
    kept = anna.get("/sessions", cast_to=object)["data"]
    for more in ({}, {"previous_response_id": first.id}):
        response = anna.responses.create(input=HELLO, **SHORT, **more, store=False)
        assert response.output_text and not response.store
        with pytest.raises(openai.NotFoundError):
            anna.responses.retrieve(response.id)
        with pytest.raises(openai.NotFoundError) as caught:
            anna.responses.create(input="x", previous_response_id=response.id, **SHORT)
        assert caught.value.param == "previous_response_id"
    assert anna.get("/sessions", cast_to=object)["data"] == kept


def test_instructions_are_for_one_response(anna: Any) -> None:
    first = anna.responses.create(input=HELLO, instructions="Be kind to everybody. " * 9, **SHORT)
    plain = TOKENIZER.encode(f"User: {HELLO}\nAssistant:")
    told = TOKENIZER.encode(f"System: {'Be kind to everybody. ' * 9}\nUser: {HELLO}\nAssistant:")
    assert first.usage.input_tokens == len(told)
    assert session_of(anna, first.id)["tokens"] == 1 + len(plain) + 6  # with BOS
    with client_of(engine := FakeEngine()) as client:
        made = client.post("/v1/responses", json={"input": "a", "instructions": "b", "max_output_tokens": 1}).json()
        assert engine.calls[0].prompt == "System: b\nUser: a\nAssistant:"
        assert engine.all["sess-" + made["id"][5:]].text == "User: a\nAssistant: w1ä"


def test_users_never_reach_what_others_have(anna: Any, ben: Any) -> None:
    response = anna.responses.create(input=HELLO, **SHORT)
    conversation = anna.conversations.create(items=[{"role": "user", "content": "My secret."}])
    item = anna.conversations.items.list(conversation.id).data[0].id
    for call in (
        lambda: ben.responses.retrieve(response.id),
        lambda: ben.responses.delete(response.id),
        lambda: ben.responses.input_items.list(response.id),
        lambda: ben.responses.create(input="x", previous_response_id=response.id, **SHORT),
        lambda: ben.responses.create(input="x", conversation=conversation.id, **SHORT),
        lambda: ben.conversations.retrieve(conversation.id),
        lambda: ben.conversations.update(conversation.id, metadata={}),
        lambda: ben.conversations.delete(conversation.id),
        lambda: ben.conversations.items.list(conversation.id),
        lambda: ben.conversations.items.create(conversation.id, items=[]),
        lambda: ben.conversations.items.retrieve(item, conversation_id=conversation.id),
        lambda: ben.conversations.items.delete(item, conversation_id=conversation.id),
    ):
        with pytest.raises(openai.NotFoundError, match="There is no such"):
            call()
    assert ben.get("/sessions", cast_to=object)["data"] == []
    assert len(anna.conversations.items.list(conversation.id).data) == 1 and anna.responses.retrieve(response.id)


def test_streams_of_two_users_at_once_do_not_mix(anna: Any, ben: Any) -> None:
    inputs = [f"{name}: {word} {STORY}" for name in ("anna", "ben") for word in ("wet", "rain")]
    officials = [anna, anna, ben, ben]
    expected = [
        official.responses.create(input=text, **SHORT, store=False).output_text
        for official, text in zip(officials, inputs, strict=True)
    ]
    found = [""] * 4

    def stream(index: int) -> None:
        for event in officials[index].responses.create(input=inputs[index], **SHORT, store=False, stream=True):
            if event.type == "response.output_text.delta":
                found[index] += event.delta

    threads = [threading.Thread(target=stream, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


# -- conversations -----------------------------------------------------------------------------------------------------


def test_a_conversation_is_a_session_that_reads_its_items_and_responses(anna: Any) -> None:
    texts, session = learned(anna, HELLO, "And then?")
    conversation = anna.conversations.create(metadata={"about": "rain"})
    first = anna.responses.create(input=HELLO, conversation=conversation.id, **SHORT)
    (added,) = anna.conversations.items.create(
        conversation.id, items=[{"type": "message", "role": "user", "content": "And then?"}]
    ).data
    assert added.content[0].text == "And then?"
    second = anna.responses.create(conversation={"id": conversation.id}, **SHORT, store=False)
    assert [first.output_text, second.output_text] == texts
    assert session_of(anna, conversation.id)["text_digest"] == session["text_digest"]
    assert first.conversation.id == second.conversation.id == conversation.id
    assert session_of(anna, first.id)["tokens"] < session["tokens"]

    found = [*anna.conversations.items.list(conversation.id, order="asc", limit=3)]  # in two pages
    said = [(item.role, item.content[0].text) for item in found]
    assert said == [("user", HELLO), ("assistant", texts[0]), ("user", "And then?"), ("assistant", texts[1])]
    assert [*anna.conversations.items.list(conversation.id)] == found[::-1]
    assert anna.conversations.items.retrieve(found[1].id, conversation_id=conversation.id) == found[1]
    with pytest.raises(openai.BadRequestError, match="cannot forget it"):
        anna.conversations.items.delete(found[0].id, conversation_id=conversation.id)


def test_reasoning_of_another_model_is_left_out(client: TestClient) -> None:
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}
    items = [reasoning, {"role": "user", "content": HELLO}]
    id = client.post("/v1/conversations", json={"items": items}).json()["id"]
    added = client.post(f"/v1/conversations/{id}/items", json={"items": items}).json()["data"]
    assert [item["type"] for item in added] == ["message"]
    assert len(client.get(f"/v1/conversations/{id}/items").json()["data"]) == 2
    error = error_of(client.post("/v1/responses", json={"input": [reasoning]}), 400)
    assert error["param"] == "input" and "nothing to answer" in error["message"]


def test_official_conversations(anna: Any) -> None:
    items = [{"role": role, "content": "x"} for role in ("user", "assistant", "developer")]
    conversation = anna.conversations.create(items=items, metadata={"a": "b"})
    assert conversation.object == "conversation" and conversation.metadata == {"a": "b"}
    assert anna.conversations.retrieve(conversation.id) == conversation
    assert anna.conversations.update(conversation.id, metadata={"c": "d"}).metadata == {"c": "d"}
    assert anna.conversations.retrieve(conversation.id).metadata == {"c": "d"}
    last, *_ = anna.conversations.items.list(conversation.id).data
    anna.conversations.items.delete(last.id, conversation_id=conversation.id)
    assert [item.role for item in anna.conversations.items.list(conversation.id)] == ["assistant", "user"]
    deleted = anna.conversations.delete(conversation.id)
    assert (deleted.id, deleted.deleted) == (conversation.id, True)
    with pytest.raises(openai.NotFoundError, match="no such conversation"):
        anna.conversations.retrieve(conversation.id)


def test_a_session_that_has_read_a_text_is_a_conversation(anna: Any, address: str) -> None:
    session = anna.post("/sessions", cast_to=object)["id"]
    headers = {"authorization": f"Bearer {KEYS['anna']}", "content-type": "text/plain"}
    httpx.post(f"{address}/v1/sessions/{session}/read", content=(STORY * 3).encode(), headers=headers)
    body = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    messages = [{"role": "user", "content": HELLO}]
    whole = anna.chat.completions.create(messages=messages, **body, extra_body={"session": session})
    for id in (session, f"conv_{session[5:]}"):
        response = anna.responses.create(input=HELLO, conversation=id, **SHORT)
        assert response.conversation.id == f"conv_{session[5:]}"
        if id == session:
            assert response.output_text == whole.choices[0].message.content
    assert len(anna.conversations.items.list(f"conv_{session[5:]}").data) == 4


def test_a_response_is_no_conversation_and_a_conversation_no_response(anna: Any) -> None:
    response, conversation = anna.responses.create(input=HELLO, **SHORT), anna.conversations.create()
    with pytest.raises(openai.NotFoundError):
        anna.conversations.retrieve(f"conv_{response.id[5:]}")
    with pytest.raises(openai.NotFoundError):
        anna.responses.retrieve(f"resp_{conversation.id[5:]}")


# -- what stays --------------------------------------------------------------------------------------------------------


def test_responses_and_conversations_survive_a_restart(tmp_path: Path) -> None:
    with client_of(Engine(TEMPLATE.fork(), Store(tmp_path))) as client:
        conversation = client.post("/v1/conversations", json={"items": [{"role": "user", "content": HELLO}]}).json()
        body = {"conversation": conversation["id"], **SHORT}
        response = client.post("/v1/responses", json=body).json()
        unread = {"items": [{"role": "user", "content": "And then?"}]}
        client.post(f"/v1/conversations/{conversation['id']}/items", json=unread)
        path = f"/v1/conversations/{conversation['id']}/items"
        items = client.get(path).json()
    with client_of(Engine(TEMPLATE.fork(), Store(tmp_path))) as client:
        assert client.get(f"/v1/responses/{response['id']}").json() == response
        assert client.get(path).json() == items and len(items["data"]) == 3
        after = client.post("/v1/responses", json={"previous_response_id": response["id"], "input": "x", **SHORT})
        assert after.status_code == 200
        again = client.post("/v1/responses", json=body).json()
        prompt = TOKENIZER.encode("\nUser: And then?\nAssistant:")
        assert again["usage"]["input_tokens"] == len(prompt)


def test_responses_at_the_limit_take_no_room_from_each_other(tmp_path: Path) -> None:
    engine = Engine(TEMPLATE.fork(), Store(tmp_path), max_sessions=3)
    with (
        served(engine) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as official,
        ThreadPoolExecutor(8) as pool,
    ):
        made = list(pool.map(lambda number: official.responses.create(input=f"{number}", **SHORT).id, range(32)))
        kept = {one["id"] for one in official.get("/sessions", cast_to=object)["data"]}
    assert len(kept) == 3 and kept < {f"sess-{id[5:]}" for id in made}


def test_a_response_takes_the_place_of_the_oldest_one_at_the_limit(tmp_path: Path) -> None:
    with client_of(Engine(TEMPLATE.fork(), Store(tmp_path), max_sessions=3)) as client:

        def respond(**body: Any) -> str:
            answer = client.post("/v1/responses", json={"input": "x", **SHORT, **body})
            assert answer.status_code == 200, answer.text
            id: str = answer.json()["id"]
            return id

        def kept(*ids: str) -> list[bool]:
            return [client.get(f"/v1/responses/{id}").status_code == 200 for id in ids]

        session = client.post("/v1/sessions").json()["id"]
        first, second = respond(), respond()
        third = respond(previous_response_id=first)  # from which it continues, so that the second one goes
        assert kept(first, second, third) == [True, False, True]
        respond(store=False)
        fourth = respond()
        assert kept(first, third, fourth) == [False, True, True]
        for id in (third, fourth):
            client.delete(f"/v1/responses/{id}")
        conversations = [client.post("/v1/conversations", json={}).json()["id"] for _ in range(2)]
        for stream in (False, True):
            error = error_of(client.post("/v1/responses", json={"input": "x", "stream": stream, **SHORT}), 400)
            assert error["code"] == "limit_reached" and "delete one" in error["message"]
        respond(store=False)
        error_of(client.post("/v1/conversations", json={}), 400)
        assert client.get(f"/v1/sessions/{session}").status_code == 200
        assert all(client.get(f"/v1/conversations/{id}").status_code == 200 for id in conversations)


def test_a_response_that_fails_or_is_abandoned_leaves_nothing(client: TestClient, engine: FakeEngine) -> None:
    conversation = client.post("/v1/conversations", json={}).json()["id"]
    body = {"input": "x", "conversation": conversation}
    engine.failure = Diverged("Learning diverged.", 5)
    assert error_of(client.post("/v1/responses", json=body), 422)["code"] == "diverged"
    engine.fail_from = 3
    response = client.post("/v1/responses", json={**body, "stream": True})
    events = [event.partition("\n") for event in response.text.removesuffix("\n\n").split("\n\n")]
    assert events[-1][0] == "event: error" and "[DONE]" not in response.text
    (last,) = parse_events(events[-1][2] + "\n\n")
    assert (last["type"], last["code"], last["message"]) == ("error", "diverged", "Learning diverged.")
    assert last["sequence_number"] == len(events) - 1
    assert [*engine.all] == ["sess-" + conversation[5:]]
    assert client.get(f"/v1/conversations/{conversation}/items").json()["data"] == []
    engine.failure, engine.hold_from = None, 2
    with served(engine) as address, client_at(address) as other:
        with other.stream("POST", "/v1/responses", json={**body, "stream": True}) as stream:
            next(stream.iter_lines())
        engine.hold_from = 1e9
        other.post("/v1/responses", json={**body, "store": False, "max_output_tokens": 1})  # once the lock is free
    assert len(client.get(f"/v1/conversations/{conversation}/items").json()["data"]) == 2
    assert [*engine.all] == ["sess-" + conversation[5:]]
