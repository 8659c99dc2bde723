"""OpenAI's responses. What a response leaves behind is a session, from which later ones continue.

A response that is stored is a new session: a fork of the previous response's, which has read the input and the answer.
In a conversation, the conversation's own session reads them too.
"""

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, nullcontext
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from ttt_e2e.inference.session import Session
from ttt_e2e.server.api.answers import Answer, ArgumentsPart, Call, CallBegins, Part, TextPart, parse_answer
from ttt_e2e.server.api.documents import (
    load_document,
    public_id,
    resolve_references,
    session_id,
    store_response,
    superfluous,
    to_text,
)
from ttt_e2e.server.api.fields import RESPONSES, ignored_fields, ignored_header
from ttt_e2e.server.api.generations import Generations, Structure, last_question
from ttt_e2e.server.api.items import (
    ItemList,
    Limit,
    Order,
    call_item,
    for_template,
    message_item,
    output_text,
    page,
)
from ttt_e2e.server.api.response_schemas import (
    ConversationReference,
    DeletedResponse,
    ResponseObject,
    ResponseRequest,
)
from ttt_e2e.server.api.schemas import DEFAULT_TOKENS
from ttt_e2e.server.api.streams import EVENT_STREAM, cancel_on_disconnect, event_stream
from ttt_e2e.server.engine.records import ChatPrompt, GenerateRequest, Source, TextChunk
from ttt_e2e.server.engine.slot import SessionSlot
from ttt_e2e.server.engine.store import new_id
from ttt_e2e.server.errors import ApiError, describe

_Events = AsyncGenerator[dict[str, Any], None]


def routes(generations: Generations) -> APIRouter:
    """The endpoints under /v1/responses."""
    engine = generations.engine
    router = APIRouter(prefix="/v1/responses", tags=["OpenAI"])
    content: dict[int | str, dict[str, Any]] = {
        200: {"description": "JSON, or server-sent events with `stream`", "content": {EVENT_STREAM: {}}}
    }

    @router.post("", response_model=ResponseObject, responses=content)
    async def create(body: ResponseRequest, request: Request) -> Response:
        """Answer a text or messages, after a previous response or in a conversation."""
        generations.check_model(body.model)
        headers = ignored_header(ignored_fields(body, RESPONSES))
        running = _Response(generations, request, body)
        if body.stream:
            return await event_stream(request, running.events(), headers, running.error_event)
        return JSONResponse(await cancel_on_disconnect(request.receive, _final(running.events())), headers=headers)

    async def load(request: Request, id: str) -> dict[str, Any]:
        _, document = await load_document(engine, request.state.caller.owner, "response", id, "response_id")
        return document

    @router.get("/{response_id}")
    async def response(response_id: str, request: Request, stream: bool = False) -> ResponseObject:
        """Give a response that was stored."""
        document = await load(request, response_id)
        if stream:
            raise ApiError(400, "stream: a stored response comes as a whole; omit stream.", "invalid_value", "stream")
        return ResponseObject(**document["response"])

    @router.delete("/{response_id}")
    async def delete(response_id: str, request: Request) -> DeletedResponse:
        """Delete a response and its session."""
        await load(request, response_id)
        await engine.sessions.delete(request.state.caller.owner, session_id(response_id))
        return DeletedResponse(id=response_id, object="response", deleted=True)

    @router.get("/{response_id}/input_items")
    async def input_items(
        response_id: str,
        request: Request,
        after: str | None = None,
        limit: Annotated[Limit, Query()] = 20,
        order: Order = "desc",
    ) -> ItemList:
        """List the items that a response answers."""
        return ItemList(**page((await load(request, response_id))["input"], after, limit, order))

    return router


