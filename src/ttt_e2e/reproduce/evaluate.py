"""Held-out books at a context: every book cut into sequences of that length, each read from a fresh start.

The text is the same at every context: of each book the first tokens, as far as whole sequences of the longest context
go. Sequences overlap by one token, as in training: every token but a book's first is a target once.

Shapes: B sequences, T tokens.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ttt_e2e.data.loader import SequenceLoader
from ttt_e2e.data.shards import TokenSet
from ttt_e2e.errors import Divergence, UserError
from ttt_e2e.inner_loop.step import sequence_loss
from ttt_e2e.model.transformer import Transformer

_FIRST_BIN = 16
_BINS_PER_OCTAVE = 2


class Book(NamedTuple):
    """The part of a book that is read; tokens is a multiple of the longest context, plus one."""

    name: str
    tokens: np.ndarray


def books(tokens: TokenSet, longest: int, most: int) -> list[Book]:
    """The held-out documents as far as they are read: at most `most` tokens of each, in whole sequences of `longest`.

    Raises UserError if no document has one.
    """
    chosen = []
    for i, length in enumerate(tokens.lengths):
        count = min(most, int(length) - 1) // longest * longest
        if count:
            chosen.append(
                Book(f"{i} {tokens.names[i]}", tokens.sound(tokens.document(i, 0, count + 1)).astype(np.int64))
            )
    if not chosen:
        raise UserError(
            f"{tokens.where} holds out no document of more than {longest} tokens, too few for one sequence; "
            "hold out longer documents (`ttt-e2e prepare --val` or --val-share)."
        )
    return chosen


def evaluate_documents(
    model: Transformer,
    texts: list[Book],
    context: int,
    *,
    bos: int,
    batch_tokens: int,
    learn: bool = True,
    inner_lr: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, Any]]:
    """Each book's loss at `context`, and by position in the sequence: the means of the bins of `position_edges`.

    learn, inner_lr: as for `sequence_loss`. Raises Divergence if a loss is not finite.
    """
    results = []
    for book in texts:
        starts = np.arange(0, len(book.tokens) - 1, context)
        sequences = torch.from_numpy(np.stack([book.tokens[start : start + context + 1] for start in starts]))
        nll_BT, mask_BT = _losses(model, sequences, bos, batch_tokens, learn, inner_lr, dtype)
        loss = float((nll_BT * mask_BT).sum() / mask_BT.sum())
        if not math.isfinite(loss):
            raise Divergence(f"Reading {book.name} in sequences of {context} tokens diverged: its loss is {loss}.")
        edges = position_edges(context)
        sums = [float((nll_BT * mask_BT)[:, a:b].sum()) for a, b in pairwise(edges)]
        counts = [float(mask_BT[:, a:b].sum()) for a, b in pairwise(edges)]
        bins = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
        results.append({"name": book.name, "tokens": int(mask_BT.sum()), "loss": loss, "by_position": bins})
    return results


def position_edges(context: int) -> list[int]:
    """Bins of positions, two to a doubling: 0, 16, 22, 32, 45, ... and `context`."""
    edges = [0]
    while True:
        edge = int(_FIRST_BIN * 2 ** ((len(edges) - 1) / _BINS_PER_OCTAVE))
        if edge >= context:
            return [*edges, context]
        edges.append(edge)


def choose_inner_lr(
    model: Transformer,
    tokens: TokenSet,
    context: int,
    inner_lrs: list[float],
    *,
    count: int,
    seed: int,
    batch_tokens: int,
    dtype: torch.dtype = torch.float32,
) -> dict[float, float | None]:
    """The losses at several inner learning rates on about `count` tokens of training text; None where one diverges.

    Raises Divergence if all do.
    """
    loader = SequenceLoader(tokens, context, max(1, count // context), seed)
    sequences = next(loader)
    losses: dict[float, float | None] = {}
    for lr in inner_lrs:
        nll_BT, mask_BT = _losses(model, sequences, tokens.bos, batch_tokens, True, lr, dtype)
        loss = float((nll_BT * mask_BT).sum() / mask_BT.sum())
        losses[lr] = loss if math.isfinite(loss) else None
    if all(loss is None for loss in losses.values()):
        raise Divergence(f"Every inner learning rate diverged at a context of {context}: {inner_lrs}.")
    return losses


def _losses(
    model: Transformer,
    sequences_BT1: torch.Tensor,
    bos: int,
    batch_tokens: int,
    learn: bool,
    inner_lr: float | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and which of them count, [B, T] float64 on the CPU."""
    losses, masks = [], []
    context = sequences_BT1.shape[1] - 1
    with torch.no_grad():
        for some in sequences_BT1.split(max(1, batch_tokens // context)):
            tokens_BT1 = some.to(model.embedding.device)
            result = sequence_loss(model, tokens_BT1, bos=bos, learn=learn, inner_lr=inner_lr, dtype=dtype)
            losses.append(result.nll_BT.double().cpu())
            masks.append(result.mask_BT.double().cpu())
    return torch.cat(losses), torch.cat(masks)


def evaluate(model: Transformer, folder: Path, spec: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What an evaluation job records: see `specification` in `plan`, and `report`."""
    held = TokenSet.open(folder, "val")
    texts = books(held, spec["longest"], spec["book_tokens"])
    context = spec["context"]
    options: dict[str, Any] = dict(bos=held.bos, batch_tokens=spec["batch_tokens"], dtype=dtype)
    result: dict[str, Any] = {
        "context": context,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "position_edges": position_edges(context),
    }
    inner_lr = None
    if spec["inner_lrs"]:
        losses = choose_inner_lr(
            model,
            TokenSet.open(folder, "train"),
            context,
            spec["inner_lrs"],
            count=spec["choose_tokens"],
            seed=spec["seed"],
            batch_tokens=spec["batch_tokens"],
            dtype=dtype,
        )
        inner_lr = min((lr for lr, loss in losses.items() if loss is not None), key=lambda lr: losses[lr] or 0.0)
        result |= {"inner_lr": inner_lr, "inner_lr_losses": [[lr, loss] for lr, loss in losses.items()]}
    result["books"] = evaluate_documents(model, texts, context, inner_lr=inner_lr, **options)
    if model.suffix:
        result["frozen"] = evaluate_documents(model, texts, context, learn=False, **options)
    return result
