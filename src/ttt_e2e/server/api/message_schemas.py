"""Requests and answers of Anthropic's messages."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ttt_e2e.server.api.functions import (
    MAX_FUNCTIONS,
    FunctionDefinition,
    FunctionName,
    JsonSchema,
    Schema,
    make_tools,
)
from ttt_e2e.server.api.schemas import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOKENS,
    RequestModel,
    SamplingRequest,
    Stop,
    Text,
    contradiction,
)
from ttt_e2e.server.tool_calls import Tools

_MAX_STOPS = 16


class TextBlock(RequestModel):
    """A text. The other fields are those of blocks that Anthropic's API gives, and change nothing."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: Text
    cache_control: dict[str, Any] | None = None
    citations: list[Any] | None = None


_Texts = Text | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True)]


class ToolUseBlock(RequestModel):
    """A call of a function, in an assistant's message. cache_control and caller change nothing."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["tool_use"]
    id: Text = Field(max_length=256)
    name: Text = Field(max_length=128)
    input: JsonSchema
    cache_control: dict[str, Any] | None = None
    caller: dict[str, Any] | None = None


class ToolResultBlock(RequestModel):
    """The result of a call, in a user's message. cache_control and is_error change nothing."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["tool_result"]
    tool_use_id: Text = Field(max_length=256)
    content: _Texts | None = None
    is_error: bool | None = None
    cache_control: dict[str, Any] | None = None


class ThinkingBlock(RequestModel):
    """What another model thought before it answered, in an assistant's message. It is left out, with all its fields."""

    type: Literal["thinking", "redacted_thinking"]


_Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock, Field(discriminator="type")]


