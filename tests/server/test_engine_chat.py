"""Conversations in sessions of a real engine: what a session has read is what transformers gives for the whole."""

import functools
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from helpers import small_model

pytest.importorskip("transformers", reason="the transformers library is not installed")
pytest.importorskip("jinja2", reason="Jinja is not installed")

from chat_families import FAMILIES, transformers_tokenizer
from engine_helpers import generate, read, with_engine
from server_helpers import FakeEngine, client_of

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.inference.session import Session
from ttt_e2e.server.chat import ChatFormat
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.records import GenerateRequest

TURNS = ("Hello there", "And 7?", "日本?")
TEXT = "The rain in Spain.\n"


def template_of(name: str) -> Session:
    tokenizer = Tokenizer(FAMILIES[name].backend())
    return Session(small_model(vocab_size=tokenizer.vocab_size).requires_grad_(False), tokenizer)


def whole(name: str, turns: int) -> list[int]:
    """A conversation with empty answers, which ends with the question of a turn."""
    messages = [{"role": "assistant", "content": ""}] * (2 * turns - 1)
    messages[::2] = [{"role": "user", "content": text} for text in TURNS[:turns]]
    ids: list[int] = transformers_tokenizer(name).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    return ids


async def say(engine: Engine, chat: ChatFormat, id: str, text: str, learn: bool = True) -> int:
    """Let the session answer with nothing; returns the number of tokens of the prompt."""
    prompt = functools.partial(chat.prompt, [{"role": "user", "content": text}])
    slot = await engine.sessions.slot("me", id)
    request = GenerateRequest(prompt, max_tokens=0, learn=learn, closing=chat.closing())
    return [chunk.prompt_tokens async for chunk in engine.generate(slot, request)][-1]


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5", "llama3", "mistral"])
def test_session_holds_the_whole_conversation(name: str, tmp_path: Path) -> None:
    """Also if it is forked, written to a file and imported between two messages, and asked without learning."""
    template, chat = template_of(name), FAMILIES[name].chat()

    async def work(engine: Engine) -> None:
        id = (await engine.sessions.create("me")).id
        for turn, text in enumerate(TURNS, start=1):
            read_before = (await engine.sessions.summary("me", id)).tokens if turn > 1 else 0
            assert await say(engine, chat, id, text, learn=False) == len(whole(name, turn)) - read_before
            await say(engine, chat, id, text)
            id = (await engine.sessions.fork("me", id)).id
            await engine.sessions.export_session("me", id, tmp_path / f"{turn}")
            id = (await engine.sessions.import_session("me", tmp_path / f"{turn}")).id
        closing = list(chat.closing())
        expected = template.with_state(template.state()._replace(pending=np.array([], np.int64)))
        expected.read(np.array([*whole(name, len(TURNS)), *closing]))
        assert (await engine.sessions.summary("me", id)).text_digest == expected.info().text_digest

    with_engine(tmp_path / "data", work, template)


def test_first_chat_after_a_text_has_the_system_message(tmp_path: Path) -> None:
    """And the second one, after another text, has not."""
    template, chat = template_of("qwen2.5"), FAMILIES["qwen2.5"].chat()

    async def work(engine: Engine) -> None:
        id = (await engine.sessions.create("me")).id
        await read(engine, "me", id, TEXT)
        await say(engine, chat, id, TURNS[0])
        await read(engine, "me", id, TEXT)
        await say(engine, chat, id, TURNS[1])
        text, first = template.tokenizer.encode(TEXT), [*whole("qwen2.5", 1), *chat.closing()]
        expected = template.fork()
        expected.read(np.array([*text, *first, *text, *whole("qwen2.5", 2)[len(first) :], *chat.closing()]))
        assert (await engine.sessions.summary("me", id)).text_digest == expected.info().text_digest

    with_engine(tmp_path, work, template)


def test_plain_chat_follows_bos(tmp_path: Path) -> None:
    template, chat = template_of("falcon"), ChatFormat()

    async def work(engine: Engine) -> None:
        id = (await engine.sessions.create("me")).id
        for text in TURNS:
            await say(engine, chat, id, text)
        expected = template.fork()
        for i, text in enumerate(TURNS):
            expected.read("\n" * (i > 0) + f"User: {text}\nAssistant:")
        assert (await engine.sessions.summary("me", id)).text_digest == expected.info().text_digest
        assert await generate(engine, "me", id, "", max_tokens=0) == ("", "length")

    with_engine(tmp_path, work, template)


def test_values_of_the_template_come_with_the_request() -> None:
    messages, values = [{"role": "user", "content": "Hi"}], {"enable_thinking": False}
    engine, theirs = FakeEngine(), transformers_tokenizer("qwen2.5")
    with client_of(engine, chat=FAMILIES["qwen2.5"].chat()) as client:
        body = {"messages": messages, "chat_template_kwargs": values, "max_tokens": 1}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        refused = client.post("/v1/chat/completions", json={**body, "chat_template_kwargs": {"tools": [1]}})
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **values)
    assert engine.calls[0].prompt == "".join(map(str, expected))
    assert refused.status_code == 400 and "messages.0" in refused.json()["error"]["message"]
