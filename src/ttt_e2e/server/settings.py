"""What the operator decides about the HTTP service."""

from dataclasses import dataclass, field

from ttt_e2e.server.chat import ChatFormat
from ttt_e2e.server.keys import Keys


@dataclass(frozen=True)
class Settings:
    """What the service is called, how it formats messages, and what one client may request.

    model_name: in the API. keys: without any, all clients are one owner. body_bytes: size of a text. file_bytes: size
    of a session file, if more than `body_bytes`. requests_per_minute: per key. refusals_per_minute: how many requests
    without a valid key are answered in full, per address of a client. generations: how many a key may have running at
    once; further ones wait. open_requests: how many a key may have open at once; further ones are refused.
    """

    model_name: str
    keys: Keys = field(default_factory=Keys)
    chat: ChatFormat = field(default_factory=ChatFormat)
    body_bytes: int = 64 << 20
    file_bytes: int = 0
    requests_per_minute: int = 600
    refusals_per_minute: int = 60
    generations: int = 32
    open_requests: int = 128
