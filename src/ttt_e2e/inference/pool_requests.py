"""What each session of a pool is to do, how far that has come, and the events that tell of it. See `session_pool`.

Shapes: T tokens, V vocabulary.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from ttt_e2e.errors import UserError
from ttt_e2e.inference.grammar import Matcher
from ttt_e2e.inference.row_batch import RowRef
from ttt_e2e.inference.sampling import SamplingOptions, TokenLogprob, adjust_logits, sample, token_logprob
from ttt_e2e.inference.text_digest import TextDigest


class Losses(NamedTuple):
    """The session `id` has read a mini-batch; its losses in nats, float32 [b]."""

    id: int
    losses: np.ndarray


class Token(NamedTuple):
    """The session `id` has generated a token; `logprob` if the request wants it."""

    id: int
    token: int
    logprob: TokenLogprob | None = None


class PromptLogprobs(NamedTuple):
    """Log-probabilities of the next tokens of the prompt of the session `id`, if the request wants them."""

    id: int
    logprobs: list[TokenLogprob]


class Done(NamedTuple):
    """The request that was submitted first to the session `id` is done."""

    id: int
    error: UserError | None = None  # why it failed; the requests that were submitted after it are then dropped


Event = Losses | Token | PromptLogprobs | Done


class Checkpoint(NamedTuple):
    """A good state of a text, and the tokens that were read since, in mini-batches."""

    row: RowRef
    text: TextDigest
    read: tuple[np.ndarray, ...] = ()


@dataclass(eq=False)
class Sequence:
    """A text that advances: a session's own, or the copy that is generated from. Fields as in `SessionState`."""

    row: RowRef
    text: TextDigest
    pending: np.ndarray
    checkpoint: Checkpoint | None = None

    @property
    def rows(self) -> list[RowRef]:
        """The rows that it needs."""
        return [self.row] if self.checkpoint is None else [self.row, self.checkpoint.row]


@dataclass(eq=False)
class Generation:
    """A request to generate.

    left: tokens that may still come. sequence: once it has begun, the copy of the session that it generates from.
    border: if it learns from what it generates, the sequence after the last full mini-batch, with all tokens since then
    pending; None while that is `sequence` itself. top_logprobs: how many likeliest tokens to tell with each token; None
    for no log-probabilities. unscored: tokens at the end of the prompt whose log-probabilities are still to be told.
    counts_V: how often each token was generated, if that matters. matcher: the grammar of the text, if it has one.
    """

    prompt: np.ndarray
    left: int
    options: SamplingOptions
    learn: bool
    generator: torch.Generator
    sequence: Sequence = field(init=False)
    border: Sequence | None = None
    top_logprobs: int | None = None
    unscored: int = 0
    counts_V: torch.Tensor | None = None
    matcher: Matcher | None = None

    def draw(self, logits_V: torch.Tensor, end_ids: Collection[int]) -> int:
        """Draw the next token, and count it. One of `end_ids` ends the text, and so does a grammar that is complete.

        Raises UserError if the grammar turns out to be too complex.
        """
        if self.counts_V is not None:
            logits_V = adjust_logits(logits_V, self.counts_V, self.options)
        if self.matcher is not None:
            logits_V = self.matcher.mask(logits_V)
        token = sample(logits_V, self.options, self.generator)
        ends = token in end_ids
        if self.matcher is not None and not ends:
            self.matcher.add(token)
        if self.counts_V is not None:
            self.counts_V[token] += 1
        is_last = ends or (self.matcher is not None and self.matcher.complete)
        self.left = 0 if is_last else self.left - 1
        return token

    def prompt_logprobs(self, ids_T: np.ndarray, logits_TV: torch.Tensor) -> list[TokenLogprob]:
        """The log-probabilities of those prompt tokens among `ids_T`, the first pending ones, that have none yet.

        logits_TV: after each of them; those after the last one may be missing.
        """
        assert self.top_logprobs is not None
        first = len(self.sequence.pending) - self.unscored
        logprobs = []
        for t, token in enumerate(ids_T[first:].tolist(), first):
            known = token_logprob(logits_TV[t - 1].float().cpu(), token, self.top_logprobs) if t else None
            logprobs.append(known or TokenLogprob(token, None))
        return logprobs


@dataclass(eq=False)
class Slot:
    """A session of the pool, and its requests."""

    id: int
    own: Sequence
    queue: deque[np.ndarray | Generation] = field(default_factory=deque)  # its requests; a read is its tokens
    job: np.ndarray | Generation | None = None  # the request in progress
    waiting_since: int = 0  # the step of its last turn

    @property
    def sequence(self) -> Sequence:
        """The sequence that advances."""
        return self.job.sequence if isinstance(self.job, Generation) else self.own
