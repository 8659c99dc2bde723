"""What all endpoints that generate share: the model's name, chat prompts, limits per key, and counts."""

import asyncio
import functools
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import Request

from ttt_e2e.errors import UserError
from ttt_e2e.server.api.streams import merge
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.records import Before, Prompt, TextChunk
from ttt_e2e.server.errors import ApiError
from ttt_e2e.server.middleware.logs import LogEntry, log_entry
from ttt_e2e.server.middleware.metrics import ServiceMetrics
from ttt_e2e.server.settings import Settings

Chunks = AsyncGenerator[tuple[int, TextChunk], None]
"""Parts of generated texts as they come, each with the index of its text."""


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

    def chat_prompt(
        self, messages: list[dict[str, Any]], values: Mapping[str, Any] | None, field: str
    ) -> Callable[[Before], Prompt]:
        """The prompt for an answer to `messages`. values: variables of the template. field: that of the request."""

        def prompt(before: Before) -> Prompt:
            try:
                return self.settings.chat.prompt(messages, before, values)
            except UserError as error:
                raise ApiError(400, str(error), "invalid_value", field) from error

        return prompt

    async def closing(self, values: Mapping[str, Any] | None) -> Prompt:
        """What a session reads after an answer."""
        return await asyncio.to_thread(self.settings.chat.closing, values)

    def start(self, request: Request, generations: Iterable[Mapping[str, Any]]) -> Chunks:
        """The texts of generations, each given as arguments of `Engine.generate`."""
        owner: str = request.state.caller.owner
        generate = functools.partial(self.engine.generate, owner, limit=self._semaphores[owner])
        return self._observe(merge([generate(**arguments) for arguments in generations]), log_entry(request))

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
