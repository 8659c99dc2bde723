"""What a batch of texts has left behind in the model: the cache of the transformers library.

A text is read as a `Session` reads it. It learns at the end of each of its own mini-batches, counted from its own first
token, and only once the token after that is known. Tokens since then are kept, so that they can be learned from
together when they are a mini-batch; a second state, which nothing was learned on the way to, stands after them.

Texts share a call wherever they can: to learn, those at the same position; to be predicted, all that are given the same
number of tokens.

Shapes: B texts, T tokens of a call, V vocabulary.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache as TransformersCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ttt_e2e.errors import UserError
from ttt_e2e.inference.divergence import find_divergence
from ttt_e2e.inference.row_batch import BatchedState, RowRef, chunk_size, compact, gather, ids_tensor, read_rows
from ttt_e2e.inference.session import check_token_ids
from ttt_e2e.inference.streaming import forward, read_mini_batch, start_reading
from ttt_e2e.model.transformer import Transformer

CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What the library calls a cache, in arguments and in outputs: past_key_values in its older versions."""


class _Text(NamedTuple):
    """One text: a value."""

    border: RowRef  # its state after its last full mini-batch
    pending: np.ndarray  # the tokens since then, int64 [n]
    columns: np.ndarray  # where in the input these were
    end: RowRef | None  # the state after them; None if it is not known yet


@dataclass(eq=False)
class _Row:
    """A text in a call. new: its tokens there. wanted: for how many of the last ones logits are wanted."""

    text: _Text
    new: np.ndarray
    wanted: int
    logits: list[Tensor] = field(default_factory=list)


