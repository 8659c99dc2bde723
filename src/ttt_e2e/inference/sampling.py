"""Drawing a token from logits, and its log-probability.

The order is: penalties and biases, the mask of a grammar, temperature, top-k, top-p, min-p, each on what the one before
it left, with probabilities that add up to one again. (Min-p compares with the likeliest token, which no filter takes
away, so its place does not matter; top-k and top-p would leave other tokens the other way round.)

Shapes: V tokens of the vocabulary, from the likeliest on where they are probabilities.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ttt_e2e.errors import UserError


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is drawn. Raises UserError for numbers out of range."""

    temperature: float = 0.8  # logits are divided by it; 0 always takes the likeliest token
    top_k: int = 0  # draw from the k likeliest tokens; 0 is all
    top_p: float = 0.95  # draw from the fewest of the likeliest tokens that have this probability together
    min_p: float = 0.0  # draw from tokens with at least this share of the likeliest token's probability
    seed: int = 0  # the same seed draws the same tokens
    frequency_penalty: float = 0.0  # is taken from a token's logit for every time that it was generated
    presence_penalty: float = 0.0  # is taken from a token's logit if it was generated at all
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # is added to tokens' logits, by their ids

    def __post_init__(self) -> None:
        for name, kinds, valid, range_ in (
            ("temperature", (int, float), lambda x: 0 <= x < math.inf, "a number of at least 0"),
            ("top_k", int, lambda x: x >= 0, "a whole number of at least 0, where 0 is all tokens"),
            ("top_p", (int, float), lambda x: 0 < x <= 1, "above 0 and at most 1"),
            ("min_p", (int, float), lambda x: 0 <= x <= 1, "from 0 to 1"),
            ("seed", int, lambda x: 0 <= x < 2**63, "a whole number from 0 to 2^63 - 1"),
            ("frequency_penalty", (int, float), math.isfinite, "a finite number"),
            ("presence_penalty", (int, float), math.isfinite, "a finite number"),
        ):
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool) or not valid(value):
                raise UserError(f"{name} must be {range_}, not {value!r}.")

    @property
    def adjusts_logits(self) -> bool:
        """Whether there are penalties or biases."""
        return bool(self.frequency_penalty or self.presence_penalty or self.logit_bias)


class TokenLogprob(NamedTuple):
    """The log-probability of a token in nats, by the model alone: nothing of `SamplingOptions` has a part in it.

    logprob: None where no token comes before this one. top: the likeliest tokens in its place and theirs, from the
    likeliest on.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def check_max_tokens(max_tokens: int) -> None:
    """Raise UserError unless `max_tokens` can be generated."""
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 0:
        raise UserError(f"Cannot generate {max_tokens!r} tokens; max_tokens must be a whole number of at least 0.")


def adjust_logits(logits_V: Tensor, counts_V: Tensor, options: SamplingOptions) -> Tensor:
    """The logits less what penalties take, plus biases, in float64. counts_V: how often each token was generated.

    These are the formulas of OpenAI's API (its reference, "frequency and presence penalties").
    """
    counts_V = counts_V.double()  # a Python number times whole ones, or times truth values, would be float32
    generated_V = (counts_V > 0).double()
    logits_V = logits_V.double() - options.frequency_penalty * counts_V - options.presence_penalty * generated_V
    logits_V[list(options.logit_bias)] += logits_V.new_tensor(list(options.logit_bias.values()))
    return logits_V


def token_logprob(logits_V: Tensor, token: int, num_top: int) -> TokenLogprob:
    """The log-probability of `token`, and those of the `num_top` likeliest."""
    logprobs_V = logits_V.double().log_softmax(-1)
    top, ids = logprobs_V.topk(min(num_top, len(logprobs_V)))
    return TokenLogprob(token, float(logprobs_V[token]), tuple(zip(ids.tolist(), top.tolist(), strict=True)))


def sample(logits_V: Tensor, options: SamplingOptions, generator: torch.Generator) -> int:
    """Draw a token from logits on the CPU, in float64; minus infinity is for tokens that must not be drawn.

    The generator's state changes from token to token; `options.seed` is for the caller, who makes it.
    """
    if options.temperature == 0:
        return int(logits_V.argmax())
    # Less the largest: then no temperature is so small that a quotient overflows.
    logits_V, order_V = logits_V.sort(descending=True, stable=True)  # a temperature may make them equal
    p_V = ((logits_V - logits_V[0]).double() / options.temperature).softmax(-1)
    p_V = filter_probabilities(p_V, options)
    return int(order_V[torch.multinomial(p_V, 1, generator=generator)])


def filter_probabilities(p_V: Tensor, options: SamplingOptions) -> Tensor:
    """What the filters leave of probabilities that begin with the largest, divided by its sum each time."""
    if 0 < options.top_k < len(p_V):  # Fan et al. 2018, arXiv 1805.04833; of equally likely tokens the first are kept
        p_V = p_V.masked_fill(torch.arange(len(p_V)) >= options.top_k, 0.0)
        p_V = p_V / p_V.sum()
    if options.top_p < 1:  # Holtzman et al. 2019, arXiv 1904.09751
        p_V = p_V.masked_fill(p_V.cumsum(-1) - p_V >= options.top_p, 0.0)
        p_V = p_V / p_V.sum()
    if options.min_p:  # Nguyen et al. 2024, arXiv 2407.01082
        p_V = p_V.masked_fill(p_V < options.min_p * p_V[0], 0.0)
        p_V = p_V / p_V.sum()
    return p_V
