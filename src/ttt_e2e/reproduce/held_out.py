"""The loss on held-out books, each cut into sequences of one length that are read independently.

The text is the same for every length: the first tokens of each book, as many as fill whole sequences of the longest
one. Sequences overlap by one token, as in training, so that every token but a book's first is a target once.

Shapes: B sequences, T tokens.
"""

import math
from itertools import count, pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ttt_e2e.data.loader import SequenceLoader
from ttt_e2e.data.shards import TokenSet
from ttt_e2e.errors import Divergence, UserError
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.transformer import Transformer


class Book(NamedTuple):
    """The part of a book that is read: a multiple of the longest context in tokens, and one more."""

    name: str
    tokens: np.ndarray

    def sequences(self, context: int) -> np.ndarray:
        """The book in sequences of `context` tokens and the next one, [B, T + 1]."""
        starts = range(0, len(self.tokens) - 1, context)
        return np.stack([self.tokens[start : start + context + 1] for start in starts])


def book_loss(book: Book, nll_BT: np.ndarray, mask_BT: np.ndarray) -> dict[str, Any]:
    """The loss of a book from those of its tokens in sequences, in nats per token.

    nll_BT: 0 where `mask_BT` is. Returns "name", "tokens" (that count), "loss", and "by_position": the means in the
    bins of `position_edges`, None where no token counts.
    """
    by_position = []
    for start, stop in pairwise(position_edges(nll_BT.shape[1])):
        tokens = float(mask_BT[:, start:stop].sum())
        by_position.append(float(nll_BT[:, start:stop].sum()) / tokens if tokens else None)
    tokens = float(mask_BT.sum())
    loss = float(nll_BT.sum()) / tokens
    return {"name": book.name, "tokens": int(tokens), "loss": loss, "by_position": by_position}


def held_out_books(tokens: TokenSet, longest_context: int, max_tokens: int) -> list[Book]:
    """Of every document at most `max_tokens`, in whole sequences of `longest_context`. Shorter documents are skipped.

    Raises UserError if all are shorter.
    """
    books = []
    for i, length in enumerate(tokens.lengths):
        size = min(max_tokens, int(length) - 1) // longest_context * longest_context
        if size:
            ids = tokens.check_ids(tokens.document(i, 0, size + 1)).astype(np.int64)
            books.append(Book(f"{i} {tokens.names[i]}", ids))
    if not books:
        raise UserError(
            f"{tokens.where} holds out no document of more than {longest_context} tokens, too few for one sequence; "
            "hold out longer documents (`ttt-e2e prepare --val` or --val-share)."
        )
    return books


class BookReader:
    """Reads sequences with a model, `batch_tokens` tokens at once, and tells its losses.

    bos: id of the token that begins a document; as a target it does not count. dtype: of the matrix products.
    """

    def __init__(self, model: Transformer, bos: int, batch_tokens: int, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.bos, self.batch_tokens, self.dtype = model, bos, batch_tokens, dtype

    def book_losses(
        self, books: list[Book], context: int, *, learn: bool = True, inner_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """The loss of each book in sequences of `context` tokens, see `book_loss`; for the rest see `sequence_loss`.

        Raises Divergence if a loss is not finite.
        """
        results = []
        for book in books:
            nll_BT, mask_BT, _ = self._read(torch.from_numpy(book.sequences(context)), learn, inner_lr)
            result = book_loss(book, nll_BT.numpy(), mask_BT.numpy())
            if not math.isfinite(loss := result["loss"]):
                raise Divergence(f"Reading {book.name} in sequences of {context} tokens diverged: its loss is {loss}.")
            results.append(result)
        return results

    def inner_lr_losses(self, sequences_BT1: torch.Tensor, inner_lrs: list[float]) -> dict[float, float | None]:
        """The loss of sequences at each of several inner learning rates; None where it diverges.

        Raises Divergence if all do.
        """
        losses: dict[float, float | None] = {}
        for lr in inner_lrs:
            loss = self._read(sequences_BT1, True, lr)[-1]
            losses[lr] = loss if math.isfinite(loss) else None
        if all(loss is None for loss in losses.values()):
            context = sequences_BT1.shape[1] - 1
            raise Divergence(f"Every inner learning rate diverged at a context of {context}: {inner_lrs}.")
        return losses

    @torch.no_grad()
    def _read(
        self, sequences_BT1: torch.Tensor, learn: bool, inner_lr: float | None
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The tokens' losses (0 where they do not count) and which count, [B, T] float64, and the mean of these."""
        losses, masks = [], []
        for some_BT1 in sequences_BT1.split(max(1, self.batch_tokens // (sequences_BT1.shape[1] - 1))):
            tokens_BT1 = some_BT1.to(self.model.embedding.device)
            options: dict[str, Any] = {"bos": self.bos, "learn": learn, "inner_lr": inner_lr, "dtype": self.dtype}
            result = sequence_loss(self.model, tokens_BT1, **options)
            losses.append(result.nll_BT.double().cpu())
            masks.append(result.mask_BT.double().cpu())
        mask_BT = torch.cat(masks)
        nll_BT = torch.cat(losses) * mask_BT
        return nll_BT, mask_BT, float(nll_BT.sum() / mask_BT.sum())


def position_edges(context: int) -> list[int]:
    """Edges of the bins of positions, two bins to a doubling: 0, 16, 22, 32, 45, ..., `context`."""
    edges = (int(16 * 2 ** (i / 2)) for i in count())
    return [0, *takewhile(lambda edge: edge < context, edges), context]


def evaluate_books(model: Transformer, settings: dict[str, Any]) -> dict[str, Any]:
    """The result of an evaluation job whose job.json has these settings, see `plan.job_settings`."""
    folder, context = Path(settings["books"]), settings["context"]
    held_out = TokenSet.open(folder, "val")
    books = held_out_books(held_out, settings["longest_context"], settings["book_tokens"])
    reader = BookReader(model, held_out.bos, settings["batch_tokens"], getattr(torch, settings["dtype"]))
    result: dict[str, Any] = {
        "context": context,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "position_edges": position_edges(context),
    }
    inner_lr = None
    if settings["inner_lrs"]:
        batch = max(1, settings["inner_lr_tokens"] // context)
        sequences_BT1 = next(SequenceLoader(TokenSet.open(folder, "train"), context, batch, settings["seed"]))
        losses = reader.inner_lr_losses(sequences_BT1, settings["inner_lrs"])
        inner_lr = min((lr for lr, loss in losses.items() if loss is not None), key=lambda lr: losses[lr] or 0.0)
        result |= {"inner_lr": inner_lr, "inner_lr_losses": [[lr, loss] for lr, loss in losses.items()]}
    result["books"] = reader.book_losses(books, context, learn=settings["learn"], inner_lr=inner_lr)
    if model.suffix and settings["learn"]:
        result["frozen"] = reader.book_losses(books, context, learn=False)
    return result
