"""A generated text while its tokens come: what of it is given out when, with log-probabilities, and what is learned."""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Literal

import numpy as np

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.inference.pool_requests import Event, PromptLogprobs, Token
from ttt_e2e.inference.sampling import TokenLogprob
from ttt_e2e.inference.text_stream import TextStream
from ttt_e2e.server.engine.records import GenerateRequest, LoggedToken, TextChunk

_ANCHOR = "a"  # some tokenizers drop the space of the first token


class TokenTexts:
    """What single tokens are as text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self._anchor = tokenizer, tokenizer.encode(_ANCHOR).tolist()
        self._texts = {id: text for text, id in tokenizer.special.items()}

    def text(self, token: int) -> str:
        """The text of a token; of a part of a character U+FFFD, and of a special token its name."""
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode([*self._anchor, token]).removeprefix(_ANCHOR)
        return self._texts[token]

    def describe(self, logprobs: Sequence[TokenLogprob]) -> tuple[LoggedToken, ...]:
        """The tokens with their texts in place of ids."""
        return tuple(
            LoggedToken(self.text(one.token), one.logprob, tuple((self.text(id), value) for id, value in one.top))
            for one in logprobs
        )


class GeneratedText:
    """The chunks of a text that is generated, of which the first has the sources.

    Args:
        request: what it is generated for.
        before, ids: the tokens that come before the prompt, of which the last few are enough, and those of the prompt.
        token_texts: of the model's tokens.
    """

    def __init__(self, request: GenerateRequest, before: np.ndarray, ids: np.ndarray, token_texts: TokenTexts) -> None:
        tokenizer = token_texts.tokenizer
        self._stream = TextStream(tokenizer, request.stop, np.concatenate((before, ids)))
        self._prompt_tokens, self._sources = len(ids), request.sources
        self._token_texts = None if request.logprobs is None else token_texts
        self._echo: str | None = None  # the prompt, until it is given out
        if request.echo:
            self._echo = request.prompt if isinstance(request.prompt, str) else tokenizer.decode(ids)
        self._tokens: list[int] = []
        self._complete = 0  # how many of the tokens have been given out as text entirely
        self._logprobs: list[TokenLogprob] = []  # of tokens in the order of the text; those given out are removed
        self.whole = ""

    @property
    def num_tokens(self) -> int:
        """How many tokens were added."""
        return len(self._tokens)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._stream.stopped_by is not None

    def add(self, event: Event) -> Iterator[TextChunk]:
        """Add what an event tells; yields the text that cannot change any more, if there is any.

        The prompt, if it is to be given out, comes once all its log-probabilities have been added.
        """
        if isinstance(event, PromptLogprobs):
            self._logprobs += event.logprobs
            return
        if self._echo is not None:
            yield self._chunk(self._echo, None, len(self._logprobs))
            self._echo = None
        if isinstance(event, Token):
            self._tokens.append(event.token)
            if event.logprob:
                self._logprobs.append(event.logprob)
            text = self._stream.add(event.token)
            if not self._stream.has_pending:
                self._complete = len(self._tokens)
            self.whole += text
            if text:
                yield self._chunk(text, None, self._logged(self._complete))

    def end(self, reason: Literal["stop", "length"]) -> TextChunk:
        """The last chunk. Log-probabilities of tokens that a stop string has cut are left out."""
        kept = len(self._tokens)
        if self.stopped:
            pairs = zip(self.learned_tokens(), self._tokens, strict=False)
            kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        rest = self._stream.flush()
        self.whole += rest
        return self._chunk(rest, reason, self._logged(kept))

    def learned_tokens(self) -> list[int]:
        """The tokens of the text that was given out; one that was cut is encoded anew."""
        partly = self._stream.emitted_tokens() if self._complete < len(self._tokens) else []
        return [*self._tokens[: self._complete], *partly]

    def _logged(self, tokens: int) -> int:
        """How many log-probabilities there are up to the first `tokens` tokens."""
        return max(0, len(self._logprobs) - (len(self._tokens) - tokens))

    def _chunk(self, text: str, reason: Literal["stop", "length"] | None, logged: int) -> TextChunk:
        tokens, stop = len(self._tokens), self._stream.stopped_by if reason else None
        sources, self._sources = self._sources, None
        if self._token_texts is None:
            return TextChunk(text, reason, self._prompt_tokens, tokens, stop, None, sources)
        told, self._logprobs = self._logprobs[:logged], self._logprobs[logged:]
        return TextChunk(text, reason, self._prompt_tokens, tokens, stop, self._token_texts.describe(told), sources)
