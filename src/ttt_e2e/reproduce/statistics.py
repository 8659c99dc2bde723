"""Mean losses and differences of losses, with their standard errors over books and over seeds."""

from collections.abc import Mapping
from typing import TypedDict

from ttt_e2e.evaluation.documents import standard_error

Losses = Mapping[int, Mapping[str, float]]
"""Mean losses by seed and by book."""


class Mean(TypedDict):
    """A mean over seeds of means over books, as the report has it. An error over fewer than two values is None."""

    mean: float
    books_error: float | None  # standard error over books, each book's value being its mean over seeds
    seeds_error: float | None  # standard error over seeds
    books: int
    seeds: int


def mean(losses: Losses) -> Mean | None:
    """The mean of `losses`, in which every seed has the same books; None if there are none."""
    if not losses:
        return None
    by_seed = [sum(books.values()) / len(books) for books in losses.values()]
    names = next(iter(losses.values()))
    by_book = [sum(books[name] for books in losses.values()) / len(losses) for name in names]
    return {
        "mean": sum(by_seed) / len(by_seed),
        "books_error": standard_error(by_book),
        "seeds_error": standard_error(by_seed),
        "books": len(by_book),
        "seeds": len(by_seed),
    }


def difference(losses: Losses, baseline: Losses) -> Mean | None:
    """The mean of `losses` minus `baseline`, paired by book and by seed; None if they have no seed in common."""
    return mean(
        {
            seed: {name: loss - baseline[seed][name] for name, loss in books.items()}
            for seed, books in losses.items()
            if seed in baseline
        }
    )
