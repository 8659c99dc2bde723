"""OpenAI's API: models, completions and chat completions, as one response or as a stream."""

import asyncio
import functools
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ttt_e2e.inference.sampling import SamplingOptions
from ttt_e2e.server.api.schemas import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    GenerationRequest,
    ModelCard,
    ModelList,
    SessionCompletionRequest,
    Usage,
)
from ttt_e2e.server.api.streams import EVENT_STREAM, begin_stream, cancel_on_disconnect, event_stream, merge
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.records import Prompt, TextChunk
from ttt_e2e.server.errors import ApiError
from ttt_e2e.server.middleware.keys import Caller
from ttt_e2e.server.middleware.logs import log_entry
from ttt_e2e.server.middleware.metrics import ServiceMetrics
from ttt_e2e.server.settings import Settings

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "JSON, or server-sent events with `stream`", "content": {EVENT_STREAM: {}}}
}
_Chunks = AsyncGenerator[tuple[int, TextChunk], None]  # with the index of the choice


@dataclass(frozen=True)
class _ResponseFormat:
    """How a response represents generated texts. closing: what a session reads after a text that it learns."""

    id: str
    object: str
    event_object: str
    closing: Prompt = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, model: str, object: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": object, "created": self.created, "model": model, "choices": choices}

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """A choice of a response."""
        return _choice(index, finish_reason, text=text)

    def first_delta(self, index: int) -> list[dict[str, Any]]:
        """What a choice begins with in a stream."""
        return []

    def delta(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """A part of a choice in a stream."""
        return _choice(index, finish_reason, text=text)


class _ChatFormat(_ResponseFormat):
    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        return _choice(index, finish_reason, message={"role": "assistant", "content": text, "refusal": None})

    def first_delta(self, index: int) -> list[dict[str, Any]]:
        return [_choice(index, None, delta={"role": "assistant", "content": "", "refusal": None})]

    def delta(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        return _choice(index, finish_reason, delta={"content": text} if text else {})


def _choice(index: int, finish_reason: str | None, **content: Any) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}


class _GenerationHandler:
    """Answers generation requests: completions, chat completions and completions of a session."""

    def __init__(self, engine: Engine, settings: Settings, metrics: ServiceMetrics) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = metrics
        # By owner. Each generation holds its owner's semaphore while it runs.
        self.semaphores = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(settings.limits.generations))

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.settings.model_name):
            message = f"There is no such model; this server has {self.settings.model_name}."
            raise ApiError(404, message, "model_not_found", "model")

    async def respond(
        self,
        request: Request,
        body: GenerationRequest,
        prompts: Sequence[Prompt | Callable[[bool], Prompt]],
        session: str | None,
        response_format: _ResponseFormat,
        stop: tuple[str, ...] = (),
    ) -> Response:
        """Generate `n` texts after each prompt. Raises UserError if a request fails before anything is sent.

        prompts, session: as for `Engine.generate`. stop: in addition to the request's own.
        """
        self.check_model(body.model)
        n = body.n or 1
        if body.learn and session is None:
            raise ApiError(400, "learn needs a session to learn in; send one, or omit learn.", "no_session")
        if body.learn and n * len(prompts) > 1:
            raise ApiError(400, "A session learns one text at a time; request one choice of one prompt.", "one_text")
        chunks = self._generate(request, body, prompts, session, stop, response_format.closing)
        if body.stream:
            events = self._events(chunks, body, response_format, n)
            return event_stream(request, await begin_stream(request.receive, events))
        whole = self._whole(chunks, response_format, n, len(prompts))
        return JSONResponse(await cancel_on_disconnect(request.receive, whole))

    async def _generate(
        self,
        request: Request,
        body: GenerationRequest,
        prompts: Sequence[Prompt | Callable[[bool], Prompt]],
        session: str | None,
        stop: tuple[str, ...],
        closing: Prompt,
    ) -> _Chunks:
        """The chunks of all choices as they come, with logs and metrics; the first prompt's choices come first."""
        sampling = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        sampling = {name: value for name, value in sampling.items() if value is not None}
        seed = secrets.randbits(62) if body.seed is None else body.seed
        caller: Caller = request.state.caller
        generations = [
            self.engine.generate(
                caller.owner,
                session,
                prompt,
                max_tokens=body.token_limit,
                stop=(*body.stop_strings, *stop),
                options=SamplingOptions(**sampling, seed=(seed + repetition) % 2**63),
                learn=bool(body.learn),
                closing=closing,
                limit=self.semaphores[caller.owner],
            )
            for prompt in prompts
            for repetition in range(body.n or 1)
        ]
        entry = log_entry(request)
        previous: dict[int, tuple[float, int]] = {}  # by choice: when its last chunk came, and its tokens so far
        async with aclosing(merge(generations)) as chunks:
            async for choice, chunk in chunks:
                now = time.perf_counter()
                if choice not in previous:
                    entry.tokens_read += chunk.prompt_tokens
                then, tokens = previous.get(choice, (now, 0))
                if tokens and chunk.completion_tokens > tokens:
                    self.metrics.observe_tokens(chunk.completion_tokens - tokens, now - then)
                entry.tokens_written += chunk.completion_tokens - tokens
                previous[choice] = now, chunk.completion_tokens
                yield choice, chunk

    async def _whole(self, chunks: _Chunks, response_format: _ResponseFormat, n: int, prompts: int) -> dict[str, Any]:
        texts, last = [""] * (n * prompts), dict[int, TextChunk]()
        async with aclosing(chunks):
            async for choice, chunk in chunks:
                texts[choice] += chunk.text
                last[choice] = chunk
        choices = [response_format.choice(i, text, last[i].finish_reason) for i, text in enumerate(texts)]
        body = response_format.body(self.settings.model_name, response_format.object, choices)
        return body | {"usage": _usage(last, n)}

    async def _events(
        self, chunks: _Chunks, body: GenerationRequest, response_format: _ResponseFormat, n: int
    ) -> AsyncGenerator[dict[str, Any], None]:
        event = functools.partial(response_format.body, self.settings.model_name, response_format.event_object)
        last: dict[int, TextChunk] = {}
        # With include_usage every event has the field, which is null in all but the last.
        usage = {"usage": None} if body.include_usage else {}
        async with aclosing(chunks):
            async for choice, chunk in chunks:
                deltas = response_format.first_delta(choice) if choice not in last else []
                last[choice] = chunk
                if chunk.text or chunk.finish_reason:
                    deltas.append(response_format.delta(choice, chunk.text, chunk.finish_reason))
                for delta in deltas:
                    yield event([delta]) | usage
        if body.include_usage:
            yield event([]) | {"usage": _usage(last, n)}


