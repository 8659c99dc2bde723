"""OpenAI's API: models, completions and chat completions, as one response or as a stream."""

import functools
import math
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ttt_e2e.server.api import chat_schemas, schemas
from ttt_e2e.server.api.answers import Answer, ArgumentsPart, CallBegins, Part, TextPart, parse_answer
from ttt_e2e.server.api.fields import ignored_fields, ignored_header
from ttt_e2e.server.api.generations import Chunks, Generations, PromptWithSources, Structure, last_question
from ttt_e2e.server.api.logprobs import chat_logprobs, completion_logprobs
from ttt_e2e.server.api.streams import EVENT_STREAM, cancel_on_disconnect, event_stream
from ttt_e2e.server.engine.records import ChatPrompt, GenerateRequest, LoggedToken, Prompt, TextChunk
from ttt_e2e.server.engine.slot import SessionSlot
from ttt_e2e.server.errors import ApiError
from ttt_e2e.server.tool_calls import CallForm

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "JSON, or server-sent events with `stream`", "content": {EVENT_STREAM: {}}}
}
_MAX_LOGPROBS = 1_000_000  # of one request, those of the likeliest tokens among them; they are held in memory
_Prompts = Sequence[Callable[[SessionSlot | None], Awaitable[PromptWithSources]]]


async def _respond(
    generations: Generations,
    request: Request,
    body: schemas.BaseCompletionRequest,
    prompts: _Prompts,
    session: str | None,
    closing: Prompt = "",
) -> Response:
    """Generate `n` texts after each prompt."""
    generations.check_model(body.model)
    headers = ignored_header(ignored_fields(body))
    chat, n, tries, structure = False, body.n or 1, body.tries, Structure()
    if isinstance(body, chat_schemas.ChatCompletionRequest):
        chat, structure = True, await generations.structure(body.functions(), body.schema_of_answer())
    if body.learn and session is None:
        raise ApiError(400, "learn needs a session to learn in; send one, or omit learn.", "no_session", "learn")
    if body.learn and tries * len(prompts) > 1:
        raise ApiError(400, "A session learns one text at a time; request one choice of one prompt.", "one_text", "n")
    _check_ids(generations, "logit_bias", body.logit_biases)
    kind = "text_completion" if not chat else "chat.completion.chunk" if body.stream else "chat.completion"
    id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
    head = {"id": id, "object": kind, "created": int(time.time()), "model": generations.settings.model_name}
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    options = body.sampling_options()
    num_logprobs = 0 if body.num_logprobs is None and tries > n else body.num_logprobs  # best_of compares them
    if num_logprobs is not None:
        count = len(prompts) * tries * body.token_limit * (num_logprobs + 1)
        if count > _MAX_LOGPROBS:
            field = "best_of" if body.num_logprobs is None else "logprobs"
            message = (
                f"{field}: this would take {count:,} log-probabilities, of at most {_MAX_LOGPROBS:,}; "
                "reduce max_tokens."
            )
            raise ApiError(400, message, "invalid_value", field)
    slot = await generations.slot(request, session)
    wanted = [
        GenerateRequest(
            *one,
            max_tokens=body.token_limit,
            stop=(*stop, *(generations.settings.chat.stop if chat else ())),
            sampling=replace(options, seed=(options.seed + number) % 2**63),
            learn=bool(body.learn),
            closing=closing,
            logprobs=num_logprobs,
            echo=bool(getattr(body, "echo", False)),
            grammar=structure.grammar,
            tools=structure.digest,
        )
        for one in [await prompt(slot) for prompt in prompts]
        for number in range(tries)
    ]
    chunks = generations.start(request, slot, wanted)
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(chunks, head, n, chat, structure.form, include_usage)
        return await event_stream(request, events, headers)
    whole = await cancel_on_disconnect(request.receive, _whole(chunks, head, body, chat, structure.form))
    return JSONResponse(whole, headers=headers)


def _check_ids(generations: Generations, field: str, ids: Iterable[int]) -> None:
    """Raise ApiError if the field has ids of tokens that the model does not have."""
    size = generations.engine.vocab_size
    if max(ids, default=0) >= size:
        message = f"{field}: token ids go from 0 to {size - 1}; was the text tokenised with another tokenizer?"
        raise ApiError(400, message, "invalid_value", field)