class _Response:
    """A response that is being generated."""

    def __init__(self, generations: Generations, request: Request, body: ResponseRequest) -> None:
        self.generations, self.request, self.body = generations, request, body
        self.engine, self.owner = generations.engine, request.state.caller.owner
        self.options = body.sampling_options()
        self.session, self.input = new_id(), body.items()
        self.message = f"msg_{self.session.removeprefix('sess-')}"  # `resolve_references` needs it to begin so
        conversation = body.conversation
        self.conversation = conversation.id if isinstance(conversation, ConversationReference) else conversation
        self.created, self.sequence_number = int(time.time()), 0
        self.structure, self.calls = Structure(), list[str]()  # ids of the calls
        self.message_open = self.message_done = False
        self.sources: tuple[Source, ...] | None = None
        self.notebook: str | None = None  # the session whose notebook they are from

    async def events(self) -> _Events:
        """The events of the response, of which the last one has it as a whole."""
        body, engine = self.body, self.engine
        self.structure = await self.generations.structure(body.functions(), body.schema_of_answer())
        self.input = await resolve_references(engine, self.owner, self.input, "input")
        slot, found, document = None, None, dict[str, Any]()
        if self.conversation is not None:
            slot, _ = await load_document(engine, self.owner, "conversation", self.conversation, "conversation")
            found, self.conversation = slot, public_id("conversation", slot.record.id)
        elif (previous := body.previous_response_id) is not None:
            found, _ = await load_document(engine, self.owner, "response", previous, "previous_response_id")
        earlier = found.record.id if found else None
        async with engine.sessions.changing(slot) if slot else nullcontext():
            if self.conversation is not None:
                _, document = await load_document(engine, self.owner, "conversation", self.conversation, "conversation")
            if body.stored:
                await superfluous(engine, self.owner, earlier)
            unread = [*document.get("items", [])[document.get("read", 0) :], *self.input]
            if not unread:
                raise ApiError(400, "input: there is nothing to answer; send a text or messages.", "no_input", "input")

            async def save(session: Session, text: str, last: TextChunk) -> None:
                response = self._response(self._parse(text), last)
                if body.stored:
                    stored = {"kind": "response", "response": response, "input": self.input}
                    await store_response(engine, self.owner, session, to_text(stored), self.session, found)
                if slot:
                    items = [*document["items"], *self.input, *response["output"]]
                    changed = document | {"items": items, "read": len(items)}
                    await engine.sessions.replace(slot, session, to_text(changed))

            async with aclosing(self._generate(found, unread, save if body.stored or slot else None)) as events:
                async for event in events:
                    yield event

    async def _generate(self, slot: SessionSlot | None, items: list[dict[str, Any]], save: Any) -> _Events:
        body, values = self.body, self.body.chat_template_kwargs
        messages, tools = for_template(items), self.structure.tools
        instructions = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
        question, with_question = last_question(messages)

        def prompt(text: str) -> ChatPrompt:
            return self.generations.chat_prompt([*instructions, *with_question(text)], values, "input", tools)

        shown = await self.generations.prompt_with_sources(slot, body, question, prompt)
        if instructions:  # they are for this response only
            shown = shown._replace(kept=self.generations.chat_prompt(messages, values, "input", tools))
        wanted = GenerateRequest(
            *shown,
            max_tokens=body.max_output_tokens or DEFAULT_TOKENS,
            stop=self.generations.settings.chat.stop,
            sampling=self.options,
            learn=save is not None,
            closing=await self.generations.closing(values) if save else "",
            save=save,
            grammar=self.structure.grammar,
            tools=self.structure.digest,
        )
        answer, last = Answer(self.structure.form, self.calls), None
        async with aclosing(self.generations.start(self.request, slot, [wanted])) as chunks:
            async for _, chunk in chunks:
                if last is None:
                    self.sources, self.notebook = chunk.sources, slot.record.id if slot else None
                    yield self._event("response.created", response=self._response(answer, None))
                    yield self._event("response.in_progress", response=self._response(answer, None))
                    if self.structure.form is None:
                        for event in self._begin_message():
                            yield event
                last = chunk
                for part in (*answer.add(chunk.text), *(answer.end() if chunk.finish_reason else ())):
                    for event in self._part_events(answer, part):
                        yield event
        response = self._response(answer, last)
        for event in self._last_events(answer, response["status"]):
            yield event
        yield self._event(f"response.{response['status']}", response=response)

    def _parse(self, text: str) -> Answer:
        return parse_answer(text, self.structure.form, self.calls)

    # -- events ----------------------------------------------------------------------------------------------------

    def _part_events(self, answer: Answer, part: Part) -> Iterator[dict[str, Any]]:
        """The events for a part of the answer, in which it is already."""
        if isinstance(part, TextPart):
            if not self.message_open:
                yield from self._begin_message()
            at: dict[str, Any] = {"item_id": self.message, "output_index": 0, "content_index": 0}
            yield self._event("response.output_text.delta", **at, delta=part.text, logprobs=[])
            return
        number = part.number
        at = {"item_id": self._call_item_id(number), "output_index": number + bool(answer.text)}
        if isinstance(part, CallBegins):
            if self.message_open and not self.message_done:
                yield from self._end_message(answer.text, "completed")
            item = call_item(Call(part.id, part.name), "in_progress", at["item_id"])
            yield self._event("response.output_item.added", output_index=at["output_index"], item=item)
        elif isinstance(part, ArgumentsPart):
            yield self._event("response.function_call_arguments.delta", **at, delta=part.text)
        else:
            yield from self._end_call(answer, number)

    def _last_events(self, answer: Answer, status: str) -> Iterator[dict[str, Any]]:
        """The events that end what is still open; an answer that is empty is an empty message."""
        if not answer.calls:
            if not self.message_open:
                yield from self._begin_message()
            yield from self._end_message(answer.text, status)
        elif not answer.calls[-1].complete:
            yield from self._end_call(answer, len(answer.calls) - 1)

    def _begin_message(self) -> Iterator[dict[str, Any]]:
        self.message_open = True
        item = message_item("assistant", [], "in_progress", self.message)
        yield self._event("response.output_item.added", output_index=0, item=item)
        at = {"item_id": self.message, "output_index": 0, "content_index": 0}
        yield self._event("response.content_part.added", **at, part=output_text(""))

    def _end_message(self, text: str, status: str) -> Iterator[dict[str, Any]]:
        self.message_done = True
        at = {"item_id": self.message, "output_index": 0, "content_index": 0}
        item = self._message(text, status)
        for number, annotation in enumerate(item["content"][0]["annotations"]):
            found = {"annotation": annotation, "annotation_index": number}
            yield self._event("response.output_text.annotation.added", **at, **found)
        yield self._event("response.output_text.done", **at, text=text, logprobs=[])
        yield self._event("response.content_part.done", **at, part=item["content"][0])
        yield self._event("response.output_item.done", output_index=0, item=item)

    def _end_call(self, answer: Answer, number: int) -> Iterator[dict[str, Any]]:
        call, id = answer.calls[number], self._call_item_id(number)
        index = number + bool(answer.text)
        about = {"item_id": id, "output_index": index, "name": call.name, "arguments": call.arguments}
        yield self._event("response.function_call_arguments.done", **about)
        yield self._event("response.output_item.done", output_index=index, item=call_item(call, id=id))

    def _call_item_id(self, number: int) -> str:
        return f"fc_{self.message.removeprefix('msg_')}{number:02}"

    # ------------------------------------------------------------------------------------------------------------------

    def _message(self, text: str, status: str) -> dict[str, Any]:
        """The message with the text of the answer, which names its sources."""
        item = message_item("assistant", [text], status, self.message)
        item["content"][0]["annotations"] = [
            {"type": "file_citation", "file_id": self.notebook, "filename": source.document, "index": len(text)}
            for source in self.sources or ()
        ]
        return item

    def error_event(self, error: Exception) -> dict[str, Any]:
        """The event that ends a stream in which `error` came up."""
        detail = describe(error)[1].error
        return self._event("error", code=detail.code, message=detail.message, param=detail.param)

    def _event(self, type: str, **content: Any) -> dict[str, Any]:
        self.sequence_number += 1
        return {"type": type, "sequence_number": self.sequence_number - 1, **content}

    def _response(self, answer: Answer, last: TextChunk | None) -> dict[str, Any]:
        """The response with its answer; `last` is None while it is in progress."""
        body, status, usage, output = self.body, "in_progress", None, []
        choice, tools = body.tool_choice or "auto", body.tools or []
        text = body.text.model_dump(exclude_none=True, by_alias=True) if body.text else {}
        if last is not None:
            status = "completed" if last.finish_reason == "stop" else "incomplete"
            if answer.text or not answer.calls:
                output.append(self._message(answer.text, "completed" if answer.calls else status))
            output += [call_item(call, id=self._call_item_id(i)) for i, call in enumerate(answer.calls)]
            usage = {
                "input_tokens": last.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": last.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": last.prompt_tokens + last.completion_tokens,
            }
        return {
            "id": public_id("response", self.session),
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.generations.settings.model_name,
            "output": output,
            "previous_response_id": body.previous_response_id,
            "conversation": None if self.conversation is None else {"id": self.conversation},
            "store": body.stored,
            "temperature": self.options.temperature,
            "top_p": self.options.top_p,
            "metadata": body.metadata or {},
            "usage": usage,
            "sources": None if self.sources is None else [asdict(source) for source in self.sources],
            "background": False,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "reasoning": {"effort": None, "summary": None},
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in tools],
            "truncation": "disabled",
        }


async def _final(events: _Events) -> dict[str, Any]:
    """The response in the last event."""
    async with aclosing(events):
        async for event in events:
            last = event
    response: dict[str, Any] = last["response"]
    return response
