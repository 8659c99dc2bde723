"""Losses on held-out books, and their means and differences."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_model

from ttt_e2e.data.loader import SequenceLoader
from ttt_e2e.data.shards import TokenSet
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation.documents import standard_error
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.reproduce.held_out import BookReader, held_out_books, position_edges
from ttt_e2e.reproduce.report import difference, mean


def test_book_losses_are_those_of_training(data: Path) -> None:
    tokens = TokenSet.open(data, "val")
    books = held_out_books(tokens, 32, 64)
    assert 0 < len(books) < len(tokens)  # shorter ones are left out
    assert all(len(book.tokens) - 1 in (32, 64) and book.tokens[0] == tokens.bos for book in books)
    model = small_model(vocab_size=272)
    for context in (8, 32):
        for batch_tokens in (8, 1000):
            found = BookReader(model, tokens.bos, batch_tokens).book_losses(books, context)
            for book, result in zip(books, found, strict=True):
                starts = range(0, len(book.tokens) - 1, context)
                sequences = torch.from_numpy(np.stack([book.tokens[i : i + context + 1] for i in starts]))
                with torch.no_grad():
                    nll_BT = sequence_loss(model, sequences).nll_BT
                assert result["tokens"] == len(book.tokens) - 1
                assert result["loss"] == pytest.approx(float(nll_BT.mean()), abs=1e-5)
                widths = np.diff(position_edges(context))
                assert np.dot(result["by_position"], widths) / context == pytest.approx(result["loss"], abs=1e-5)


def test_position_edges_double_every_second_bin() -> None:
    assert position_edges(256) == [0, 16, 22, 32, 45, 64, 90, 128, 181, 256] and position_edges(8) == [0, 8]


def test_diverging_inner_learning_rate_has_no_loss(data: Path) -> None:
    tokens, model = TokenSet.open(data, "train"), small_model(vocab_size=272)
    reader = BookReader(model, tokens.bos, batch_tokens=64)
    sequences = next(SequenceLoader(tokens, 16, 4, 0))
    losses = reader.inner_lr_losses(sequences, [0.0, 1e38])
    assert losses[1e38] is None and losses[0.0] is not None
    with torch.no_grad():
        expected = sequence_loss(model, sequences, bos=tokens.bos, learn=False)
    mask_BT = expected.mask_BT
    assert losses[0.0] == pytest.approx(float((expected.nll_BT * mask_BT).sum() / mask_BT.sum()), abs=1e-5)
    with pytest.raises(UserError, match="Every inner learning rate diverged"):
        reader.inner_lr_losses(sequences, [1e38])


def test_difference_is_paired_by_book_and_seed() -> None:
    assert standard_error([1.0, 2.0, 6.0]) == pytest.approx(7**0.5 / 3**0.5)
    assert standard_error([1.0]) is None and mean({}) is None
    losses = {0: {"a": 2.0, "b": 3.0}, 1: {"a": 4.0, "b": 7.0}}
    baseline = {0: {"a": 1.0, "b": 1.0}, 1: {"a": 1.0, "b": 1.0}, 2: {"a": 9.0, "b": 9.0}}
    # By seed the differences are (1, 2) and (3, 6): means 1.5 and 4.5. By book: 2 and 4.
    found = difference(losses, baseline)
    assert found is not None and (found["books"], found["seeds"]) == (2, 2)
    assert found["mean"] == pytest.approx(3.0)
    assert found["books_error"] == pytest.approx(1.0) and found["seeds_error"] == pytest.approx(1.5)
    assert difference(losses, {5: {"a": 1.0, "b": 1.0}}) is None