async def _whole(
    chunks: Chunks, head: dict[str, Any], body: schemas.BaseCompletionRequest, chat: bool, form: CallForm | None
) -> dict[str, Any]:
    """The body of a response that is not a stream. form: how calls of functions are written."""
    texts, last, first = defaultdict[int, str](str), dict[int, TextChunk](), dict[int, TextChunk]()
    tokens = defaultdict[int, list[LoggedToken]](list)
    num_echoed = defaultdict[int, int](int)  # tokens
    async with aclosing(chunks):
        async for index, chunk in chunks:
            texts[index] += chunk.text
            tokens[index] += chunk.logprobs or ()
            if not chunk.completion_tokens:
                num_echoed[index] = len(tokens[index])
            first.setdefault(index, chunk)
            last[index] = chunk

    def mean_logprob(index: int) -> float:
        values = [token.logprob for token in tokens[index][num_echoed[index] :] if token.logprob is not None]
        return sum(values) / len(values) if values else -math.inf

    n, tries, choices = body.n or 1, body.tries, list[dict[str, Any]]()
    for begin in range(0, len(last), tries):
        found = range(begin, begin + tries)
        for index in sorted(found, key=mean_logprob, reverse=True)[:n] if tries > n else found:
            answer, sources = parse_answer(texts[index], form, []), _sources(first[index])
            content = {"message": _message(answer) | sources} if chat else {"text": texts[index], **sources}
            logged = None if body.num_logprobs is None else tokens[index]
            choices.append(_choice(len(choices), _reason(answer, last[index]), content, logged, chat))
    return {**head, "choices": choices, "usage": _usage(last, tries)}


