"""OpenAI's API: models, completions and chat completions, as one response or as a stream."""

import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ttt_e2e.server.api import schemas
from ttt_e2e.server.api.fields import ignored_fields, ignored_header
from ttt_e2e.server.api.generations import Chunks, Generations
from ttt_e2e.server.api.streams import EVENT_STREAM, cancel_on_disconnect, event_stream
from ttt_e2e.server.engine.records import Before, Prompt, TextChunk
from ttt_e2e.server.errors import ApiError

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "JSON, or server-sent events with `stream`", "content": {EVENT_STREAM: {}}}
}
_Prompts = Sequence[Prompt | Callable[[Before], Prompt]]  # see `Engine.generate`


async def _respond(
    generations: Generations,
    request: Request,
    body: schemas.GenerationRequest,
    prompts: _Prompts,
    session: str | None,
    closing: Prompt = "",
) -> Response:
    """Generate `n` texts after each prompt."""
    generations.check_model(body.model)
    headers = ignored_header(ignored_fields(body))
    n, chat = body.n or 1, isinstance(body, schemas.ChatCompletionRequest)
    if body.learn and session is None:
        raise ApiError(400, "learn needs a session to learn in; send one, or omit learn.", "no_session", "learn")
    if body.learn and n * len(prompts) > 1:
        raise ApiError(400, "A session learns one text at a time; request one choice of one prompt.", "one_text", "n")
    kind = "text_completion" if not chat else "chat.completion.chunk" if body.stream else "chat.completion"
    id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
    head = {"id": id, "object": kind, "created": int(time.time()), "model": generations.settings.model_name}
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    options = body.sampling_options()
    shared = {
        "id": session,
        "max_tokens": body.max_tokens or body.max_completion_tokens or schemas.DEFAULT_TOKENS,
        "stop": (*stop, *(generations.settings.chat.stop if chat else ())),
        "learn": bool(body.learn),
        "closing": closing,
    }
    chunks = generations.start(
        request,
        [
            {**shared, "prompt": prompt, "options": replace(options, seed=(options.seed + repetition) % 2**63)}
            for prompt in prompts
            for repetition in range(n)
        ],
    )
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return await event_stream(request, _events(chunks, head, n, chat, include_usage), headers)
    whole = await cancel_on_disconnect(request.receive, _whole(chunks, head, n, chat))
    return JSONResponse(whole, headers=headers)


async def _whole(chunks: Chunks, head: dict[str, Any], n: int, chat: bool) -> dict[str, Any]:
    """The body of a response that is not a stream."""
    texts, last = defaultdict[int, str](str), dict[int, TextChunk]()
    async with aclosing(chunks):
        async for choice, chunk in chunks:
            texts[choice] += chunk.text
            last[choice] = chunk
    choices = []
    for index in sorted(texts):
        message = {"role": "assistant", "content": texts[index], "refusal": None}
        content = {"message": message} if chat else {"text": texts[index]}
        choices.append(_choice(index, last[index].finish_reason, content))
    return {**head, "choices": choices, "usage": _usage(last, n)}


async def _events(
    chunks: Chunks, head: dict[str, Any], n: int, chat: bool, include_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a stream."""
    last: dict[int, TextChunk] = {}
    usage = {"usage": None} if include_usage else {}  # in all events but the last
    async with aclosing(chunks):
        async for index, chunk in chunks:
            if chat and index not in last:
                start = _choice(index, None, {"delta": {"role": "assistant", "content": "", "refusal": None}})
                yield {**head, "choices": [start], **usage}
            last[index] = chunk
            if chunk.text or chunk.finish_reason:
                delta = {"delta": {"content": chunk.text} if chunk.text else {}}
                choice = _choice(index, chunk.finish_reason, delta if chat else {"text": chunk.text})
                yield {**head, "choices": [choice], **usage}
    if include_usage:
        yield {**head, "choices": [], "usage": _usage(last, n)}


def _choice(index: int, finish_reason: str | None, content: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}


def _usage(last: dict[int, TextChunk], n: int) -> dict[str, int]:
    read = sum(chunk.prompt_tokens for choice, chunk in last.items() if choice % n == 0)
    written = sum(chunk.completion_tokens for chunk in last.values())
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def routes(generations: Generations) -> APIRouter:
    """Models, completions, chat completions, and completions of a session."""
    router = APIRouter(prefix="/v1")
    name = generations.settings.model_name
    card = schemas.ModelCard(id=name, object="model", created=int(time.time()), owned_by="ttt-e2e")

    @router.get("/models", tags=["OpenAI"])
    async def models() -> schemas.ModelList:
        """List the models; there is one."""
        return schemas.ModelList(object="list", data=[card])

    @router.get("/models/{model}", tags=["OpenAI"])
    async def model(model: str) -> schemas.ModelCard:
        """Describe a model."""
        generations.check_model(model)
        return card

    @router.post("/completions", tags=["OpenAI"], response_model=schemas.Completion, responses=_RESPONSES)
    async def completions(body: schemas.CompletionRequest, request: Request) -> Response:
        """Continue a text; with `session`, what the session has read and then the text."""
        return await _respond(generations, request, body, body.prompts, body.session)

    @router.post("/chat/completions", tags=["OpenAI"], response_model=schemas.ChatCompletion, responses=_RESPONSES)
    async def chat_completions(body: schemas.ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation; with `session`, one that follows what the session has read."""
        messages, values = [message.for_template() for message in body.messages], body.chat_template_kwargs
        closing = await generations.closing(values) if body.learn else ""
        prompt = generations.chat_prompt(messages, values, "messages")
        return await _respond(generations, request, body, [prompt], body.session, closing)

    path = "/sessions/{session}/completions"

    @router.post(path, tags=["sessions"], response_model=schemas.Completion, responses=_RESPONSES)
    async def session_completions(session: str, body: schemas.SessionCompletionRequest, request: Request) -> Response:
        """Continue what the session has read and then the prompt, as /v1/completions does."""
        return await _respond(generations, request, body, body.prompts, session)

    @router.post("/embeddings", tags=["OpenAI"], status_code=400)
    async def embeddings() -> None:
        """Refused: the models have no embeddings of texts."""
        message = "This server's models give no embeddings; send texts to /v1/sessions/ID/read and ask about them."
        raise ApiError(400, message, "not_supported", "model")

    return router
