"""What the engine takes and returns, and the errors it raises. The HTTP API sends summaries and progress unchanged."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ttt_e2e.errors import UserError
from ttt_e2e.inference.grammar import Grammar
from ttt_e2e.inference.sampling import SamplingOptions
from ttt_e2e.inference.session import Session

Prompt = str | Sequence[int]
"""A text, or token ids."""

Before = Literal["nothing", "text", "conversation", "other tools"]
"""What a session holds: BOS alone, texts that it has read, or a conversation that it has learned from, among texts.

"other tools": a conversation in which the functions that may be called now have not been named.
"""

ChatPrompt = Callable[[Before], Prompt]
"""Makes the prompt of a conversation, given what the session holds before it."""


class SessionNotFoundError(UserError):
    """The owner has no session with this id. Another owner's session gives the same error."""

    def __init__(self) -> None:
        super().__init__("There is no such session; it may have been deleted.")


class DamagedSessionError(UserError):
    """The file of a session is missing, or does not hold what was written to it; the log has its path."""

    def __init__(self, message: str = "This session's file is damaged") -> None:
        super().__init__(f"{message}; delete the session, or import a copy of it.")


class DamagedNotebookError(DamagedSessionError):
    """Likewise of a notebook. The session works without it."""

    def __init__(self) -> None:
        super().__init__("This session's notebook is damaged; go on without it (notebook: false)")


class NoNotebookError(UserError):
    """The session keeps no notebook."""

    def __init__(self) -> None:
        super().__init__("This session keeps no notebook; create one with notebook: true, and let it read the text.")


class TakenOverError(UserError):
    """Another replica has taken the session over, and nothing was changed."""

    def __init__(self) -> None:
        super().__init__("Another replica has taken this session over; nothing of this was saved. Send it again.")


class LimitReachedError(UserError):
    """A limit is reached: the number of sessions per owner, or of tokens per session."""


class PromptTooLongError(UserError):
    """A prompt has too many tokens to tell all their log-probabilities."""

    def __init__(self, tokens: int, most: int) -> None:
        super().__init__(
            f"echo: with these logprobs a prompt may have {most:,} tokens, and this one has {tokens:,}; send less."
        )


class StoppingError(UserError):
    """The engine is stopping and accepts no more work."""

    def __init__(self) -> None:
        super().__init__("The service is stopping and did not do this; try again when it is back.")


@dataclass(frozen=True)
class NotebookRecord:
    """A notebook: the exact text that a session has read.

    file: its folder in the store. digest: SHA-256 of the database in it. bytes: size of the database. characters,
    text_bytes: length of the text, and in UTF-8. documents: the names of the last texts in it.
    """

    file: str
    digest: str
    bytes: int
    characters: int
    text_bytes: int
    documents: list[str]


@dataclass(frozen=True)
class NotebookSummary:
    """A notebook: the exact text that a session has read, which can be searched.

    characters: length of the text. bytes: size on the server's disk. documents: the names of the last 20 texts in it.
    """

    characters: int
    bytes: int
    documents: list[str]


@dataclass(frozen=True)
class Source:
    """A passage of a notebook: characters `start` to `stop` of a document.

    document: its name; null if it has none. length: of the document, in characters. score: how well the passage fits
    the question; comparable within one search.
    """

    document: str | None
    start: int
    stop: int
    length: int
    text: str
    score: float


@dataclass(frozen=True)
class SessionSummary:
    """A session. Where its file is damaged, `error` says so and the numbers are zero.

    id: "sess-" and 32 hex digits. created: Unix time. tokens: tokens read so far, including the BOS token and those
    that wait for a full mini-batch. text_bytes: size of the text read, in UTF-8; null if the tokenizer does not work
    on bytes. text_digest: SHA-256 of the tokens read. memory_bytes: size of the session's state. learn: whether the
    session learns from what it reads. in_memory: false while the session is on disk only, until it is next used.
    notebook: null if it keeps none.
    """

    id: str
    object: Literal["session"] = field(default="session", kw_only=True)
    created: int
    tokens: int = 0
    text_bytes: int | None = None
    text_digest: str = ""
    memory_bytes: int = 0
    learn: bool = False
    in_memory: bool = False
    error: str | None = None
    notebook: NotebookSummary | None = None


@dataclass(frozen=True)
class ReadProgress:
    """How far a session has read a text.

    tokens: tokens of this text that have a loss so far. loss: their mean loss in nats per token; null while there are
    none. recent_loss: the mean over the tokens since the previous event. session: null until the whole text is read
    and the session is saved. bytes: about how much of the text that is.
    """

    object: Literal["session.read"] = field(default="session.read", kw_only=True)
    tokens: int
    loss: float | None
    recent_loss: float | None
    session: SessionSummary | None = None
    bytes: int = 0


@dataclass(frozen=True)
class LoggedToken:
    """A token as text, and its log-probability in nats; None for the first one of a text.

    top: the likeliest tokens in its place and theirs.
    """

    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class TextChunk:
    """The next part of a generated text.

    finish_reason: None except in the last chunk: "stop" at a stop string or at a token that ends texts, else "length".
    prompt_tokens: those of the request's prompt alone. completion_tokens: those generated so far. stop: the stop string
    before which the text ended, in the last chunk. logprobs: the tokens whose text is complete with this chunk, where
    log-probabilities are wanted. sources: in the first part, the passages of a notebook that the model was given; None
    without one.
    """

    text: str
    finish_reason: Literal["stop", "length"] | None
    prompt_tokens: int
    completion_tokens: int
    stop: str | None = None
    logprobs: tuple[LoggedToken, ...] | None = None
    sources: tuple[Source, ...] | None = None


@dataclass(frozen=True)
class GenerateRequest:
    """A text that `Engine.generate` is to generate after what a session has read."""

    prompt: Prompt | ChatPrompt  # its ids begin the text of an empty session, in place of BOS
    kept: Prompt | ChatPrompt | None = None  # what is learned in place of `prompt`, which has passages, say
    sources: tuple[Source, ...] | None = None  # the passages in the prompt, for the first chunk
    max_tokens: int = 200  # limit of generated tokens
    stop: Sequence[str] = ()  # strings before which the text ends
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    learn: bool = False  # make prompt and text part of the session
    closing: Prompt = ""  # what the session reads after the text, with `learn`
    # With `learn`, called with the new version of the session, the whole text and the last chunk. The session itself is
    # then not replaced, and other requests need not wait.
    save: Callable[[Session, str, TextChunk], Awaitable[object]] | None = None
    logprobs: int | None = None  # tell them of every token, and of this many of the likeliest in its place
    echo: bool = False  # begin with the prompt, which must not be a function; not with `logprobs` and `learn`
    grammar: Grammar | None = None  # what the text must match; it ends once it is complete
    tools: str = ""  # a digest of the functions that the prompt, a function, names
