"""Anthropic's API: messages, as one response or as a stream."""

import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ttt_e2e.server.api.fields import MESSAGES, ignored_fields, ignored_header
from ttt_e2e.server.api.generations import Chunks, Generations, last_question
from ttt_e2e.server.api.schemas import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOKENS,
    RequestModel,
    SamplingRequest,
    Stop,
    Text,
    contradiction,
)
from ttt_e2e.server.api.streams import EVENT_STREAM, cancel_on_disconnect, event_stream
from ttt_e2e.server.engine.records import Before, Prompt, TextChunk
from ttt_e2e.server.errors import AnthropicErrorBody, anthropic_error

_MAX_STOPS = 16


class TextBlock(RequestModel):
    """A text. The other fields are those of blocks that Anthropic's API gives, and change nothing."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: Text
    cache_control: dict[str, Any] | None = None
    citations: list[Any] | None = None


_Content = Text | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True)]


class AnthropicMessage(RequestModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["user", "assistant", "system"]
    content: _Content


class MessagesRequest(SamplingRequest):
    """Answer `messages`. With a session they follow what it has read, so only new messages need to be sent.

    learn: make the messages and the answer part of the session.
    """

    messages: list[AnthropicMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: int = Field(ge=1, le=MAX_TOKENS)
    system: _Content | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=_MAX_STOPS, fail_fast=True)] | None = None
    session: str | None = None
    learn: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # variables of the chat template

    @model_validator(mode="after")
    def _check_combinations(self) -> "MessagesRequest":
        if self.messages[-1].role == "assistant":
            raise contradiction("messages", "messages: the last one is the assistant's; send one to answer after it.")
        if self.learn and self.session is None:
            raise contradiction("learn", "learn needs a session to learn in; send one, or omit learn.")
        return self

    def for_template(self) -> list[dict[str, Any]]:
        """Roles and contents, as chat templates expect them."""
        system = [] if self.system is None else [("system", self.system)]
        return [
            {"role": role, "content": [{"type": "text", "text": text} for text in _texts(content)]}
            for role, content in [*system, *((message.role, message.content) for message in self.messages)]
        ]


class Citation(BaseModel):
    """A passage of the session's notebook that the model was shown; document_index counts the documents cited."""

    type: Literal["char_location"]
    cited_text: str
    document_index: int
    document_title: str | None
    start_char_index: int
    end_char_index: int


class AnthropicText(BaseModel):
    """A generated text."""

    type: Literal["text"]
    text: str
    citations: list[Citation] | None = None


class AnthropicUsage(BaseModel):
    """Tokens of this request, without those of a session."""

    input_tokens: int
    output_tokens: int


class AnthropicAnswer(BaseModel):
    """A generated message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnthropicText]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence"] | None
    stop_sequence: str | None
    usage: AnthropicUsage


def routes(generations: Generations) -> APIRouter:
    """The endpoint /v1/messages."""
    router = APIRouter(prefix="/v1/messages", tags=["Anthropic"])
    responses: dict[int | str, dict[str, Any]] = {
        200: {"description": "JSON, or server-sent events with `stream`", "content": {EVENT_STREAM: {}}},
        "default": {"model": AnthropicErrorBody, "description": "An error"},
    }

    @router.post("", response_model=AnthropicAnswer, responses=responses)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation, as Anthropic's API does."""
        generations.check_model(body.model)
        headers = ignored_header(ignored_fields(body, MESSAGES))
        values, stops = body.chat_template_kwargs, body.stop_sequences or []
        question, asking = last_question(body.for_template())

        def prompt(text: str) -> Callable[[Before], Prompt]:
            return generations.chat_prompt(asking(text), values, "messages")

        arguments = {
            "id": body.session,
            **await generations.ask(request, body, body.session, question, prompt),
            "max_tokens": body.max_tokens,
            "stop": (*stops, *generations.settings.chat.stop),
            "options": body.sampling_options(),
            "learn": bool(body.learn),
            "closing": await generations.closing(values) if body.learn else "",
        }
        head = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant"}
        head["model"] = generations.settings.model_name
        chunks = generations.start(request, [arguments])
        if body.stream:
            return await event_stream(request, _events(chunks, head, stops), headers, anthropic_error)
        whole = await cancel_on_disconnect(request.receive, _whole(chunks, head, stops))
        return JSONResponse(whole, headers=headers)

    return router


def _texts(content: str | list[TextBlock]) -> list[str]:
    return [content] if isinstance(content, str) else [block.text for block in content]


async def _whole(chunks: Chunks, head: dict[str, Any], stops: list[str]) -> dict[str, Any]:
    """The body of a response that is not a stream."""
    text, citations = "", list[dict[str, Any]]()
    async with aclosing(chunks):
        async for _, last in chunks:
            text += last.text
            citations += _citations(last)
    usage = {"input_tokens": last.prompt_tokens, "output_tokens": last.completion_tokens}
    content = {"type": "text", "text": text, **({"citations": citations} if citations else {})}
    return {**head, "content": [content], **_ending(last, stops), "usage": usage}


async def _events(chunks: Chunks, head: dict[str, Any], stops: list[str]) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a stream."""
    last = None
    async with aclosing(chunks):
        async for _, chunk in chunks:
            if last is None:
                usage = {"input_tokens": chunk.prompt_tokens, "output_tokens": 0}
                start = {**head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
                yield {"type": "message_start", "message": start}
                yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
                yield {"type": "ping"}
                for citation in _citations(chunk):
                    delta = {"type": "citations_delta", "citation": citation}
                    yield {"type": "content_block_delta", "index": 0, "delta": delta}
            last = chunk
            if chunk.text:
                yield {
                    "type": "content_block_delta",
                    "index": 0,
                    "delta": {"type": "text_delta", "text": chunk.text},
                }
    assert last is not None
    yield {"type": "content_block_stop", "index": 0}
    yield {"type": "message_delta", "delta": _ending(last, stops), "usage": {"output_tokens": last.completion_tokens}}
    yield {"type": "message_stop"}


def _citations(chunk: TextChunk) -> list[dict[str, Any]]:
    """The sources in the first chunk, in Anthropic's form."""
    sources = chunk.sources or ()
    documents = list(dict.fromkeys(source.document for source in sources))
    return [
        {
            "type": "char_location",
            "cited_text": source.text,
            "document_index": documents.index(source.document),
            "document_title": source.document,
            "start_char_index": source.start,
            "end_char_index": source.stop,
        }
        for source in sources
    ]


def _ending(last: TextChunk, stops: list[str]) -> dict[str, Any]:
    """Why the text ended."""
    if last.stop in stops:
        return {"stop_reason": "stop_sequence", "stop_sequence": last.stop}
    return {"stop_reason": "max_tokens" if last.finish_reason == "length" else "end_turn", "stop_sequence": None}
