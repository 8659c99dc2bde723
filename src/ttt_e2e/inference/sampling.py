"""From logits to a token, and from tokens to text: what writing needs, apart from any model.

A token is drawn in this order: the temperature first, then top-k, top-p and min-p, each on what the one before it left,
with probabilities that add up to one again. (Min-p compares with the likeliest token, which no filter takes away, so
its place does not matter; top-k and top-p would leave other tokens the other way round.)

Shapes: V tokens of the vocabulary, from the likeliest on where they are probabilities.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError

_BROKEN = "\ufffd"  # what a tokenizer gives for a character whose bytes are not all there
CONTEXT = 16  # tokens before a text that are looked at to decode it: more than a character has bytes


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is drawn.

    temperature: logits are divided by it; 0 always takes the likeliest token. top_k: draw among so many of the
    likeliest tokens; 0 is all. top_p, in (0, 1]: among the likeliest that have this probability together. min_p, in
    [0, 1]: among those that have at least this share of the likeliest one's probability. seed: the same one draws
    alike. Raises UserError for numbers out of range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, sound, range_ in (
            ("temperature", 0 <= self.temperature < math.inf, "a number from 0 on"),
            ("top_k", self.top_k >= 0, "a whole number from 0 on, where 0 is all tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("seed", 0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
        ):
            if not sound:
                raise UserError(f"{name} must be {range_}, not {getattr(self, name)}.")


def sample(logits_V: Tensor, options: SamplingOptions, generator: torch.Generator) -> int:
    """Draw a token from finite logits on the CPU; it is computed in float64.

    The generator is what changes from token to token; `options.seed` is for whoever makes it.
    """
    if options.temperature == 0:
        return int(logits_V.argmax())
    # Less the largest: then no temperature is so small that a quotient overflows.
    logits_V = (logits_V - logits_V.max()).double() / options.temperature
    p_V, order_V = logits_V.softmax(-1).sort(descending=True, stable=True)
    if options.top_k:
        p_V = top_k(p_V, options.top_k)
    if options.top_p < 1:
        p_V = top_p(p_V, options.top_p)
    if options.min_p:
        p_V = min_p(p_V, options.min_p)
    return int(order_V[torch.multinomial(p_V, 1, generator=generator)])


def top_k(p_V: Tensor, k: int) -> Tensor:
    """The k likeliest tokens (Fan et al. 2018, arXiv 1805.04833); of equally likely ones the first."""
    kept_V = torch.zeros_like(p_V)
    kept_V[:k] = p_V[:k]
    return kept_V / kept_V.sum()


def top_p(p_V: Tensor, p: float) -> Tensor:
    """The fewest tokens, from the likeliest on, with a probability of at least p (Holtzman et al. 2019, 1904.09751)."""
    kept_V = p_V.masked_fill(p_V.cumsum(-1) - p_V >= p, 0.0)
    return kept_V / kept_V.sum()


def min_p(p_V: Tensor, p: float) -> Tensor:
    """The tokens at least p times as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082)."""
    kept_V = p_V.masked_fill(p_V < p * p_V[0], 0.0)
    return kept_V / kept_V.sum()


class TextStream:
    """Tokens as text, given out in whole characters as soon as it is sure, up to the first stop string.

    A character waits until all its bytes are there, and what may be the beginning of a stop string until it turns out
    not to be. stop: one string or several; the text ends before the one that is complete first. before: tokens that the
    text goes on from; the last few are enough. Raises UserError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] = (), before: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise UserError("A stop string is empty, so there would be no text at all; leave it out.")
        # Some tokenizers drop a space where a text begins, so decoding needs what came before.
        self._context = [*before][-CONTEXT:]
        while self._context and tokenizer.decode(self._context).startswith(_BROKEN):
            del self._context[0]  # it is the end of a character
        self._tokens: list[int] = []
        self._text = ""  # of those tokens
        self._given = 0  # so many of its characters have been given out
        self.stopped = False  # a stop string has come

    @property
    def waiting(self) -> bool:
        """Whether anything that was added has not been given out."""
        return self._given < len(self._text)

    def add(self, token: int) -> str:
        """The text that this token makes sure; it may be empty."""
        if not self.waiting:
            self._context, self._tokens, self._given = self._tokens or self._context, [], 0
        self._tokens.append(token)
        self._text = self._decode(self._tokens)
        whole = self._text.rstrip(_BROKEN)  # some tokenizers give one for every byte of a character begun
        found = [(at + len(stop), at) for stop in self._stop if (at := whole.find(stop, self._given)) >= 0]
        self.stopped = bool(found)
        return self._give(min(found)[1] if found else len(whole) - begun(whole, self._stop))

    def rest(self) -> str:
        """What still waits when no more tokens come; a character that was never finished is left out."""
        return "" if self.stopped else self._give(len(self._text.rstrip(_BROKEN)))

    def tokens_given(self) -> list[int]:
        """Tokens of exactly the text given out, since last nothing was waiting; a token that was cut is made anew."""
        given = self._text[: self._given]
        counts = range(len(self._tokens), -1, -1)
        whole = next(n for n in counts if given.startswith(self._decode(self._tokens[:n])))
        kept = self._tokens[:whole]
        return [*kept, *self._tokenizer.encode(given[len(self._decode(kept)) :]).tolist()]

    def _give(self, stop: int) -> str:
        text = self._text[self._given : max(stop, self._given)]
        self._given += len(text)
        return text

    def _decode(self, tokens: list[int]) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + tokens)[len(before) :]


def begun(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    lengths = (n for one in stop for n in range(min(len(one) - 1, len(text)), 0, -1) if text.endswith(one[:n]))
    return max(lengths, default=0)
