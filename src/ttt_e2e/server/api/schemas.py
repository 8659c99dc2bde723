"""Requests and responses of OpenAI's completions and chat completions.

The fields `session`, `learn`, `top_k` and `min_p` are not OpenAI's.

Lists end at their first error: with all the errors of a long list, a request would take a thousand times its size.
"""

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ttt_e2e.inference.sampling import SamplingOptions

MAX_TOKENS, DEFAULT_TOKENS = 16_384, 200  # per generated text
_MAX_PROMPTS, _MAX_CHOICES, _MAX_STOPS, MAX_MESSAGES, MAX_PARTS = 16, 8, 4, 1000, 1000

Stop = Annotated[str, Field(min_length=1, max_length=256)]


class RequestModel(BaseModel):
    """Refuses strings in place of numbers, NaN and infinity; `fields` decides about fields that are not declared."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


def contradiction(param: str, message: str) -> PydanticCustomError:
    """The error of a field, named `param`, that contradicts others, for a validator to raise."""
    return PydanticCustomError("contradiction", message, {"param": param})


class SamplingRequest(RequestModel):
    """How tokens are drawn. Defaults: temperature 0.8, top_p 0.95, a random seed."""

    model: str | None = Field(None, max_length=256)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 31, description="0 or -1: no limit")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63, description="-1: random")
    stream: bool | None = None

    def sampling_options(self) -> SamplingOptions:
        """The options with a seed."""
        options = self.model_dump(include={"temperature", "top_p", "top_k", "min_p"}, exclude_none=True)
        if self.top_k == -1:
            options["top_k"] = 0
        seed = secrets.randbits(62) if self.seed in (None, -1) else self.seed
        return SamplingOptions(**options, seed=(seed or 0) % 2**63)


class StreamOptions(RequestModel):
    """include_usage: send the numbers of tokens in a last event."""

    include_usage: bool = False


class GenerationRequest(SamplingRequest):
    """How to generate; at most 200 tokens by default.

    learn: make prompt and generated text part of the session.
    """

    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    n: int | None = Field(None, ge=1, le=_MAX_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=_MAX_STOPS, fail_fast=True)] | None = None
    stream_options: StreamOptions | None = None
    learn: bool | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> "GenerationRequest":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            message = "max_tokens and max_completion_tokens mean the same; omit one of them."
            raise contradiction("max_completion_tokens", message)
        if self.stream_options is not None and not self.stream:
            message = "stream_options needs stream; set stream to true, or omit stream_options."
            raise contradiction("stream_options", message)
        return self


class SessionCompletionRequest(GenerationRequest):
    """Continue `prompt`, which follows what the session has read."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=_MAX_PROMPTS, fail_fast=True)] | None = None

    @property
    def prompts(self) -> list[str]:
        """The prompts, which are continued independently."""
        return self.prompt if isinstance(self.prompt, list) else [self.prompt or ""]


class CompletionRequest(SessionCompletionRequest):
    """Continue `prompt`. session: id of a session; the prompt follows what it has read."""

    session: str | None = None


class TextPart(RequestModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(RequestModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> "Message":
        if self.content is None and (self.role != "assistant" or self.refusal is None):
            raise ValueError("a message needs content, unless it is an assistant's refusal.")
        return self

    def for_template(self) -> dict[str, Any]:
        """Role and content, a text or parts, as chat templates expect them."""
        content = self.content or self.refusal or ""
        parts = content if isinstance(content, str) else [{"type": part.type, "text": part.text} for part in content]
        return {"role": self.role, "content": parts}


class ChatCompletionRequest(GenerationRequest):
    """Answer `messages`. With a session they follow what it has read, so only new messages need to be sent."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    session: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # variables of the chat template


class Usage(BaseModel):
    """Tokens of this request, without those of a session; a prompt with several choices counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AssistantMessage(BaseModel):
    """A generated message."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class _Choice(BaseModel):
    index: int
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None


class CompletionChoice(_Choice):
    """A text generated after one prompt."""

    text: str


class ChatChoice(_Choice):
    """One answer to a conversation."""

    message: AssistantMessage


class _Response(BaseModel):
    id: str
    created: int
    model: str


class Completion(_Response):
    """Generated texts, or an event of a stream. usage: null in a stream, except in the last event."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None


class ChatCompletion(_Response):
    """Answers to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """All models; there is one."""

    object: Literal["list"]
    data: list[ModelCard]
