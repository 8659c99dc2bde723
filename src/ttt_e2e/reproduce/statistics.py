"""Differences between systems, with what their books and their seeds leave uncertain."""

from collections.abc import Mapping
from typing import NamedTuple

from ttt_e2e.evaluation.documents import standard_error

Losses = Mapping[int, Mapping[str, float]]
"""Mean losses by seed and by book."""


class Mean(NamedTuple):
    """A mean over seeds of means over books.

    books_error: its standard error over books (each book's value being its mean over seeds); None for fewer than two.
    seeds_error: its standard error over seeds; None for fewer than two.
    """

    mean: float
    books_error: float | None
    seeds_error: float | None
    books: int
    seeds: int


def mean(values: Losses) -> Mean | None:
    """The mean of `values`; None if there are none. Every seed has the same books."""
    if not values:
        return None
    by_seed = [sum(books.values()) / len(books) for books in values.values()]
    names = next(iter(values.values()))
    by_book = [sum(books[name] for books in values.values()) / len(values) for name in names]
    return Mean(
        sum(by_seed) / len(by_seed), standard_error(by_book), standard_error(by_seed), len(by_book), len(by_seed)
    )


def difference(ours: Losses, theirs: Losses) -> Mean | None:
    """The mean of `ours` minus `theirs`, paired by book and by seed; None if no seed is in both."""
    return mean(
        {
            seed: {name: loss - theirs[seed][name] for name, loss in books.items()}
            for seed, books in ours.items()
            if seed in theirs
        }
    )