async def _events(
    chunks: Chunks, head: dict[str, Any], n: int, chat: bool, form: CallForm | None, include_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a stream. form: how calls of functions are written."""
    last: dict[int, TextChunk] = {}
    answers = defaultdict[int, Answer](lambda: Answer(form))
    offsets = defaultdict[int, int](int)  # by choice: how many characters its tokens have so far
    usage = {"usage": None} if include_usage else {}  # in all events but the last
    async with aclosing(chunks):
        async for index, chunk in chunks:
            if index not in last and (chat or chunk.sources is not None):
                delta = {"role": "assistant", "content": "", "refusal": None, **_sources(chunk)}
                start = {"delta": delta} if chat else {"text": "", **_sources(chunk)}
                yield {**head, "choices": [_choice(index, None, start, None, chat)], **usage}
            last[index] = chunk
            if not (chunk.text or chunk.finish_reason):
                continue
            contents: list[dict[str, Any]] = [{"text": chunk.text}]
            if chat:
                parts = [*answers[index].add(chunk.text), *(answers[index].end() if chunk.finish_reason else ())]
                contents = [{"delta": delta} for delta in map(_delta, parts) if delta] or [{"delta": {}}]
                if contents == [{"delta": {}}] and not (chunk.finish_reason or chunk.logprobs):
                    continue  # all of the text waits for more
            tokens = chunk.logprobs
            for number, content in enumerate(contents, 1):
                reason = _reason(answers[index], chunk) if number == len(contents) else None
                yield {**head, "choices": [_choice(index, reason, content, tokens, chat, offsets[index])], **usage}
                tokens = None if tokens is None else ()
            offsets[index] += sum(len(token.text) for token in chunk.logprobs or ())
    if include_usage:
        yield {**head, "choices": [], "usage": _usage(last, n)}


def _message(answer: Answer) -> dict[str, Any]:
    """An answer as a whole message."""
    content = None if answer.calls and not answer.text else answer.text
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if answer.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ]
    return message


def _delta(part: Part) -> dict[str, Any]:
    """What a part adds to a message in a stream."""
    if isinstance(part, TextPart):
        return {"content": part.text}
    if isinstance(part, CallBegins):
        function = {"name": part.name, "arguments": ""}
        return {"tool_calls": [{"index": part.number, "id": part.id, "type": "function", "function": function}]}
    if isinstance(part, ArgumentsPart):
        return {"tool_calls": [{"index": part.number, "function": {"arguments": part.text}}]}
    return {}


def _reason(answer: Answer, chunk: TextChunk) -> str | None:
    """Why an answer ended; None if it has not."""
    return "tool_calls" if answer.called and chunk.finish_reason == "stop" else chunk.finish_reason


def _sources(first: TextChunk) -> dict[str, Any]:
    """What the first chunk of a text says of a notebook."""
    return {} if first.sources is None else {"sources": [asdict(source) for source in first.sources]}


def _choice(
    index: int,
    finish_reason: str | None,
    content: dict[str, Any],
    tokens: Sequence[LoggedToken] | None,
    chat: bool,
    offset: int = 0,
) -> dict[str, Any]:
    """A choice. tokens: for log-probabilities. offset: how many characters come before them."""
    logprobs = None
    if tokens is not None:
        logprobs = chat_logprobs(tokens) if chat else completion_logprobs(tokens, offset)
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


def _usage(last: dict[int, TextChunk], tries: int) -> dict[str, int]:
    read = sum(chunk.prompt_tokens for index, chunk in last.items() if index % tries == 0)
    written = sum(chunk.completion_tokens for chunk in last.values())
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def routes(generations: Generations) -> APIRouter:
    """Models, completions, chat completions, and completions of a session."""
    router = APIRouter(prefix="/v1")
    name = generations.settings.model_name
    now = datetime.now(UTC)
    card = schemas.ModelCard(
        id=name,
        object="model",
        created=int(now.timestamp()),
        owned_by="ttt-e2e",
        type="model",
        display_name=name,
        created_at=now,
        lifecycle="active",
        max_tokens=schemas.MAX_TOKENS,
    )

    @router.get("/models", tags=["OpenAI"])
    async def models() -> schemas.ModelList:
        """List the models; there is one."""
        return schemas.ModelList(object="list", data=[card], first_id=name, last_id=name, has_more=False)

    @router.get("/models/{model}", tags=["OpenAI"])
    async def model(model: str) -> schemas.ModelCard:
        """Describe a model."""
        generations.check_model(model)
        return card

    @router.post("/completions", tags=["OpenAI"], response_model=schemas.Completion, responses=_RESPONSES)
    async def completions(body: schemas.CompletionRequest, request: Request) -> Response:
        """Continue a text; with `session`, what the session has read and then the text."""
        _check_ids(generations, "prompt", body.prompt_ids)
        return await _respond(generations, request, body, prompts(body), body.session)

    def prompts(body: schemas.SessionCompletionRequest) -> _Prompts:
        def prompt(given: str | list[int], text: str) -> Prompt:
            return text if isinstance(given, str) else given

        with_sources = functools.partial(generations.prompt_with_sources, body=body, by_default=not body.echo)
        return [
            functools.partial(
                with_sources,
                question=given if isinstance(given, str) and given else None,
                prompt=functools.partial(prompt, given),
            )
            for given in body.prompts
        ]

    @router.post("/chat/completions", tags=["OpenAI"], response_model=chat_schemas.ChatCompletion, responses=_RESPONSES)
    async def chat_completions(body: chat_schemas.ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation; with `session`, one that follows what the session has read."""
        messages, values = [message.for_template() for message in body.messages], body.chat_template_kwargs
        closing = await generations.closing(values) if body.learn else ""
        (question, with_question), tools = last_question(messages), body.functions()

        def prompt(text: str) -> ChatPrompt:
            return generations.chat_prompt(with_question(text), values, "messages", tools)

        whole = functools.partial(generations.prompt_with_sources, body=body, question=question, prompt=prompt)
        return await _respond(generations, request, body, [whole], body.session, closing)

    path = "/sessions/{session}/completions"

    @router.post(path, tags=["sessions"], response_model=schemas.Completion, responses=_RESPONSES)
    async def session_completions(session: str, body: schemas.SessionCompletionRequest, request: Request) -> Response:
        """Continue what the session has read and then the prompt, as /v1/completions does."""
        _check_ids(generations, "prompt", body.prompt_ids)
        return await _respond(generations, request, body, prompts(body), session)

    @router.post("/embeddings", tags=["OpenAI"], status_code=400)
    async def embeddings() -> None:
        """Refused: the models have no embeddings of texts."""
        message = "This server's models give no embeddings; send texts to /v1/sessions/ID/read and ask about them."
        raise ApiError(400, message, "not_supported", "model")

    return router
