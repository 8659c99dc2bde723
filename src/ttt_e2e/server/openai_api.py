"""OpenAI's API: the model, completions and chats, at once or as a stream.

Beyond it there are the fields `session`, `learn`, `top_k` and `min_p`.
"""

import asyncio
import functools
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ttt_e2e.inference.sampling import SamplingOptions
from ttt_e2e.server import logs
from ttt_e2e.server.engine import Engine
from ttt_e2e.server.errors import Refused
from ttt_e2e.server.fields import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ModelCard,
    ModelList,
    SessionCompletionRequest,
    Usage,
    Writing,
)
from ttt_e2e.server.keys import Caller
from ttt_e2e.server.metrics import Metrics
from ttt_e2e.server.records import Piece, Prompt
from ttt_e2e.server.streams import EVENTS, event_stream, first_and_rest, together, unless_gone

if TYPE_CHECKING:
    from ttt_e2e.server.app import Settings

STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "At once, or with `stream` as server-sent events",
        "content": {EVENTS: {}},
    }
}


class _Part(NamedTuple):
    """A piece of the text of a choice, by its number."""

    choice: int
    piece: Piece


@dataclass(frozen=True)
class _Form:
    """The form of an answer: OpenAI has one for texts and one for chats.

    id: of the answer. names: what an object of it is called, at once and in a stream. closing: what the session reads
    after an answer that it learns. created: Unix time.
    """

    id: str
    names: tuple[str, str]
    chat: bool
    closing: Prompt = ""
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of_text(cls) -> "_Form":
        return cls(f"cmpl-{secrets.token_hex(12)}", ("text_completion", "text_completion"), False)

    @classmethod
    def of_chat(cls, closing: Prompt) -> "_Form":
        return cls(f"chatcmpl-{secrets.token_hex(12)}", ("chat.completion", "chat.completion.chunk"), True, closing)

    def choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        rest = {"logprobs": None, "finish_reason": finish}
        if self.chat:
            return {"index": index, "message": {"role": "assistant", "content": text, "refusal": None}, **rest}
        return {"index": index, "text": text, **rest}

    def first(self, index: int) -> list[dict[str, Any]]:
        """What a choice begins with in a stream."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}] if self.chat else []

    def part(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        rest = {"logprobs": None, "finish_reason": finish}
        if self.chat:
            return {"index": index, "delta": {"content": text} if text else {}, **rest}
        return {"index": index, "text": text, **rest}


class Writer:
    """Answers requests to write: what completions, chats and completions of a session share."""

    def __init__(self, engine: Engine, settings: "Settings", metrics: Metrics) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = metrics
        # What a generation holds while it runs, by owner.
        self.turns = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(settings.limits.generations))

    async def answer(
        self,
        request: Request,
        body: Writing,
        prompts: Sequence[Prompt | Callable[[bool], Prompt]],
        session: str | None,
        form: _Form,
        stop: tuple[str, ...] = (),
    ) -> Response:
        """Write on after each of `prompts`, `n` times. Raises UserError, before anything is sent if that is known."""
        if body.model not in (None, self.settings.model):
            raise Refused(404, f"There is no such model; there is {self.settings.model}.", "model_not_found", "model")
        n = body.n or 1
        if body.learn and session is None:
            raise Refused(
                400, "To learn there must be a session to learn in; give one, or leave learn out.", "no_session"
            )
        if body.learn and n * len(prompts) > 1:
            raise Refused(
                400, "A session learns from one text at a time; ask for one choice of one prompt.", "one_text"
            )
        parts = self._parts(request, body, prompts, session, stop, form.closing)
        if body.stream:
            events = self._events(parts, body, form, n)
            return event_stream(request, await first_and_rest(request.receive, events))
        return JSONResponse(await unless_gone(request.receive, self._whole(parts, form, n, len(prompts))))

    async def _parts(
        self,
        request: Request,
        body: Writing,
        prompts: Sequence[Prompt | Callable[[bool], Prompt]],
        session: str | None,
        stop: tuple[str, ...],
        closing: Prompt,
    ) -> AsyncGenerator[_Part, None]:
        """All choices as they come, those of the first prompt first; counts tokens and looks at the clock."""
        n = body.n or 1
        asked = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        given = {name: value for name, value in asked.items() if value is not None}
        seed = secrets.randbits(62) if body.seed is None else body.seed
        caller: Caller = request.state.caller
        generations = [
            self.engine.generate(
                caller.owner,
                session,
                prompt,
                max_tokens=body.tokens,
                stop=(*body.stops, *stop),
                options=SamplingOptions(**given, seed=(seed + again) % 2**63),
                learn=bool(body.learn),
                closing=closing,
                turns=self.turns[caller.owner],
            )
            for prompt in prompts
            for again in range(n)
        ]
        line = logs.entry(request)
        before: dict[int, tuple[float, int]] = {}  # when a choice's last piece came, and its tokens with that
        async with aclosing(together(generations)) as pieces:
            async for choice, piece in pieces:
                now = time.perf_counter()
                if choice not in before:
                    line.tokens_read += piece.prompt_tokens
                then, tokens = before.get(choice, (now, 0))
                if tokens and piece.completion_tokens > tokens:
                    self.metrics.tokens(piece.completion_tokens - tokens, now - then)
                line.tokens_written += piece.completion_tokens - tokens
                before[choice] = now, piece.completion_tokens
                yield _Part(choice, piece)

    async def _whole(self, parts: AsyncGenerator[_Part, None], form: _Form, n: int, prompts: int) -> dict[str, Any]:
        texts, last = [""] * (n * prompts), {}
        async with aclosing(parts):
            async for choice, piece in parts:
                texts[choice] += piece.text
                last[choice] = piece
        choices = [form.choice(i, text, last[i].finish_reason) for i, text in enumerate(texts)]
        return self._answer(form, form.names[0], choices) | {"usage": _usage(last, n)}

    async def _events(
        self, parts: AsyncGenerator[_Part, None], body: Writing, form: _Form, n: int
    ) -> AsyncGenerator[dict[str, Any], None]:
        last: dict[int, Piece] = {}
        # Whoever asked for usage gets the field in every event, empty but for the last.
        usage = {"usage": None} if body.usage_at_end else {}
        async with aclosing(parts):
            async for choice, piece in parts:
                begins = form.first(choice) if choice not in last else []
                last[choice] = piece
                ends = [form.part(choice, piece.text, piece.finish_reason)] if piece.text or piece.finish_reason else []
                for item in begins + ends:
                    yield self._answer(form, form.names[1], [item]) | usage
        if body.usage_at_end:
            yield self._answer(form, form.names[1], []) | {"usage": _usage(last, n)}

    def _answer(self, form: _Form, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        facts = {"id": form.id, "object": name, "created": form.created, "model": self.settings.model}
        return facts | {"choices": choices}


def _usage(last: dict[int, Piece], n: int) -> dict[str, int]:
    read = sum(piece.prompt_tokens for choice, piece in last.items() if choice % n == 0)
    written = sum(piece.completion_tokens for piece in last.values())
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written).model_dump()


def routes(writer: Writer) -> APIRouter:
    """OpenAI's addresses, answered by `writer`."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    settings = writer.settings
    card = ModelCard(id=settings.model, object="model", created=int(time.time()), owned_by="ttt-e2e")

    @router.get("/models")
    async def models() -> ModelList:
        """The models that are served: one."""
        return ModelList(object="list", data=[card])

    @router.get("/models/{model}")
    async def model(model: str) -> ModelCard:
        """One model."""
        if model != card.id:
            raise Refused(404, f"There is no such model; there is {card.id}.", "model_not_found", "model")
        return card

    @router.post("/completions", response_model=Completion, responses=STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Write on after a text; with `session`, after what the session has read and then the text."""
        return await writer.answer(request, body, body.prompts, body.session, _Form.of_text())

    @router.post("/chat/completions", response_model=ChatCompletion, responses=STREAM)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation; with `session`, one that goes on from what the session has read."""
        messages = [message.plain() for message in body.messages]
        form = _Form.of_chat(settings.chat.closing(messages) if body.learn else "")
        prompt = functools.partial(settings.chat.prompt, messages)
        return await writer.answer(request, body, [prompt], body.session, form, settings.chat.stop)

    return router


async def complete_session(writer: Writer, request: Request, session: str, body: SessionCompletionRequest) -> Response:
    """Write on in a session, as /v1/completions does."""
    return await writer.answer(request, body, body.prompts, session, _Form.of_text())
