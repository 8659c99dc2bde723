"""Requests and responses of OpenAI's completions, and what those of chat completions share with them.

Not OpenAI's are the fields `session`, `learn`, `notebook`, `passages`, `top_k` and `min_p`, and `sources` in answers.

Lists end at their first error: with all the errors of a long list, a request would take a thousand times its size.
"""

import secrets
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ttt_e2e.inference.sampling import SamplingOptions
from ttt_e2e.retrieval.generate import MAX_PASSAGES
from ttt_e2e.server.api.logprobs import CompletionLogprobs
from ttt_e2e.server.engine.records import Source

MAX_TOKENS, DEFAULT_TOKENS = 131_072, 200  # per generated text; agents ask for 32,000 and 64,000
MAX_LOGPROBS, _MAX_BIASES = 20, 1024
_MAX_PROMPTS, _MAX_CHOICES, _MAX_STOPS, MAX_MESSAGES, MAX_PARTS = 20, 8, 4, 1000, 1000

LogitBias = Annotated[
    dict[Annotated[str, Field(pattern="^[0-9]{1,7}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=_MAX_BIASES),
]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


def _check_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text holds half of a surrogate pair; remove it.") from error
    return text


Text = Annotated[str, AfterValidator(_check_characters)]
"""A text that is sent back or stored, and so must be one."""


class RequestModel(BaseModel):
    """Refuses strings in place of numbers, NaN and infinity; `fields` decides about fields that are not declared."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


def contradiction(param: str, message: str) -> PydanticCustomError:
    """The error of a field, named `param`, that contradicts others, for a validator to raise."""
    return PydanticCustomError("contradiction", message, {"param": param})


class NotebookRequest(RequestModel):
    """What of a session's notebook the model is shown.

    notebook: whether it is shown passages that match the question; by default if the session keeps a notebook.
    passages: how many at most; default 3.
    """

    notebook: bool | None = None
    passages: int | None = Field(None, ge=1, le=MAX_PASSAGES)


class SamplingRequest(NotebookRequest):
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


class BaseCompletionRequest(SamplingRequest):
    """How to generate; at most 200 tokens by default.

    learn: make prompt and generated text part of the session.
    """

    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    n: int | None = Field(None, ge=1, le=_MAX_CHOICES)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=_MAX_STOPS, fail_fast=True)] | None = None
    stream_options: StreamOptions | None = None
    learn: bool | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> "BaseCompletionRequest":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            message = "max_tokens and max_completion_tokens mean the same; omit one of them."
            raise contradiction("max_completion_tokens", message)
        if self.stream_options is not None and not self.stream:
            message = "stream_options needs stream; set stream to true, or omit stream_options."
            raise contradiction("stream_options", message)
        return self

    @property
    def token_limit(self) -> int:
        """How many tokens to generate at most."""
        given = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        return DEFAULT_TOKENS if given is None else given

    @property
    def tries(self) -> int:
        """How many texts to generate after a prompt."""
        return self.n or 1

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens to tell with each token; None for no log-probabilities."""
        return None

    @property
    def logit_biases(self) -> dict[int, float]:
        """The biases by token ids."""
        return {int(id): bias for id, bias in (self.logit_bias or {}).items()}

    def sampling_options(self) -> SamplingOptions:
        """The options with a seed."""
        return replace(
            super().sampling_options(),
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=self.logit_biases,
        )


class SessionCompletionRequest(BaseCompletionRequest):
    """Continue `prompt`, texts or token ids, which follows what the session has read.

    logprobs: tell the log-probability of every token, and of this many of the likeliest tokens in its place. echo:
    begin with the prompt. best_of: of so many texts, give the n with the highest mean log-probability of a token.
    """

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=_MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=_MAX_PROMPTS, fail_fast=True)]
        | None
    ) = None
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | Literal[False] | None = None
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=_MAX_CHOICES)

    @model_validator(mode="after")
    def _check_completion(self) -> "SessionCompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise contradiction("max_tokens", "max_tokens: 0 needs echo; send at least 1, or set echo to true.")
        if self.tries < (self.n or 1):
            raise contradiction("best_of", "best_of must be at least n; omit one of them.")
        if self.tries > (self.n or 1) and self.stream:
            raise contradiction("best_of", "best_of compares whole texts; omit it, or omit stream.")
        if self.echo and self.learn and self.num_logprobs is not None:
            message = "echo with logprobs tells what a session has not learned yet; omit learn, or one of them."
            raise contradiction("echo", message)
        if self.echo and self.notebook:
            raise contradiction("notebook", "notebook puts passages before the prompt; omit it, or omit echo.")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, which are continued independently."""
        prompt: Any = self.prompt or ""
        return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]

    @property
    def prompt_ids(self) -> Iterator[int]:
        """All token ids in the prompts."""
        return (id for prompt in self.prompts if isinstance(prompt, list) for id in prompt)

    @property
    def tries(self) -> int:
        """How many texts to generate after a prompt."""
        return self.best_of or self.n or 1

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens to tell with each token; None for no log-probabilities."""
        return None if self.logprobs is False else self.logprobs


class CompletionRequest(SessionCompletionRequest):
    """Continue `prompt`. session: id of a session; the prompt follows what it has read."""

    session: str | None = None


class Usage(BaseModel):
    """Tokens of this request, without those of a session; a prompt with several choices counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class BaseChoice(BaseModel):
    """What choices of both kinds have."""

    index: int
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class CompletionChoice(BaseChoice):
    """A text generated after one prompt. sources: the passages of a notebook that the model was shown, where it was."""

    text: str
    sources: list[Source] | None = None
    logprobs: CompletionLogprobs | None


class BaseCompletion(BaseModel):
    """What completions of both kinds have."""

    id: str
    created: int
    model: str


class Completion(BaseCompletion):
    """Generated texts, or an event of a stream. usage: null in a stream, except in the last event."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None


class ModelCard(BaseModel):
    """The model that is served, with the fields of OpenAI's API and of Anthropic's."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    type: Literal["model"]
    display_name: str
    created_at: datetime
    lifecycle: Literal["active"]
    max_tokens: int


class ModelList(BaseModel):
    """All models; there is one."""

    object: Literal["list"]
    data: list[ModelCard]
    first_id: str
    last_id: str
    has_more: Literal[False]
