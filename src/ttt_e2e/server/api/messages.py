"""Anthropic's API: messages, as one response or as a stream."""

import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ttt_e2e.server.api.answers import Answer, ArgumentsPart, CallBegins, TextPart, arguments_value, parse_answer
from ttt_e2e.server.api.fields import MESSAGES, ignored_fields, ignored_header
from ttt_e2e.server.api.generations import Chunks, Generations, PromptWithSources, Structure, last_question
from ttt_e2e.server.api.message_schemas import (
    AnthropicAnswer,
    AnthropicTokenCount,
    CountTokensRequest,
    MessagesRequest,
)
from ttt_e2e.server.api.streams import EVENT_STREAM, cancel_on_disconnect, event_stream
from ttt_e2e.server.engine.records import ChatPrompt, GenerateRequest, TextChunk
from ttt_e2e.server.engine.slot import SessionSlot
from ttt_e2e.server.errors import AnthropicErrorBody, ApiError, anthropic_error
from ttt_e2e.server.tool_calls import CallForm


def routes(generations: Generations) -> APIRouter:
    """The endpoints /v1/messages and /v1/messages/count_tokens."""
    router = APIRouter(prefix="/v1/messages", tags=["Anthropic"])
    errors: dict[int | str, dict[str, Any]] = {"default": {"model": AnthropicErrorBody, "description": "An error"}}
    answers = {
        200: {"description": "JSON, or server-sent events with `stream`", "content": {EVENT_STREAM: {}}},
        **errors,
    }

    async def asked(body: MessagesRequest, request: Request) -> tuple[Structure, SessionSlot | None, PromptWithSources]:
        """What the answer may be, the session that it follows, and the prompt."""
        generations.check_model(body.model)
        if body.thread is not None:  # by this code, Anthropic's clients know to send whole conversations instead
            message = "thread: this server keeps no threads; omit thread, and send a session to continue."
            raise ApiError(400, message, "thread_unsupported_request", "thread")
        structure = await generations.structure(body.functions(), body.schema_of_answer())
        question, with_question = last_question(body.for_template())
        slot = await generations.slot(request, body.session)

        def prompt(text: str) -> ChatPrompt:
            return generations.chat_prompt(with_question(text), body.chat_template_kwargs, "messages", structure.tools)

        return structure, slot, await generations.prompt_with_sources(slot, body, question, prompt)

    @router.post("/count_tokens", response_model=AnthropicTokenCount, responses=errors)
    async def count_tokens(body: CountTokensRequest, request: Request) -> Response:
        """Count the tokens of a conversation, as Anthropic's API does; nothing is generated."""
        headers = ignored_header(ignored_fields(body, MESSAGES))
        structure, slot, prompt = await asked(body, request)
        count = await generations.engine.count_prompt(slot, prompt.prompt, structure.digest)
        return JSONResponse({"input_tokens": count}, headers=headers)

    @router.post("", response_model=AnthropicAnswer, responses=answers)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation, as Anthropic's API does."""
        headers = ignored_header(ignored_fields(body, MESSAGES))
        values, stops = body.chat_template_kwargs, body.stop_sequences or []
        structure, slot, prompt = await asked(body, request)
        wanted = GenerateRequest(
            *prompt,
            max_tokens=body.max_tokens,
            stop=(*stops, *generations.settings.chat.stop),
            sampling=body.sampling_options(),
            learn=bool(body.learn),
            closing=await generations.closing(values) if body.learn else "",
            grammar=structure.grammar,
            tools=structure.digest,
        )
        head = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant"}
        head["model"] = generations.settings.model_name
        chunks = generations.start(request, slot, [wanted])
        if body.stream:
            return await event_stream(request, _events(chunks, head, stops, structure.form), headers, anthropic_error)
        whole = await cancel_on_disconnect(request.receive, _whole(chunks, head, stops, structure.form))
        return JSONResponse(whole, headers=headers)

    return router


async def _whole(chunks: Chunks, head: dict[str, Any], stops: Sequence[str], form: CallForm | None) -> dict[str, Any]:
    """The body of a response that is not a stream. form: how calls of functions are written."""
    text, citations = "", list[dict[str, Any]]()
    async with aclosing(chunks):
        async for _, last in chunks:
            text += last.text
            citations += _citations(last)
    answer, content = parse_answer(text, form, []), list[dict[str, Any]]()
    if answer.text or not answer.calls:
        content.append({"type": "text", "text": answer.text, **({"citations": citations} if citations else {})})
    for call in answer.calls:
        if call.complete:  # the input of others is no value
            content.append(_tool_use(call.id, call.name, arguments_value(call.arguments)))
    usage = {"input_tokens": last.prompt_tokens, "output_tokens": last.completion_tokens}
    return {**head, "content": content, **_ending(last, stops, answer), "usage": usage}


async def _events(
    chunks: Chunks, head: dict[str, Any], stops: Sequence[str], form: CallForm | None
) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a stream. form: how calls of functions are written."""
    last, answer, citations = None, Answer(form), list[dict[str, Any]]()
    block = -1  # the one that is open, or was last
    async with aclosing(chunks):
        async for _, chunk in chunks:
            if last is None:
                usage = {"input_tokens": chunk.prompt_tokens, "output_tokens": 0}
                start = {**head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
                yield {"type": "message_start", "message": start}
                yield {"type": "ping"}
                citations = _citations(chunk)
            last = chunk
            for part in (*answer.add(chunk.text), *(answer.end() if chunk.finish_reason else ())):
                if isinstance(part, CallBegins) or (isinstance(part, TextPart) and block < 0):
                    if block >= 0:
                        yield {"type": "content_block_stop", "index": block}
                    block += 1
                    begun: dict[str, Any] = {"type": "text", "text": ""}
                    if isinstance(part, CallBegins):
                        begun = _tool_use(part.id, part.name, {})
                    yield {"type": "content_block_start", "index": block, "content_block": begun}
                    for citation in citations if isinstance(part, TextPart) else ():
                        delta = {"type": "citations_delta", "citation": citation}
                        yield {"type": "content_block_delta", "index": block, "delta": delta}
                if isinstance(part, TextPart):
                    delta = {"type": "text_delta", "text": part.text}
                    yield {"type": "content_block_delta", "index": block, "delta": delta}
                elif isinstance(part, ArgumentsPart):
                    delta = {"type": "input_json_delta", "partial_json": part.text}
                    yield {"type": "content_block_delta", "index": block, "delta": delta}
    assert last is not None
    if block < 0:
        block = 0
        yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    yield {"type": "content_block_stop", "index": block}
    ending = _ending(last, stops, answer)
    yield {"type": "message_delta", "delta": ending, "usage": {"output_tokens": last.completion_tokens}}
    yield {"type": "message_stop"}


def _tool_use(id: str, name: str, input: object) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name, "input": input}


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


def _ending(last: TextChunk, stops: Sequence[str], answer: Answer) -> dict[str, Any]:
    """Why the text ended."""
    if last.stop in stops:
        return {"stop_reason": "stop_sequence", "stop_sequence": last.stop}
    reason = "max_tokens" if last.finish_reason == "length" else "tool_use" if answer.called else "end_turn"
    return {"stop_reason": reason, "stop_sequence": None}
