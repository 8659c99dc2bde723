"""The n-gram floor against plain loops over the formulas, and its probabilities over whole vocabularies."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_e2e.data.loader import SequenceLoader
from ttt_e2e.data.shards import TokenSet
from ttt_e2e.errors import UserError
from ttt_e2e.reproduce import ngram
from ttt_e2e.reproduce.held_out import held_out_books, position_edges
from ttt_e2e.reproduce.ngram import (
    CacheTerms,
    KneserNey,
    NgramFloor,
    cache_terms,
    count_trigrams,
    discounts,
    evaluate_floor,
    fit_weights,
    mix,
    train_floor,
)

VOCAB = 6
BOS = 0
tokens = st.integers(0, VOCAB - 1)
texts = st.lists(st.lists(tokens, min_size=1, max_size=40), max_size=6)


def literal_kneser_ney(training: list[list[int]], history: list[int], w: int, vocab: int = VOCAB) -> float:
    """Chen and Goodman's formula, term by term; of the first token of a text there is no history."""
    trigrams = Counter(t for text in training for t in zip(text, text[1:], text[2:], strict=False) if t[2] != BOS)
    bigrams = Counter((v, x) for _, v, x in trigrams)
    unigrams = Counter((x,) for _, x in bigrams)

    def smoothed(order: Mapping[Any, int], context: tuple[int, ...], lower: float) -> float:
        n = {c: sum(count == c for count in order.values()) for c in (1, 2, 3, 4)}
        d = {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5}
        if all(n.values()):
            y = n[1] / (n[1] + 2 * n[2])
            estimate = {0: 0.0} | {c: c - (c + 1) * y * n[c + 1] / n[c] for c in (1, 2, 3)}
            if min(estimate[c] for c in (1, 2, 3)) > 0:
                d = estimate
        after = {x: order.get((*context, x), 0) for x in range(vocab)}
        total = sum(after.values())
        if total == 0:
            return lower
        left = sum(d[min(count, 3)] for count in after.values())
        return max(after[w] - d[min(after[w], 3)], 0) / total + left / total * lower

    p = smoothed(unigrams, (), 1 / vocab)
    p = smoothed(bigrams, tuple(history[-1:]), p)
    return smoothed(trigrams, tuple(history[-2:]), p) if len(history) > 1 else p


def literal_cache(read: list[int], w: int, p: float, weights: np.ndarray) -> float:
    """The three steps of the cache, with counts by looking through the text that has been read."""
    for order in range(3):
        context = read[len(read) - order :]
        if order <= len(read):
            following = [read[i + order] for i in range(len(read) - order) if read[i : i + order] == context]
            if following:
                a = weights[order, len(following).bit_length()]
                p = (1 - a) * p + a * following.count(w) / len(following)
    return p


def model_of(training: list[list[int]]) -> KneserNey:
    return KneserNey(count_trigrams((np.array(text) for text in training), VOCAB, BOS), VOCAB)


def some_weights(seed: int) -> np.ndarray:
    weights = np.random.default_rng(seed).uniform(0, 0.9, (3, 32))
    weights[:, 0] = 0
    return weights


@given(texts, st.lists(tokens, min_size=1, max_size=12), st.integers(0, 9))
def test_probabilities_are_those_of_the_formulas_and_sum_to_one(
    training: list[list[int]], read: list[int], seed: int
) -> None:
    model, weights = model_of(training), some_weights(seed)
    found = []
    for w in range(VOCAB):
        steps = mix(cache_terms(model, np.array([*read, w])), weights)
        expected = literal_kneser_ney(training, read, w)
        assert steps[0][-1] == pytest.approx(expected, abs=1e-12)
        found.append(steps[-1][-1])
        assert found[-1] == pytest.approx(literal_cache(read, w, expected, weights), abs=1e-12)
    assert min(found) > 0 and sum(found) == pytest.approx(1, abs=1e-12)


