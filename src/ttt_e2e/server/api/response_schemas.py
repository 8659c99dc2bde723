"""Requests and answers of OpenAI's responses."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ttt_e2e.server.api.functions import (
    MAX_FUNCTIONS,
    FunctionDefinition,
    FunctionReference,
    JsonObjectFormat,
    NamedSchema,
    Schema,
    TextFormat,
    make_tools,
)
from ttt_e2e.server.api.items import CallItem, InputItems, MessageItem, Metadata, message_item, new_items
from ttt_e2e.server.api.schemas import MAX_TOKENS, RequestModel, SamplingRequest, Text, contradiction
from ttt_e2e.server.engine.records import Source
from ttt_e2e.server.tool_calls import Tools


class ConversationReference(RequestModel):
    """A conversation by its id."""

    model_config = ConfigDict(extra="forbid")

    id: str


class _Typed(RequestModel):
    type: Literal["function"]  # comes first, so that an error about a tool of another type is about that


class FunctionTool(FunctionDefinition, _Typed):
    """A function that the answer may call."""


class FunctionChoice(FunctionReference, _Typed):
    """A function that the answer calls."""


class SchemaFormat(NamedSchema):
    """JSON that matches a schema."""

    type: Literal["json_schema"]


class TextConfig(RequestModel):
    """What the text of an answer is. verbosity changes nothing."""

    model_config = ConfigDict(extra="forbid")

    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseRequest(SamplingRequest):
    """Answer `input`.

    previous_response_id: the answer follows this response. conversation: it becomes part of this conversation, or
    session. store: keep the response, so that others can follow it.
    """

    input: Text | InputItems | None = None
    instructions: Text | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationReference | None = None
    store: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    metadata: Metadata | None = None
    text: TextConfig | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_FUNCTIONS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # variables of the chat template

    @model_validator(mode="after")
    def _check_combinations(self) -> "ResponseRequest":
        if None not in (self.previous_response_id, self.conversation):
            message = "previous_response_id and conversation exclude each other; omit one of them."
            raise contradiction("conversation", message)
        self.functions()
        return self

    def functions(self) -> Tools | None:
        """The functions that the answer may call."""
        definitions = [(tool, f"tools.{i}.parameters") for i, tool in enumerate(self.tools or ())]
        named = isinstance(self.tool_choice, FunctionChoice)
        choice = self.tool_choice.name if isinstance(self.tool_choice, FunctionChoice) else self.tool_choice
        return make_tools(definitions, choice or "auto", named, self.parallel_tool_calls)

    def schema_of_answer(self) -> Schema | None:
        """What the answer must match."""
        format = self.text and self.text.format
        if isinstance(format, SchemaFormat):
            return Schema(format.json_schema or {}, "text.format.schema")
        return Schema({"type": "object"}, "text.format") if isinstance(format, JsonObjectFormat) else None

    @property
    def stored(self) -> bool:
        """Whether the response is kept."""
        return self.store is not False

    def items(self) -> list[dict[str, Any]]:
        """The input as items."""
        if isinstance(self.input, str):
            return [message_item("user", [self.input])]
        return new_items(self.input or ())


class IncompleteDetails(BaseModel):
    """Why a response ended early."""

    reason: Literal["max_output_tokens"]


class ResponseUsage(BaseModel):
    """Tokens of this request, without those of a session."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(BaseModel):
    """A response. The fields that are not described are those of OpenAI's API and have one value here.

    sources: the passages of a notebook that the model was shown, where it was.
    """

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, str] | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[MessageItem | CallItem]
    previous_response_id: str | None
    conversation: ConversationReference | None
    store: bool
    temperature: float
    top_p: float
    metadata: dict[str, str]
    usage: ResponseUsage | None
    sources: list[Source] | None = None
    background: Literal[False]
    parallel_tool_calls: bool
    reasoning: dict[str, None]
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[Any]
    truncation: Literal["disabled"]


class DeletedResponse(BaseModel):
    """Confirms that a response was deleted."""

    id: str
    object: Literal["response"]
    deleted: bool
