"""What the engine tells: of sessions, of reading, of writing, and of what it refuses."""

from collections.abc import Sequence
from dataclasses import dataclass

from ttt_e2e.errors import UserError

Prompt = str | Sequence[str | int]
"""A text, or texts with token ids between them."""


class NoSession(UserError):  # noqa: N818 - it is a state of affairs, as KeyboardInterrupt is
    """This owner has no session of that name; another owner's looks the same."""

    def __init__(self) -> None:
        super().__init__("There is no such session; it was deleted, or its name is another.")


class TooMuch(UserError):  # noqa: N818 - as above
    """A limit of the engine is reached: sessions of an owner, or tokens of a session."""


class Stopping(UserError):  # noqa: N818 - as above
    """The engine is about to end, and does nothing more."""

    def __init__(self) -> None:
        super().__init__("The service is stopping, so this was not done; try again when it is back.")


@dataclass(frozen=True)
class SessionRecord:
    """What there is to know of a session.

    id: "sess-" and 32 hex digits. created: Unix time. tokens: read so far, BOS and pending ones included. text_bytes,
    text_digest, memory_bytes, learn: as in `SessionInfo`. in_memory: False if it is on disk only, until it is asked
    for. error: why it cannot be used, if its file is damaged; the numbers are zero then.
    """

    id: str
    created: float
    tokens: int
    text_bytes: int | None
    text_digest: str
    memory_bytes: int
    learn: bool
    in_memory: bool
    error: str | None = None


@dataclass(frozen=True)
class Progress:
    """How far a reading has come.

    tokens: of this text, so far, that have a loss. loss: nats per token, mean of those that came since the last
    Progress; total_loss: of all of this text so far; None if there are none. saved: in the last Progress alone, once
    the session is on disk with all of this text.
    """

    tokens: int
    loss: float | None
    total_loss: float | None
    saved: SessionRecord | None = None


@dataclass(frozen=True)
class Piece:
    """A piece of what is written.

    finish_reason: None but in the last one: "stop" at a document's end or a stop string, else "length".
    prompt_tokens: of this request's prompt, not of the session. completion_tokens: so far.
    """

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
