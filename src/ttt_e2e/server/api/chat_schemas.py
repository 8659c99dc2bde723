"""Requests and responses of OpenAI's chat completions."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ttt_e2e.server.api.answers import arguments_value
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
from ttt_e2e.server.api.logprobs import ChatLogprobs
from ttt_e2e.server.api.schemas import (
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_PARTS,
    BaseChoice,
    BaseCompletion,
    BaseCompletionRequest,
    RequestModel,
    Text,
    Usage,
    contradiction,
)
from ttt_e2e.server.engine.records import Source
from ttt_e2e.server.tool_calls import Tools


class TextPart(RequestModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(RequestModel):
    """Which function was called. arguments: JSON."""

    name: Text = Field(max_length=128)
    arguments: Text


class MessageToolCall(RequestModel):
    """A call of a function in an assistant's message."""

    id: Text = Field(max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """The call as chat templates expect it, with the arguments as a value."""
        arguments = arguments_value(self.function.arguments)
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class Message(RequestModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=MAX_FUNCTIONS, fail_fast=True)] | None = None
    tool_call_id: Text | None = Field(None, max_length=256)

    @model_validator(mode="after")
    def _check_content(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant's message has tool_calls.")
        if (self.tool_call_id is None) != (self.role != "tool"):
            raise ValueError("a message of the role tool needs tool_call_id, and no other has it.")
        empty = self.refusal is None and not self.tool_calls
        if self.content is None and (self.role != "assistant" or empty):
            raise ValueError("a message needs content, unless it is an assistant's refusal, or calls functions.")
        return self

    def for_template(self) -> dict[str, Any]:
        """Role and content, a text or parts, as chat templates expect them."""
        content = self.content or self.refusal or ""
        parts = content if isinstance(content, str) else [{"type": part.type, "text": part.text} for part in content]
        message: dict[str, Any] = {"role": self.role, "content": parts}
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message | ({"tool_call_id": self.tool_call_id} if self.role == "tool" else {})


class ChatTool(RequestModel):
    """A function that the answer may call."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: FunctionDefinition


class ChatToolChoice(RequestModel):
    """A function that the answer calls."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: FunctionReference


class JsonSchemaFormat(RequestModel):
    """JSON that matches a schema."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["json_schema"]
    json_schema: NamedSchema


_ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatCompletionRequest(BaseCompletionRequest):
    """Answer `messages`. With a session they follow what it has read, so only new messages need to be sent."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    session: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # variables of the chat template
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: _ResponseFormat | None = None
    tools: Annotated[list[ChatTool], Field(max_length=MAX_FUNCTIONS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChatToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise contradiction("top_logprobs", "top_logprobs needs logprobs; set it to true, or omit top_logprobs.")
        self.functions()
        return self

    def functions(self) -> Tools | None:
        """The functions that the answer may call."""
        definitions = [(tool.function, f"tools.{i}.function.parameters") for i, tool in enumerate(self.tools or ())]
        named = isinstance(self.tool_choice, ChatToolChoice)
        choice = self.tool_choice.function.name if isinstance(self.tool_choice, ChatToolChoice) else self.tool_choice
        return make_tools(definitions, choice or "auto", named, self.parallel_tool_calls)

    def schema_of_answer(self) -> Schema | None:
        """What the answer must match."""
        if isinstance(self.response_format, JsonSchemaFormat):
            return Schema(self.response_format.json_schema.json_schema or {}, "response_format.json_schema.schema")
        if isinstance(self.response_format, JsonObjectFormat):
            return Schema({"type": "object"}, "response_format")
        return None

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens to tell with each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class ToolFunction(BaseModel):
    """Which function is called. arguments: JSON that matches the parameters, unless the answer was cut off."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a function."""

    id: str
    type: Literal["function"]
    function: ToolFunction


class AssistantMessage(BaseModel):
    """A generated message.

    content: null if there are calls, and no text before them. sources: the passages of a notebook that the model was
    shown, where it was.
    """

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    sources: list[Source] | None = None
    tool_calls: list[ToolCall] = []


class ChatChoice(BaseChoice):
    """One answer to a conversation."""

    message: AssistantMessage
    logprobs: ChatLogprobs | None


class ChatCompletion(BaseCompletion):
    """Answers to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