class AnthropicMessage(RequestModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["user", "assistant", "system"]
    content: Text | Annotated[list[_Block], Field(max_length=MAX_PARTS, fail_fast=True)]

    @model_validator(mode="after")
    def _check_blocks(self) -> "AnthropicMessage":
        for block in self.content if isinstance(self.content, list) else ():
            if isinstance(block, ToolUseBlock | ThinkingBlock) and self.role != "assistant":
                raise ValueError(f"{block.type} is in an assistant's message only.")
            if isinstance(block, ToolResultBlock) and self.role != "user":
                raise ValueError("tool_result is in a user's message only.")
        return self

    def for_template(self) -> list[dict[str, Any]]:
        """The message as chat templates expect it; results of calls are messages of their own."""
        messages: list[dict[str, Any]] = []
        for block in self.content if isinstance(self.content, list) else (TextBlock(type="text", text=self.content),):
            if isinstance(block, ToolResultBlock):
                content = "\n".join(_texts(block.content or ""))
                messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
                continue
            if isinstance(block, ThinkingBlock):
                continue
            if not messages or messages[-1]["role"] != self.role:
                messages.append({"role": self.role, "content": []})
            if isinstance(block, TextBlock):
                messages[-1]["content"].append({"type": "text", "text": block.text})
            else:
                function = {"name": block.name, "arguments": block.input}
                call = {"id": block.id, "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
        return messages or [{"role": self.role, "content": ""}]


class AnthropicTool(RequestModel):
    """A function that the answer may call. Its input always matches `input_schema`.

    The fields behind `strict` change nothing.
    """

    model_config = ConfigDict(extra="forbid")

    type: Literal["custom"] | None = None
    name: FunctionName
    description: Text | None = None
    input_schema: JsonSchema
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None
    eager_input_streaming: bool | None = None
    defer_loading: Literal[False] | None = None
    allowed_callers: Annotated[list[Literal["direct"]], Field(max_length=1)] | None = None


class AnthropicToolChoice(RequestModel):
    """Whether the answer calls functions: it may, it must, it must call this one, or it must not."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check_name(self) -> "AnthropicToolChoice":
        if (self.name is None) == (self.type == "tool"):
            raise ValueError("the type tool needs a name, and no other has one.")
        return self


class AnthropicFormat(RequestModel):
    """JSON that matches a schema."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["json_schema"]
    json_schema: JsonSchema = Field(alias="schema")


class OutputConfig(RequestModel):
    """What the text of an answer is. effort changes nothing: there is no reasoning to spend more or less on."""

    model_config = ConfigDict(extra="forbid")

    format: AnthropicFormat | None = None
    effort: str | None = None


class Thinking(RequestModel):
    """Whether the model thinks first. None here does, which "adaptive" leaves to it; display changes nothing."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["disabled", "adaptive"]
    display: str | None = None


class ContextEdit(RequestModel):
    """Removes the thinking in earlier turns; there is none."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["clear_thinking_20251015"]
    keep: Any = None


class ContextManagement(RequestModel):
    """What is removed from earlier turns."""

    model_config = ConfigDict(extra="forbid")

    edits: Annotated[list[ContextEdit], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None


class MessagesRequest(SamplingRequest):
    """Answer `messages`. With a session they follow what it has read, so only new messages need to be sent.

    learn: make the messages and the answer part of the session. thread: refused, in a way that clients know.
    """

    messages: list[AnthropicMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: int = Field(ge=1, le=MAX_TOKENS)
    system: _Texts | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=_MAX_STOPS, fail_fast=True)] | None = None
    session: str | None = None
    learn: bool | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_FUNCTIONS, fail_fast=True)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    output_config: OutputConfig | None = None
    thinking: Thinking | None = None
    context_management: ContextManagement | None = None
    thread: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # variables of the chat template

    @model_validator(mode="after")
    def _check_combinations(self) -> "MessagesRequest":
        if self.messages[-1].role == "assistant":
            raise contradiction("messages", "messages: the last one is the assistant's; send one to answer after it.")
        if self.learn and self.session is None:
            raise contradiction("learn", "learn needs a session to learn in; send one, or omit learn.")
        self.functions()
        return self

    def functions(self) -> Tools | None:
        """The functions that the answer may call."""
        definitions = [
            (FunctionDefinition(name=one.name, description=one.description, parameters=one.input_schema), place)
            for place, one in ((f"tools.{i}.input_schema", one) for i, one in enumerate(self.tools or ()))
        ]
        choice = self.tool_choice or AnthropicToolChoice(type="auto")
        name = choice.name or ("required" if choice.type == "any" else choice.type)
        return make_tools(definitions, name, choice.name is not None, not choice.disable_parallel_tool_use)

    def schema_of_answer(self) -> Schema | None:
        """What the answer must match."""
        format = self.output_config and self.output_config.format
        return Schema(format.json_schema, "output_config.format.schema") if format else None

    def for_template(self) -> list[dict[str, Any]]:
        """The messages as chat templates expect them."""
        parts = [{"type": "text", "text": text} for text in _texts(self.system or "")]
        system = [] if self.system is None else [{"role": "system", "content": parts}]
        return system + [one for message in self.messages for one in message.for_template()]


class CountTokensRequest(MessagesRequest):
    """Messages as for an answer, which is not generated."""

    max_tokens: int = Field(default=1, ge=1, le=MAX_TOKENS)


class AnthropicTokenCount(BaseModel):
    """input_tokens: as in the usage of an answer."""

    input_tokens: int


class Citation(BaseModel):
    """A passage of the session's notebook that the model was shown; document_index counts the documents cited."""

    type: Literal["char_location"]
    cited_text: str
    document_index: int
    document_title: str | None
    start_char_index: int
    end_char_index: int


class AnthropicText(BaseModel):
    """A generated text."""

    type: Literal["text"]
    text: str
    citations: list[Citation] | None = None


class AnthropicToolUse(BaseModel):
    """A call of a function."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class AnthropicUsage(BaseModel):
    """Tokens of this request, without those of a session."""

    input_tokens: int
    output_tokens: int


class AnthropicAnswer(BaseModel):
    """A generated message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnthropicText | AnthropicToolUse]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: AnthropicUsage


def _texts(content: str | Sequence[TextBlock]) -> list[str]:
    return [content] if isinstance(content, str) else [block.text for block in content]