def _usage(last: dict[int, TextChunk], n: int) -> dict[str, int]:
    read = sum(chunk.prompt_tokens for choice, chunk in last.items() if choice % n == 0)
    written = sum(chunk.completion_tokens for chunk in last.values())
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written).model_dump()


def routes(engine: Engine, settings: Settings, metrics: ServiceMetrics) -> APIRouter:
    """OpenAI's endpoints, and completions of a session."""
    router = APIRouter(prefix="/v1")
    handler = _GenerationHandler(engine, settings, metrics)
    card = ModelCard(id=settings.model_name, object="model", created=int(time.time()), owned_by="ttt-e2e")

    @router.get("/models", tags=["OpenAI"])
    async def models() -> ModelList:
        """List the models; there is one."""
        return ModelList(object="list", data=[card])

    @router.get("/models/{model}", tags=["OpenAI"])
    async def model(model: str) -> ModelCard:
        """Describe a model."""
        handler.check_model(model)
        return card

    @router.post("/completions", tags=["OpenAI"], response_model=Completion, responses=_RESPONSES)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text; with `session`, what the session has read and then the text."""
        return await handler.respond(request, body, body.prompts, body.session, _completion_format())

    @router.post("/chat/completions", tags=["OpenAI"], response_model=ChatCompletion, responses=_RESPONSES)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation; with `session`, one that follows what the session has read."""
        messages = [message.for_template() for message in body.messages]
        closing = settings.chat.closing(messages) if body.learn else ""
        id = f"chatcmpl-{secrets.token_hex(12)}"
        response_format = _ChatFormat(id, "chat.completion", "chat.completion.chunk", closing)
        prompt = functools.partial(settings.chat.prompt, messages)
        return await handler.respond(request, body, [prompt], body.session, response_format, settings.chat.stop)

    path = "/sessions/{session}/completions"

    @router.post(path, tags=["sessions"], response_model=Completion, responses=_RESPONSES)
    async def session_completions(session: str, body: SessionCompletionRequest, request: Request) -> Response:
        """Continue what the session has read and then the prompt, as /v1/completions does."""
        return await handler.respond(request, body, body.prompts, session, _completion_format())

    return router


def _completion_format() -> _ResponseFormat:
    return _ResponseFormat(f"cmpl-{secrets.token_hex(12)}", "text_completion", "text_completion")