class ReadingCache(TransformersCache):
    """The texts of a batch, one for each row of the input. It begins empty, and `read` fills it.

    width: columns of the input so far, padding included.
    """

    width = 0
    _texts: tuple[_Text, ...] = ()

    def __init__(self) -> None:
        super().__init__(layers=[])

    @torch.no_grad()
    def read(
        self,
        model: Transformer,
        tokens_BT: Tensor,
        mask: Tensor | None,
        logits_to_keep: int,
        *,
        learn: bool,
        keep_pending: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        """Read more of every text.

        Args:
            model: to read with.
            tokens_BT: token ids [B, T].
            mask: 0 where a token is not part of the text, [B, T], or [B, width + T] for everything from the start.
                Pending tokens are forgotten if it leaves them out now.
            logits_to_keep: for how many of the last columns logits are returned.
            learn: whether to learn from all full mini-batches.
            keep_pending: whether these tokens may have to be read again: to learn from them, if that is not now, or
                without those that a later mask leaves out.
            dtype: of the matrix products.

        Returns:
            The logits [B, logits_to_keep, V], zeros where a column is masked.

        Raises:
            UserError: the batch has another size than before, ids are outside of the vocabulary, or learning diverged.
                The cache is then unchanged.
        """
        batch, length = tokens_BT.shape
        texts, nothing = self._texts, np.empty(0, np.int64)
        if not texts:
            state = BatchedState(start_reading(model, batch, dtype), (0,) * batch)
            texts = tuple(_Text(RowRef(state, i), nothing, nothing, None) for i in range(batch))
        if len(texts) != batch:
            raise UserError(f"The cache is of {len(texts)} texts, the input of {batch}; give each batch its own cache.")
        ids, marks = tokens_BT.cpu().numpy(), np.ones((batch, length), bool)
        if mask is not None:
            if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (length, self.width + length):
                raise UserError(
                    f"The attention mask has shape {list(mask.shape)}; give one of {[batch, length]}, or of "
                    f"{[batch, self.width + length]} for all columns since the start."
                )
            marks = mask.cpu().numpy() != 0
        seen = marks[:, -length:]
        check_token_ids(ids[seen], model.config.vocab_size)
        rows = []
        for i, text in enumerate(texts):
            if marks.shape[1] > length and not (kept := marks[i, text.columns]).all():
                text = _Text(text.border, text.pending[kept], text.columns[kept], None)
            new, columns = ids[i, seen[i]], np.concatenate((text.columns, self.width + np.flatnonzero(seen[i])))
            text = text._replace(pending=np.concatenate((text.pending, new)), columns=columns)
            rows.append(_Row(text, new, int(seen[i, -logits_to_keep:].sum())))
        if learn:
            _learn(model, rows, dtype)
        _predict(model, rows, dtype)
        copies = compact(row.text.border for row in rows) if keep_pending else {}
        self._texts = tuple(
            _Text(end, nothing, nothing, end)
            if end is not None and not keep_pending
            else _Text(copies.get(border, border), pending, columns, end)
            for border, pending, columns, end in (row.text for row in rows)
        )
        self.width += length
        logits_BTV = model.embedding.new_zeros(batch, logits_to_keep, model.config.vocab_size, dtype=dtype)
        for i, row in enumerate(rows):
            if row.logits:
                logits_BTV[i, np.flatnonzero(seen[i, -logits_to_keep:])] = torch.cat(row.logits)
        return logits_BTV

    # -- the interface of the transformers library ---------------------------------------------------------------------

    is_compileable = False
    is_croppable = False
    is_linear = [False]  # noqa: RUF012 - so that `generate` gives it only what it has not read yet, of ids from the start

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the input so far, padding included; the same for every layer."""
        return self.width

    def reset(self) -> None:
        """Forget everything."""
        self.width, self._texts = 0, ()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order; a row may come several times."""
        self._texts = tuple(self._texts[i] for i in beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._texts = tuple(text for text in self._texts for _ in range(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Not supported: raises UserError, unless nothing is to be removed."""
        if tokens_to_remove != 0:
            raise UserError("Tokens that were read cannot be removed; keep a copy of the cache (copy.copy).")


def _learn(model: Transformer, rows: list[_Row], dtype: torch.dtype) -> None:
    """Learn from all full mini-batches whose next token is known, as many texts at a time as share a position."""
    b = model.config.tokens_per_read
    while ready := [row for row in rows if len(row.text.pending) > b]:
        for some in _groups(ready, lambda row: row.text.border.position):
            batch = gather([row.text.border for row in some])
            ids = [row.text.pending[: b + 1] for row in some]
            wanted = {row: row.wanted + b - len(row.text.pending) for row in some}
            if max(wanted.values()) > 0:
                _read(model, batch, [row[:-1] for row in ids], wanted, dtype)
            after, losses_BT, norm_B = read_rows(model, batch.state, ids, learn=True, dtype=dtype)
            new = BatchedState(after, tuple(position + b for position in batch.positions))
            for i, row in enumerate(some):
                found = find_divergence(
                    losses_BT[i], norm_B[i], batch.positions[i], model.config.vocab_size, learns=True
                )
                if found is not None:
                    raise UserError(
                        f"Learning diverged in row {rows.index(row)} of the batch: {found[0]}; the cache is unchanged. "
                        "Read with learn_while_reading=False, or use a model with a smaller inner_loop.lr."
                    )
                row.text = _Text(RowRef(new, i), row.text.pending[b:], row.text.columns[b:], None)


def _predict(model: Transformer, rows: list[_Row], dtype: torch.dtype) -> None:
    """Read every text to its end without learning, and keep the logits that are wanted there."""
    ends = [(row.text.end, row.new) if row.text.end else (row.text.border, row.text.pending) for row in rows]
    given = [(row, start, ids) for row, (start, ids) in zip(rows, ends, strict=True) if len(ids)]
    for some in _groups(given, lambda one: (len(one[2]), one[1].batch.kind_and_cache_lengths[0])):
        group, starts, ids = zip(*some, strict=True)
        after = _read(model, gather(starts), ids, {row: row.wanted for row in group}, dtype)
        for i, row in enumerate(group):
            row.text = row.text._replace(end=RowRef(after, i))


def _read(
    model: Transformer, batch: BatchedState, ids: Sequence[np.ndarray], wanted: dict[_Row, int], dtype: torch.dtype
) -> BatchedState:
    """The state after all ids, without learning; keeps the logits after each row's last `wanted` ones of them."""
    ids_BT, state = ids_tensor(model, ids), batch.state
    length = ids_BT.shape[1]
    first = length - min(length, max(0, *wanted.values()))
    size = chunk_size(model, learn=False)
    for start in range(0, first, size):  # no logits of a whole text at once
        part_BT = ids_BT[:, start : min(start + size, first)]
        state, _, _ = read_mini_batch(model, state, part_BT, part_BT, learn=False, dtype=dtype)
    if first < length:
        logits_BTV, state = forward(model, state, ids_BT[:, first:], dtype)
        for i, (row, count) in enumerate(wanted.items()):
            if count > 0:
                row.logits.append(logits_BTV[i, -min(length, count) :])
    return BatchedState(state, tuple(position + length for position in batch.positions))


def _groups(items: Iterable[Any], key: Callable[[Any], Hashable]) -> list[list[Any]]:
    """Items with equal keys, in their order."""
    groups: dict[Hashable, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
