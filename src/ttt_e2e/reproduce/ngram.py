"""The n-gram floor: what counting reaches on the tokens that the systems are trained on.

A trigram model counted on those tokens, by interpolated modified Kneser-Ney (Chen and Goodman, 1998): from every count
c > 0 the discount D(c) is taken, and what the discounts leave goes to the next lower order.

    p(w | u v) = (c(u v w) - D(c)) / c(u v) + g(u v) p(w | v)

Below the trigrams, c counts the different tokens in front; below the single tokens stands 1 / V. To this a cache adds
the 1-, 2- and 3-grams of the text that has been read so far:

    p <- (1 - a) p + a n(context, w) / n(context)      for one order after the other

with a weight a for each order and each size of n(context), in powers of two; 0 where the context is new. They are
chosen by EM on training tokens that are not counted while this is done. All probabilities sum to 1 over the vocabulary.

Shapes: B sequences, T targets, N targets of all sequences, O = 3 orders of the cache.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ttt_e2e.data.loader import SequenceLoader
from ttt_e2e.data.shards import TokenSet
from ttt_e2e.errors import UserError
from ttt_e2e.reproduce.held_out import Book, book_loss, held_out_books, position_edges

ORDERS = 3
MAX_TOKENS = 2**29  # counted at most, of a stage

_BUFFER = 2**24  # trigrams that are sorted at once
_FALLBACK = np.array([0.0, 0.5, 1.0, 1.5])  # discounts where there are too few counts to estimate them
_BUCKETS = 32
_PRIOR_WEIGHT, _PRIOR_TARGETS = 0.1, 10.0  # of the cache, where few targets of a bucket were seen
_EM_ITERATIONS = 40


class Counts(NamedTuple):
    """How often each n-gram occurs: keys in ascending order, and counts, both int64.

    The key of tokens u v w is (u V + v) V + w, with V tokens in the vocabulary, at most two million.
    """

    keys: np.ndarray
    counts: np.ndarray


def add_counts(*several: Counts) -> Counts:
    """The counts of several texts together."""
    keys, counts = (np.concatenate(parts) for parts in zip(*several, strict=True))
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    starts = _group_starts(keys)
    return Counts(keys[starts], np.add.reduceat(counts, starts)) if len(starts) else Counts(keys, counts)


def count_trigrams(sequences: Iterable[np.ndarray], vocab_size: int, bos: int) -> Counts:
    """The trigrams in arrays of tokens but those that end in `bos`, which never counts as a target."""
    total = Counts(np.empty(0, np.int64), np.empty(0, np.int64))
    buffer: list[np.ndarray] = []
    buffered = 0

    def count_buffer() -> Counts:
        return add_counts(total, Counts(*np.unique(np.concatenate(buffer), return_counts=True)))

    for sequence in sequences:
        tokens = sequence.astype(np.int64)
        keys = (tokens[:-2] * vocab_size + tokens[1:-1]) * vocab_size + tokens[2:]
        buffer.append(keys[tokens[2:] != bos])
        buffered += len(keys)
        if buffered >= _BUFFER:
            total, buffer, buffered = count_buffer(), [], 0
    return count_buffer() if buffer else total


def discounts(counts: np.ndarray) -> np.ndarray:
    """What modified Kneser-Ney takes from a count of 0, 1, 2, and 3 or more, estimated from all counts of an order."""
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].tolist()
    if 0 in (n1, n2, n3, n4):
        return _FALLBACK
    y = n1 / (n1 + 2 * n2)
    found = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return found if found[1:].min() > 0 else _FALLBACK


class _Order:
    """The n-grams of one length: counts, discounts, and for each context its sum and what the discounts leave."""

    def __init__(self, counts: Counts, vocab_size: int) -> None:
        self.keys, self.counts = counts
        self.vocab_size = vocab_size
        self.discounts = discounts(self.counts)
        contexts = self.keys // vocab_size
        starts = _group_starts(contexts)
        self.contexts = contexts[starts]
        if len(starts):
            self.sums = np.add.reduceat(self.counts, starts)
            self.left = np.add.reduceat(self.discounts[np.minimum(self.counts, 3)], starts) / self.sums

    def interpolate(self, contexts: np.ndarray, targets: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """The probability of each target after its context, where `lower` is that of the next lower order."""
        if not len(self.keys):
            return lower
        at, is_known = _find(self.keys, contexts * self.vocab_size + targets)
        count = np.where(is_known, self.counts[at], 0)
        at, is_known = _find(self.contexts, contexts)
        seen = (count - self.discounts[np.minimum(count, 3)]) / self.sums[at] + self.left[at] * lower
        return np.where(is_known, seen, lower)


class KneserNey:
    """A trigram model by interpolated modified Kneser-Ney."""

    def __init__(self, trigrams: Counts, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        bigrams = Counts(*np.unique(trigrams.keys % vocab_size**2, return_counts=True))
        unigrams = Counts(*np.unique(bigrams.keys % vocab_size, return_counts=True))
        self._orders = [_Order(counts, vocab_size) for counts in (unigrams, bigrams, trigrams)]

    def probabilities(self, tokens_T1: np.ndarray) -> np.ndarray:
        """The probability [T] of every token of a text but its first one, which has none. The second has no trigram."""
        tokens_T1 = tokens_T1.astype(np.int64)
        previous, targets = tokens_T1[:-1], tokens_T1[1:]
        p = np.full(len(targets), 1 / self.vocab_size)
        p = self._orders[0].interpolate(np.zeros_like(targets), targets, p)
        p = self._orders[1].interpolate(previous, targets, p)
        p[1:] = self._orders[2].interpolate(previous[:-1] * self.vocab_size + previous[1:], targets[1:], p[1:])
        return p


class CacheTerms(NamedTuple):
    """What the probabilities of N targets are made of, given the weights of the cache."""

    trigram_N: np.ndarray  # probability without the cache
    frequency_ON: np.ndarray  # n(context, w) / n(context) in the text so far, 0 where the context is new
    bucket_ON: np.ndarray  # number of binary digits of n(context)


def cache_terms(model: KneserNey, tokens_T1: np.ndarray) -> CacheTerms:
    """The terms of every token of a text but its first one."""
    tokens_T1, v = tokens_T1.astype(np.int64), model.vocab_size
    pairs = tokens_T1[:-1] * v + tokens_T1[1:]
    found_OT, seen_OT = np.zeros((2, ORDERS, len(tokens_T1) - 1), np.int64)
    found_OT[0], seen_OT[0] = _earlier(tokens_T1)[1:], np.arange(1, len(tokens_T1))
    found_OT[1], seen_OT[1] = _earlier(pairs), _earlier(tokens_T1[:-1])
    found_OT[2, 1:], seen_OT[2, 1:] = _earlier(pairs[:-1] * v + tokens_T1[2:]), _earlier(pairs[:-1])
    bucket_OT = np.frexp(seen_OT)[1].astype(np.int64)
    return CacheTerms(model.probabilities(tokens_T1), found_OT / np.maximum(seen_OT, 1), bucket_OT)


def mix(terms: CacheTerms, weights: np.ndarray) -> list[np.ndarray]:
    """The probabilities [N] of the targets without the cache, then with 1, 2 and 3 of its orders.

    weights: [O, _BUCKETS], of the text's frequency, by order and bucket.
    """
    steps = [terms.trigram_N]
    for order in range(ORDERS):
        weight_N = weights[order, terms.bucket_ON[order]]
        steps.append((1 - weight_N) * steps[-1] + weight_N * terms.frequency_ON[order])
    return steps


def fit_weights(texts: Iterable[CacheTerms]) -> np.ndarray:
    """The weights of the cache [O, _BUCKETS] with which texts are most probable, found by EM.

    Each weight has a prior that counts as much as ten targets, so that one of a bucket that is rare stays near 0.1.
    """
    terms = CacheTerms(*(np.concatenate(parts, axis=-1) for parts in zip(*texts, strict=True)))
    weights = np.full((ORDERS, _BUCKETS), _PRIOR_WEIGHT)
    weights[:, 0] = 0
    for _ in range(_EM_ITERATIONS):
        steps = mix(terms, weights)
        reaches_N = np.ones_like(terms.trigram_N)  # how probable it is that no higher order gave the target
        for order in reversed(range(ORDERS)):
            bucket_N = terms.bucket_ON[order]
            gives_N = weights[order, bucket_N] * terms.frequency_ON[order] / steps[order + 1]
            given = np.bincount(bucket_N, reaches_N * gives_N, _BUCKETS)
            reached = np.bincount(bucket_N, reaches_N, _BUCKETS)
            weights[order, 1:] = ((given + _PRIOR_WEIGHT * _PRIOR_TARGETS) / (reached + _PRIOR_TARGETS))[1:]
            reaches_N = reaches_N * (1 - gives_N)
    return weights


class NgramFloor:
    """A trigram model with the weights of its cache."""

    def __init__(self, model: KneserNey, weights: np.ndarray) -> None:
        self.model, self.weights = model, weights

    def losses(self, tokens_T1: np.ndarray, *, cache: bool = True) -> np.ndarray:
        """The loss [T] of every token of a text but its first one, in nats."""
        steps = mix(cache_terms(self.model, tokens_T1), self.weights)
        return -np.log(steps[-1] if cache else steps[0])

    def book_losses(self, books: list[Book], context: int, bos: int, *, cache: bool = True) -> list[dict[str, Any]]:
        """The loss of each book, in the same sequences and with the same keys as `BookReader.book_losses`."""
        results = []
        for book in books:
            sequences_BT1 = book.sequences(context)
            mask_BT = (sequences_BT1[:, 1:] != bos).astype(np.float64)
            nll_BT = np.stack([self.losses(tokens_T1, cache=cache) for tokens_T1 in sequences_BT1])
            results.append(book_loss(book, nll_BT * mask_BT, mask_BT))
        return results


def train_floor(
    stages: list[tuple[SequenceLoader, int]], context: int, weight_tokens: int, vocab_size: int
) -> NgramFloor:
    """Count the n-grams of trainings, and choose the weights of the cache for texts of `context` tokens.

    stages: the loader of each training and how many of its sequences are counted, at least 2 of the last one's.
    weight_tokens: from the end of the last one, to choose the weights on before they are counted too; at most half.
    """
    loader, num_sequences = stages[-1]
    bos = loader.tokens.bos
    num_chosen = min(max(1, weight_tokens // loader.context), num_sequences // 2)
    stages = [*stages[:-1], (loader, num_sequences - num_chosen)]
    counts = count_trigrams((next(loader)[0].numpy() for loader, n in stages for _ in range(n)), vocab_size, bos)
    chosen = [next(loader)[0].numpy() for _ in range(num_chosen)]
    model, size = KneserNey(counts, vocab_size), min(context, loader.context)
    pieces = (text[i : i + size + 1] for text in chosen for i in range(0, loader.context - size + 1, size))
    weights = fit_weights(cache_terms(model, piece) for piece in pieces)
    counts = add_counts(counts, count_trigrams(chosen, vocab_size, bos))
    return NgramFloor(KneserNey(counts, vocab_size), weights)


def evaluate_floor(settings: dict[str, Any]) -> dict[str, Any]:
    """The result of a job of the n-gram floor whose job.json has these settings, see `plan.job_settings`.

    It has the form of an evaluation's. "frozen" is the loss without the cache, "tokens" how many tokens are counted: of
    every training text at most one epoch, since repeated counts would mislead the discounts, and of every stage at most
    `MAX_TOKENS`. "cache_weights" are by order, and by the number of binary digits of n(context), from 1.
    """
    stages: list[tuple[SequenceLoader, int]] = []
    unread: dict[str, int] = {}  # tokens, by the digest of the text
    for stage in settings["stages"]:
        tokens = TokenSet.open(Path(stage["data"]), "train")
        tokens.check_vocabulary(settings["vocab_size"])
        room = unread.setdefault(tokens.digest, tokens.total)
        num_sequences = min(stage["tokens"], room, MAX_TOKENS) // stage["context"]
        unread[tokens.digest] -= num_sequences * stage["context"]
        if num_sequences > 1:
            stages.append((SequenceLoader(tokens, stage["context"], 1, stage["seed"]), num_sequences))
    if not stages:
        raise UserError(f"{settings['stages'][0]['data']} holds too few tokens to count n-grams; prepare more text.")
    context = settings["context"]
    floor = train_floor(stages, context, settings["weight_tokens"], settings["vocab_size"])
    held_out = TokenSet.open(Path(settings["books"]), "val")
    books = held_out_books(held_out, settings["longest_context"], settings["book_tokens"])
    return {
        "context": context,
        "parameters": None,
        "position_edges": position_edges(context),
        "tokens": sum(n * loader.context for loader, n in stages),
        "cache_weights": floor.weights[:, 1 : context.bit_length() + 1].tolist(),
        "books": floor.book_losses(books, context, held_out.bos),
        "frozen": floor.book_losses(books, context, held_out.bos, cache=False),
    }


def _group_starts(keys: np.ndarray) -> np.ndarray:
    """Where each group of equal keys begins."""
    return np.flatnonzero(np.diff(keys, prepend=-1))


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each wanted key is, and whether it is there at all; `keys` ascend."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return at, keys[at] == wanted


def _earlier(keys: np.ndarray) -> np.ndarray:
    """For each key, how many earlier ones equal it."""
    order = np.argsort(keys, kind="stable")
    starts = _group_starts(keys[order])
    sizes = np.diff(starts, append=len(keys))
    counts = np.empty_like(keys)
    counts[order] = np.arange(len(keys)) - np.repeat(starts, sizes)
    return counts
