"""Log-probabilities in the forms of OpenAI's completions and chat completions."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from ttt_e2e.server.engine.records import LoggedToken


class CompletionLogprobs(BaseModel):
    """The tokens of a text. text_offset: where each begins; a token that is a part of a character counts as one."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class ChatTokenLogprob(BaseModel):
    """A token and its log-probability. bytes: null for a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(ChatTokenLogprob):
    """A token, and the likeliest ones in its place."""

    top_logprobs: list[ChatTokenLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of an answer."""

    content: list[ChatToken]
    refusal: None


def completion_logprobs(tokens: Sequence[LoggedToken], offset: int) -> dict[str, Any]:
    """As in a completion; the first token begins at `offset`. As in OpenAI's API, the token is among the likeliest."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        # Of tokens with the same text, such as parts of characters, the likeliest one counts.
        "top_logprobs": [
            None if one.logprob is None else dict(sorted([*one.top, (one.text, one.logprob)], key=lambda pair: pair[1]))
            for one in tokens
        ],
        "text_offset": offsets,
    }


def chat_logprobs(tokens: Sequence[LoggedToken]) -> dict[str, Any]:
    """As in a chat completion."""
    content = [
        _chat_token(token.text, token.logprob) | {"top_logprobs": [_chat_token(*one) for one in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _chat_token(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else [*text.encode()]}
