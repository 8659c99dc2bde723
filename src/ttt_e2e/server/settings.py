"""What the operator decides about the HTTP service."""

from dataclasses import dataclass, field

from ttt_e2e.server.chat import ChatFormat
from ttt_e2e.server.middleware.access import Limits
from ttt_e2e.server.middleware.keys import Keys


@dataclass(frozen=True)
class Settings:
    """model_name: the name of the model in the API. keys: without any, all clients are one owner."""

    model_name: str
    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    chat: ChatFormat = field(default_factory=ChatFormat)
