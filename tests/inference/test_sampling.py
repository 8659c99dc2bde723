"""Drawing a token, held against its definition."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.errors import UserError
from ttt_e2e.inference.sampling import (
    SamplingOptions,
    adjust_logits,
    check_max_tokens,
    filter_probabilities,
    sample,
    token_logprob,
)


def expected_probabilities(p: list[float], options: SamplingOptions) -> list[float]:
    """The probabilities that `sample` should draw with, token by token by the definitions."""
    weights = [q ** (1 / options.temperature) for q in p]
    p = [w / sum(weights) for w in weights]
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    kept = order[: options.top_k] if options.top_k else order
    mass, so_far, nucleus = sum(p[i] for i in kept), 0.0, []
    for i in kept:
        if so_far >= options.top_p * mass and options.top_p < 1:
            break
        nucleus.append(i)
        so_far += p[i]
    kept = [i for i in nucleus if p[i] >= options.min_p * p[order[0]]]
    return [p[i] / sum(p[j] for j in kept) if i in kept else 0.0 for i in range(len(p))]


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(1.0, top_p=1),
        SamplingOptions(0.5, top_p=1),
        SamplingOptions(2.0, top_p=0.72),
        SamplingOptions(1.0, top_k=3, top_p=1),
        SamplingOptions(1.0, top_k=3, top_p=0.8),  # 0.8 of what top-k left is two tokens; of all it would be three
        SamplingOptions(1.0, top_p=1, min_p=0.3),
        SamplingOptions(3.0, top_k=4, top_p=0.9, min_p=0.65),
    ],
)
def test_sample_draws_with_the_defined_probabilities(options: SamplingOptions) -> None:
    p = [0.05, 0.4, 0.15, 0.3, 0.1]
    generator = torch.Generator().manual_seed(options.seed)
    count = 3000
    drawn = Counter(sample(torch.tensor(p).log(), options, generator) for _ in range(count))
    expected = expected_probabilities(p, options)
    assert 0 in expected or (options.top_p == 1 and not options.top_k and not options.min_p)
    for i, q in enumerate(expected):
        assert abs(drawn[i] / count - q) <= 5 * math.sqrt(q * (1 - q) / count)  # so nothing where it is zero


@given(
    logits=st.lists(st.floats(-30, 30), min_size=1, max_size=12),
    k=st.integers(1, 12),
    p=st.floats(0.01, 1),
)
@settings(max_examples=60, deadline=None)
def test_filters_keep_the_likeliest_tokens(logits: list[float], k: int, p: float) -> None:
    p_V = torch.tensor(logits, dtype=torch.float64).softmax(-1).sort(descending=True)[0]
    filters = SamplingOptions(top_k=k, top_p=1), SamplingOptions(top_p=p), SamplingOptions(top_p=1, min_p=p)
    top_k_V, top_p_V, min_p_V = (filter_probabilities(p_V, options) for options in filters)
    for kept_V in (top_k_V, top_p_V, min_p_V):
        assert kept_V[0] > 0 and float(kept_V.sum()) == pytest.approx(1)
        count = int((kept_V > 0).sum())
        torch.testing.assert_close(kept_V[:count], p_V[:count] / p_V[:count].sum())
    assert int((top_k_V > 0).sum()) <= k
    nucleus = int((top_p_V > 0).sum())
    assert p_V[:nucleus].sum() >= p - 1e-9 and (nucleus == 1 or p_V[: nucleus - 1].sum() < p + 1e-9)


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-9])
def test_sample_is_greedy_at_low_temperature(temperature: float) -> None:
    logits = torch.tensor([1.0, 88.0, 87.9, -math.inf])
    assert sample(logits, SamplingOptions(temperature), torch.Generator()) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"seed": -1},
        {"seed": 2**63},
        {"temperature": "0.8"},
        {"temperature": True},
        {"top_k": 2.0},
        {"top_k": math.nan},
        {"top_p": math.nan},
        {"top_p": None},
        {"min_p": math.nan},
        {"seed": 0.5},
    ],
)
def test_options_reject_numbers_out_of_range(options: dict) -> None:
    (name,) = options
    with pytest.raises(UserError, match=name):
        SamplingOptions(**options)


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(1.0, top_k=10**30, top_p=1, seed=2**63 - 1),
        SamplingOptions(1.0, top_p=1, min_p=1.0),
        SamplingOptions(1.0, top_p=5e-324),
        SamplingOptions(5e-324, top_p=1),
        SamplingOptions(1e-30),
        SamplingOptions(0.0, top_k=1, top_p=5e-324, min_p=1.0),
        SamplingOptions(1e300, top_k=1),
    ],
)
@pytest.mark.parametrize("spread", [0.0, 1.0, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("vocab_size", [1, 2, 5])
def test_the_ends_of_all_ranges_draw_a_likeliest_token(
    options: SamplingOptions, spread: float, vocab_size: int
) -> None:
    logits = torch.full((vocab_size,), -spread)
    logits[-1] = spread
    drawn = sample(logits, options, torch.Generator().manual_seed(options.seed))
    assert logits[drawn] == logits.max() or (options.top_k == 10**30 and spread == 1)


@pytest.mark.parametrize("max_tokens", [-1, 1.5, math.nan, "7", None, True])
def test_a_number_of_tokens_is_whole(max_tokens: object) -> None:
    with pytest.raises(UserError, match="max_tokens must be a whole number"):
        check_max_tokens(max_tokens)  # type: ignore[arg-type]


@given(
    logits=st.lists(st.floats(-30, 30), min_size=2, max_size=8),
    counts=st.lists(st.integers(0, 5), min_size=8, max_size=8),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
    bias=st.dictionaries(st.integers(0, 1), st.floats(-100, 100)),
)
@settings(max_examples=60, deadline=None)
def test_penalties_and_biases_are_those_of_the_formula(
    logits: list[float], counts: list[int], frequency: float, presence: float, bias: dict[int, float]
) -> None:
    options = SamplingOptions(frequency_penalty=frequency, presence_penalty=presence, logit_bias=bias)
    counts = counts[: len(logits)]
    expected = [
        logit - frequency * count - presence * (count > 0) + bias.get(i, 0)
        for i, (logit, count) in enumerate(zip(logits, counts, strict=True))
    ]
    given_V = torch.tensor(logits, dtype=torch.float64)
    adjusted_V = adjust_logits(given_V, torch.tensor(counts), options)
    torch.testing.assert_close(adjusted_V, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert given_V.tolist() == logits  # as they were
    assert options.adjusts_logits == bool(frequency or presence or bias)


@pytest.mark.parametrize("options", [{"frequency_penalty": math.nan}, {"presence_penalty": "1"}])
def test_penalties_must_be_numbers(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="must be a finite number"):
        SamplingOptions(**options)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=8), st.integers(0, 7), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_log_probabilities_are_those_of_the_definition(logits: list[float], token: int, top: int) -> None:
    token %= len(logits)
    sum_of_exp = math.fsum(math.exp(logit) for logit in logits)
    expected = [logit - math.log(sum_of_exp) for logit in logits]
    found = token_logprob(torch.tensor(logits, dtype=torch.float64), token, top)
    assert found.token == token and found.logprob == pytest.approx(expected[token], abs=1e-9)
    assert [logprob for _, logprob in found.top] == pytest.approx(sorted(expected, reverse=True)[:top], abs=1e-9)
    assert all(logprob == pytest.approx(expected[i], abs=1e-9) for i, logprob in found.top)