def test_estimated_discounts_and_counts_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Enough text for every order to have counts of 1 to 4, counted at once and in many parts.
    draw = np.random.default_rng(0)
    text = [int(w) for w in draw.zipf(1.3, 1500) if w < VOCAB * 5]
    vocab, parts = VOCAB * 5, [text[i : i + 20] for i in range(0, len(text), 20)]
    whole = count_trigrams(map(np.array, parts), vocab, BOS)
    monkeypatch.setattr(ngram, "_BUFFER", 30)
    for one, other in zip(whole, count_trigrams(map(np.array, parts), vocab, BOS), strict=True):
        assert np.array_equal(one, other)
    assert whole.counts.sum() == sum(w != BOS for part in parts for w in part[2:])
    n1, n2, n3, n4 = (int((whole.counts == c).sum()) for c in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    expected = [0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    assert discounts(whole.counts) == pytest.approx(expected)
    model = KneserNey(whole, vocab)
    for read in ([3], text[40:42], [1, 1], [vocab - 1, 7]):
        p = [model.probabilities(np.array([*read, w]))[-1] for w in range(vocab)]
        assert sum(p) == pytest.approx(1, abs=1e-12)
        for w in {0, 1, text[42], vocab - 1}:
            assert p[w] == pytest.approx(literal_kneser_ney(parts, read, w, vocab), abs=1e-12)


def test_weights_are_the_most_probable_ones() -> None:
    draw = np.random.default_rng(1)
    training = [draw.integers(1, VOCAB, 30).tolist() for _ in range(3)]
    model = model_of(training)
    # Texts that repeat themselves, and not the training.
    terms = [cache_terms(model, np.tile(draw.integers(1, VOCAB, 15), 4)) for _ in range(20)]
    found = fit_weights(terms)
    together = CacheTerms(*(np.concatenate(parts, -1) for parts in zip(*terms, strict=True)))
    used = found != pytest.approx(0.1)

    def log_posterior(weights: np.ndarray) -> float:
        prior = np.log(weights[:, 1:]) + 9 * np.log1p(-weights[:, 1:])
        return float(np.log(mix(together, weights)[-1]).sum() + prior.sum())

    best = log_posterior(found)
    changed = list(zip(*np.nonzero(used & (found > 0)), strict=True))
    assert len(changed) >= 6
    for order, bucket in changed:
        for factor in (0.9, 1.1):
            other = found.copy()
            other[order, bucket] = min(0.999, other[order, bucket] * factor)
            assert log_posterior(other) < best
    assert (found[2, 1:5] > 0.1).any() and np.allclose(found[:, 20:], 0.1)


def test_floor_reads_the_books_as_the_systems_do(data: Path) -> None:
    train, val = TokenSet.open(data, "train"), TokenSet.open(data, "val")
    stages = [
        {"data": str(data), "context": 8, "tokens": 512, "seed": 3},
        {"data": str(data), "context": 32, "tokens": 192, "seed": 3},
    ]
    settings = {
        **{"stages": stages, "vocab_size": 272, "books": str(data), "context": 32},
        **{"longest_context": 32, "book_tokens": 64, "weight_tokens": 64},
    }
    result = evaluate_floor(settings)
    # Counted are the sequences that the loader gives in both stages; the weights are chosen without the last two.
    first, second = SequenceLoader(train, 8, 1, 3), SequenceLoader(train, 32, 1, 3)
    sequences = [next(first)[0].numpy() for _ in range(64)] + [next(second)[0].numpy() for _ in range(6)]
    model = KneserNey(count_trigrams(sequences, 272, train.bos), 272)
    partial = KneserNey(count_trigrams(sequences[:-2], 272, train.bos), 272)
    weights = fit_weights(cache_terms(partial, sequence) for sequence in sequences[-2:])
    assert result["tokens"] == 704 and np.allclose(result["cache_weights"], weights[:, 1:7])
    floor = NgramFloor(model, weights)
    for cache, key in ((True, "books"), (False, "frozen")):
        for book, found in zip(held_out_books(val, 32, 64), result[key], strict=True):
            losses = [floor.losses(book.tokens[i : i + 33], cache=cache) for i in range(0, len(book.tokens) - 1, 32)]
            assert found["name"] == book.name and found["tokens"] == len(losses) * 32
            assert found["loss"] == pytest.approx(np.mean(losses))
            bins = np.add.reduceat(np.mean(losses, 0), position_edges(32)[:-1]) / np.diff(position_edges(32))
            assert found["by_position"] == pytest.approx(bins)


def test_begin_of_another_document_does_not_count(data: Path) -> None:
    train = TokenSet.open(data, "train")
    floor = train_floor([(SequenceLoader(train, 8, 1, 0), 40)], 8, 64, 272)
    book = held_out_books(TokenSet.open(data, "val"), 32, 64)[0]
    book.tokens[5] = train.bos
    (found,) = floor.book_losses([book], 32, train.bos)
    losses = np.concatenate([floor.losses(book.tokens[i : i + 33]) for i in range(0, len(book.tokens) - 1, 32)])
    assert found["tokens"] == len(losses) - 1
    assert found["loss"] == pytest.approx(np.delete(losses, 4).mean())


def test_no_text_is_counted_twice(data: Path) -> None:
    total = TokenSet.open(data, "train").total
    stages = [{"data": str(data), "context": 8, "tokens": total * 3, "seed": seed} for seed in (0, 1)]
    settings = {"vocab_size": 272, "books": str(data), "context": 8, "longest_context": 32}
    settings |= {"book_tokens": 64, "weight_tokens": 64}
    assert evaluate_floor(settings | {"stages": stages})["tokens"] == total // 8 * 8
    with pytest.raises(UserError, match="too few tokens to count"):
        evaluate_floor(settings | {"stages": [{"data": str(data), "context": 8, "tokens": 8, "seed": 0}]})
