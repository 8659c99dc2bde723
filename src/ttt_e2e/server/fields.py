"""What requests and answers of OpenAI's two ways of writing look like."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, WithJsonSchema, model_validator

MAX_TOKENS = 16_384  # of one answer
DEFAULT_TOKENS = 200
PROMPTS, CHOICES, STOPS = 16, 8, 4

Stop = Annotated[str, Field(min_length=1, max_length=256)]


def _only(*defaults: Any) -> Any:
    """A field of OpenAI's that this service cannot serve: nothing but its defaults may stand there."""
    allowed = [*defaults, None]

    def check(value: Any, info: ValidationInfo) -> Any:
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            raise ValueError(f"this server cannot do that; leave {info.field_name} out")
        return value

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": allowed})]


class _Strict(BaseModel):
    """Unknown fields, texts for numbers, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=False)


class StreamOptions(_Strict):
    """include_usage: whether a last event counts the tokens."""

    include_usage: bool = False
    include_obfuscation: _only(False) = None  # type: ignore[valid-type]


class Writing(_Strict):
    """How to write. What is left out is as on the command line: temperature 0.8, top_p 0.95, another seed each time.

    learn: what is given and what is written becomes part of the session.
    """

    model: str | None = Field(None, max_length=256)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    n: int | None = Field(None, ge=1, le=CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    learn: bool | None = None
    user: str | None = Field(None, max_length=256, description="taken, and not used")
    frequency_penalty: _only(0) = None  # type: ignore[valid-type]
    presence_penalty: _only(0) = None  # type: ignore[valid-type]
    logit_bias: _only({}) = None  # type: ignore[valid-type]
    service_tier: _only("auto", "default") = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _agree(self) -> "Writing":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same thing; leave one of them out.")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; set stream, or leave it out.")
        return self

    @property
    def tokens(self) -> int:
        """Tokens to write at most."""
        return self.max_tokens or self.max_completion_tokens or DEFAULT_TOKENS

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_at_end(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class SessionCompletionRequest(Writing):
    """Write on after `prompt`, which follows on what the session has read."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=PROMPTS)] | None = None
    logprobs: _only() = None  # type: ignore[valid-type]
    echo: _only(False) = None  # type: ignore[valid-type]
    best_of: _only(1) = None  # type: ignore[valid-type]
    suffix: _only("") = None  # type: ignore[valid-type]

    @property
    def prompts(self) -> list[str]:
        """The prompts; each is written on by itself."""
        return self.prompt if isinstance(self.prompt, list) else [self.prompt or ""]


class CompletionRequest(SessionCompletionRequest):
    """Write on after `prompt`. session: the id of a session, on whose text the prompt follows."""

    session: str | None = None


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    refusal: str | None = None
    # What comes with an answer of OpenAI's, and back with the conversation.
    name: _only() = None  # type: ignore[valid-type]
    audio: _only() = None  # type: ignore[valid-type]
    annotations: _only([]) = None  # type: ignore[valid-type]
    tool_calls: _only([]) = None  # type: ignore[valid-type]
    function_call: _only() = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and (self.role != "assistant" or self.refusal is None):
            raise ValueError("a message needs content; only an assistant's refusal has none.")
        return self

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates take them."""
        parts = self.content or self.refusal or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": text}


class ChatRequest(Writing):
    """Answer `messages`. With a session they follow on its text, so that only new ones are sent."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    session: str | None = None
    logprobs: _only(False) = None  # type: ignore[valid-type]
    top_logprobs: _only(0) = None  # type: ignore[valid-type]
    response_format: _only({"type": "text"}) = None  # type: ignore[valid-type]
    tools: _only([]) = None  # type: ignore[valid-type]
    tool_choice: _only("none") = None  # type: ignore[valid-type]
    parallel_tool_calls: _only(True, False) = None  # type: ignore[valid-type]
    functions: _only([]) = None  # type: ignore[valid-type]
    function_call: _only("none") = None  # type: ignore[valid-type]
    modalities: _only(["text"]) = None  # type: ignore[valid-type]
    audio: _only() = None  # type: ignore[valid-type]
    store: _only(False) = None  # type: ignore[valid-type]
    metadata: _only({}) = None  # type: ignore[valid-type]
    reasoning_effort: _only("none") = None  # type: ignore[valid-type]


class Usage(BaseModel):
    """Tokens of this request, not of a session; a prompt that is written on several times counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


Finish = Literal["stop", "length"] | None


class TextChoice(BaseModel):
    """What was written after one prompt."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: Finish


class Completion(BaseModel):
    """Texts, or, in a stream, a piece of one. usage: null in a stream but for its last event."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None


class Answer(BaseModel):
    """An assistant's message."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: Answer
    logprobs: None = None
    finish_reason: Finish


class ChatCompletion(BaseModel):
    """Answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """All models: there is one."""

    object: Literal["list"]
    data: list[ModelCard]
