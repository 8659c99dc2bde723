"""What all endpoints that generate share: the model's name, chat prompts, limits per key, and counts."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple

from fastapi import Request

from ttt_e2e.errors import UserError
from ttt_e2e.inference.grammar import Grammar, json_rule
from ttt_e2e.retrieval.generate import DEFAULT_PASSAGES
from ttt_e2e.server.api.functions import Schema
from ttt_e2e.server.api.schemas import NotebookRequest
from ttt_e2e.server.api.streams import merge
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.records import Before, ChatPrompt, GenerateRequest, Prompt, Source, TextChunk
from ttt_e2e.server.engine.slot import SessionSlot
from ttt_e2e.server.errors import ApiError
from ttt_e2e.server.middleware.logs import LogEntry, log_entry
from ttt_e2e.server.middleware.metrics import ServiceMetrics
from ttt_e2e.server.settings import Settings
from ttt_e2e.server.tool_calls import HERMES, CallForm, Tools, answer_grammar, parameters_schema

Chunks = AsyncGenerator[tuple[int, TextChunk], None]
"""Parts of generated texts as they come, each with the index of its text."""


class Structure(NamedTuple):
    """What an answer may be: the functions that it may call, its grammar, and how calls are written in it."""

    tools: Tools | None = None
    grammar: Grammar | None = None
    form: CallForm | None = None

    @property
    def digest(self) -> str:
        """A digest of the functions; "" for none."""
        return "" if self.tools is None else self.tools.digest


class PromptWithSources(NamedTuple):
    """A prompt and the passages of a notebook in it; the first fields of `GenerateRequest`."""

    prompt: Prompt | ChatPrompt
    kept: Prompt | ChatPrompt | None = None  # what a session learns in its place
    sources: tuple[Source, ...] | None = None


class Generations:
    """Starts generations, and counts them for log and metrics."""

    def __init__(self, engine: Engine, settings: Settings, metrics: ServiceMetrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        # By owner. Each generation holds its owner's semaphore while it runs.
        self._semaphores = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(settings.generations))

    def check_model(self, name: str | None) -> None:
        """Raise ApiError if this is another model than the one that is served."""
        if name not in (None, self.settings.model_name):
            message = f"There is no such model; this server has {self.settings.model_name}."
            raise ApiError(404, message, "model_not_found", "model")

    async def structure(self, tools: Tools | None, schema: Schema | None) -> Structure:
        """What an answer may be that may call `tools`, and otherwise matches `schema`.

        Raises ApiError, about the place in the request, for a schema that cannot be followed, and for tools where the
        model has no chat template.
        """
        if tools is None and schema is None:
            return Structure()

        def compile() -> Structure:
            form, compiler = self.settings.chat.call_form, self.engine.grammars
            if tools is not None and form is None:
                message = "tools: this model has no chat template, so it cannot call functions; omit tools."
                raise ApiError(400, message, "invalid_value", "tools")
            try:
                text = answer_grammar(tools, form or HERMES, schema.schema if schema else None)
                return Structure(tools, compiler.compile(text), form if tools else None)
            except UserError:
                parts = [(parameters_schema(one), one.place) for one in (tools.functions if tools else ())]
                for part, place in [*parts, *([schema] if schema else [])]:  # which of them is it?
                    try:
                        compiler.compile(f"start: {json_rule(part)}")
                    except UserError as error:
                        message = f"{place}: {error}"
                        raise ApiError(400, message, "invalid_value", place.partition(".")[0]) from error
                raise

        return await asyncio.to_thread(compile)

    def chat_prompt(
        self,
        messages: list[dict[str, Any]],
        values: Mapping[str, Any] | None,
        field: str,
        tools: Tools | None = None,
    ) -> ChatPrompt:
        """The prompt for an answer to `messages`, which may call `tools`.

        values: variables of the template. field: that of the request.
        """
        definitions = [] if tools is None else tools.definitions

        def prompt(before: Before) -> Prompt:
            try:
                return self.settings.chat.prompt(messages, before, values, definitions)
            except UserError as error:
                raise ApiError(400, str(error), "invalid_value", field) from error

        return prompt

    async def slot(self, request: Request, session: str | None) -> SessionSlot | None:
        """The session with this id, which a request looks up once. Raises SessionNotFoundError."""
        return None if session is None else await self.engine.sessions.slot(request.state.caller.owner, session)

    async def prompt_with_sources(
        self,
        slot: SessionSlot | None,
        body: NotebookRequest,
        question: str | None,
        prompt: Callable[[str], Prompt | ChatPrompt],
        *,
        by_default: bool = True,
    ) -> PromptWithSources:
        """A prompt, with passages from the session's notebook if that is searched.

        Args:
            slot: The session that continues, if any.
            body: Of the client.
            question: What the notebook is searched for; None if there is nothing to search for.
            prompt: Makes the prompt from the question, which may have passages before it.
            by_default: Whether the notebook is searched if the request leaves that open.

        Raises ApiError if the request wants a notebook, and there is none or no question.
        """
        keeps = slot is not None and slot.summary().notebook is not None
        wanted = by_default and keeps and question is not None if body.notebook is None else body.notebook
        if body.notebook and not keeps:
            message = "notebook needs a session that keeps one; create it with notebook: true, or omit notebook."
            raise ApiError(400, message, "no_notebook", "notebook")
        if body.notebook and question is None:
            raise ApiError(
                400, "notebook needs a question in words; send one, or omit notebook.", "no_text", "notebook"
            )
        if not wanted:
            if body.passages is not None:
                message = "passages needs a notebook that is searched for the question; omit it."
                raise ApiError(400, message, "no_notebook", "passages")
            return PromptWithSources(prompt(question or ""))
        assert slot is not None and question is not None
        text, sources = await self.engine.retrieve(slot, question, body.passages or DEFAULT_PASSAGES)
        # A session that learns keeps what was said. The passages it has read before.
        return PromptWithSources(prompt(text), prompt(question), tuple(sources))

    async def closing(self, values: Mapping[str, Any] | None) -> Prompt:
        """What a session reads after an answer."""
        return await asyncio.to_thread(self.settings.chat.closing, values)

    def start(self, request: Request, slot: SessionSlot | None, generations: Iterable[GenerateRequest]) -> Chunks:
        """Generate texts after what a session has read."""
        limit = self._semaphores[request.state.caller.owner]
        texts = [self.engine.generate(slot, generation, limit) for generation in generations]
        return self._observe(merge(texts), log_entry(request))

    async def _observe(self, chunks: Chunks, entry: LogEntry) -> Chunks:
        previous: dict[int, tuple[float, int]] = {}  # by text: when its last chunk came, and its tokens so far
        async with aclosing(chunks):
            async for index, chunk in chunks:
                now = time.perf_counter()
                if index not in previous:
                    entry.tokens_read += chunk.prompt_tokens
                then, tokens = previous.get(index, (now, 0))
                if tokens and chunk.completion_tokens > tokens:
                    self.metrics.observe_tokens(chunk.completion_tokens - tokens, now - then)
                entry.tokens_written += chunk.completion_tokens - tokens
                previous[index] = now, chunk.completion_tokens
                yield index, chunk


def last_question(messages: list[dict[str, Any]]) -> tuple[str | None, Callable[[str], list[dict[str, Any]]]]:
    """The last message of a user as text, and a function that returns the messages with another text in its place.

    The text is None if there is no such message, or if it is empty.
    """
    places = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not places:
        return None, lambda _: messages
    content = messages[places[-1]]["content"]
    question = content if isinstance(content, str) else "\n".join(part["text"] for part in content)

    def with_question(text: str) -> list[dict[str, Any]]:
        if text == question:
            return messages
        changed = text if isinstance(content, str) else [{"type": "text", "text": text}]
        return [
            message | {"content": changed} if place == places[-1] else message for place, message in enumerate(messages)
        ]

    return question or None, with_question
