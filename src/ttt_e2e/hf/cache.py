"""What a batch of texts has left behind in the model: the cache of the transformers library.

A text is read as a `Session` reads it. It learns at the end of each of its own mini-batches, counted from its own first
token, and only once the token after that is known. Tokens since then are kept, so that they can be learned from
together when they are a mini-batch; a second state, which nothing was learned on the way to, stands after them.

Texts share a call wherever they can: to learn, those at the same position; to be predicted, all that are given the same
number of tokens.

Shapes: B texts, T tokens of a call, V vocabulary.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

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
    """One text: a value.

    border: its state after its last full mini-batch. pending: the tokens since then, int64 [n]. columns: where in the
    input these were. end: the state after them; None if it is not known yet.
    """

    border: RowRef
    pending: np.ndarray
    columns: np.ndarray
    end: RowRef | None


class ReadingCache(TransformersCache):
    """The texts of a batch, one for each row of the input. It begins empty, and `read` fills it.

    width: columns of the input so far, padding included.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.width = 0
        self._texts: tuple[_Text, ...] = ()

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
        texts = self._texts or _empty_texts(model, batch, dtype)
        if len(texts) != batch:
            raise UserError(f"The cache is of {len(texts)} texts, the input of {batch}; give each batch its own cache.")
        ids, seen = tokens_BT.cpu().numpy(), np.ones((batch, length), bool)
        if mask is not None:
            if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (length, self.width + length):
                raise UserError(
                    f"The attention mask has shape {list(mask.shape)}; give one of {[batch, length]}, or of "
                    f"{[batch, self.width + length]} for all columns since the start."
                )
            marks = mask.cpu().numpy() != 0
            seen = marks[:, -length:]
            if marks.shape[1] > length:
                texts = tuple(_without_masked(text, marks[i]) for i, text in enumerate(texts))
        check_token_ids(ids[seen], model.config.vocab_size)
        new = [row[s] for row, s in zip(ids, seen, strict=True)]
        call = _Call(model, dtype, texts, new, seen[:, -logits_to_keep:].sum(1))
        if learn:
            call.learn()
        call.predict()
        added = [self.width + np.flatnonzero(row) for row in seen]
        self._texts = call.texts_after(added, keep_pending)
        self.width += length
        shape = (batch, logits_to_keep, model.config.vocab_size)
        logits_BTV = torch.zeros(shape, dtype=dtype, device=model.embedding.device)
        for i, parts in enumerate(call.logits):
            logits_BTV[i, np.flatnonzero(seen[i, -logits_to_keep:])] = torch.cat(parts)
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


class _Call:
    """More tokens for every text. wanted: for how many of each text's last ones logits are wanted."""

    def __init__(
        self,
        model: Transformer,
        dtype: torch.dtype,
        texts: Sequence[_Text],
        new: list[np.ndarray],
        wanted: Iterable[int],
    ) -> None:
        self.model, self.dtype = model, dtype
        self.texts = texts
        self.new = new
        self.wanted = [int(n) for n in wanted]
        self.borders = [text.border for text in texts]
        self.pending = [np.concatenate((text.pending, more)) for text, more in zip(texts, new, strict=True)]
        self.ends = [text.end for text in texts]
        none = torch.empty(0, model.config.vocab_size, dtype=dtype, device=model.embedding.device)
        self.logits = [[none] for _ in texts]

    def learn(self) -> None:
        """Learn from all full mini-batches whose next token is known, as many texts at a time as share a position."""
        b, vocab_size = self.model.config.tokens_per_read, self.model.config.vocab_size
        while ready := [i for i, pending in enumerate(self.pending) if len(pending) > b]:
            for rows in _groups(ready, lambda i: self.borders[i].position):
                batch = gather([self.borders[i] for i in rows])
                ids = [self.pending[i][: b + 1] for i in rows]
                wanted = [self.wanted[i] + b - len(self.pending[i]) for i in rows]
                if max(wanted) > 0:
                    self._read(batch, [row[:-1] for row in ids], rows, wanted)
                after, losses_BT, norm_B = read_rows(self.model, batch.state, ids, learn=True, dtype=self.dtype)
                new = BatchedState(after, tuple(position + b for position in batch.positions))
                for row, i in enumerate(rows):
                    position = batch.positions[row]
                    found = find_divergence(losses_BT[row], norm_B[row], position, vocab_size, learns=True)
                    if found is not None:
                        raise UserError(
                            f"Learning diverged in row {i} of the batch: {found.what}; the cache is unchanged. "
                            "Read with learn_while_reading=False, or use a model with a smaller inner_loop.lr."
                        )
                    self.borders[i] = RowRef(new, row)
                    self.pending[i], self.ends[i] = self.pending[i][b:], None

    def predict(self) -> None:
        """Read every text to its end without learning, and keep the logits that are wanted there."""
        starts, tokens = [], []
        for border, end, pending, new in zip(self.borders, self.ends, self.pending, self.new, strict=True):
            starts.append(border if end is None else end)
            tokens.append(pending if end is None else new)
        given = [i for i in range(len(starts)) if len(tokens[i])]
        for rows in _groups(given, lambda i: (len(tokens[i]), starts[i].batch.kind)):
            batch = gather([starts[i] for i in rows])
            after = self._read(batch, [tokens[i] for i in rows], rows, [self.wanted[i] for i in rows])
            for row, i in enumerate(rows):
                self.ends[i] = RowRef(after, row)

    def texts_after(self, added: Sequence[np.ndarray], keep_pending: bool) -> tuple[_Text, ...]:
        """The texts with the tokens that were read. added: the columns of these."""
        texts = []
        copies = compact(self.borders) if keep_pending else {}
        for i, (text, border, end) in enumerate(zip(self.texts, self.borders, self.ends, strict=True)):
            if keep_pending or end is None:
                pending, columns = self.pending[i], np.concatenate((text.columns, added[i]))
                columns = columns[len(columns) - len(pending) :]
                texts.append(_Text(copies.get(border, border), pending, columns, end))
            else:
                texts.append(_Text(end, self.pending[i][:0], added[i][:0], end))
        return tuple(texts)

    def _read(
        self, batch: BatchedState, ids: list[np.ndarray], rows: Sequence[int], wanted: Sequence[int]
    ) -> BatchedState:
        """The state after all ids, without learning; keeps the logits after each row's last `wanted` ones of them."""
        ids_BT = ids_tensor(self.model, ids)
        state, length = batch.state, ids_BT.shape[1]
        first = length - min(length, max(0, *wanted))
        size = chunk_size(self.model, learn=False)
        for start in range(0, first, size):  # no logits of a whole text at once
            part_BT = ids_BT[:, start : min(start + size, first)]
            state, _, _ = read_mini_batch(self.model, state, part_BT, part_BT, learn=False, dtype=self.dtype)
        if first < length:
            logits_BTV, state = forward(self.model, state, ids_BT[:, first:], self.dtype)
            for row, (i, count) in enumerate(zip(rows, wanted, strict=True)):
                if count > 0:
                    self.logits[i].append(logits_BTV[row, -min(length, count) :])
        return BatchedState(state, tuple(position + length for position in batch.positions))


def _empty_texts(model: Transformer, batch: int, dtype: torch.dtype) -> tuple[_Text, ...]:
    """Texts of which nothing was read yet."""
    state, nothing = BatchedState(start_reading(model, batch, dtype), (0,) * batch), np.empty(0, np.int64)
    return tuple(_Text(RowRef(state, row), nothing, nothing, None) for row in range(batch))


def _without_masked(text: _Text, marks: np.ndarray) -> _Text:
    """The text without the pending tokens whose columns are not marked."""
    kept = marks[text.columns]
    if kept.all():
        return text
    return text._replace(pending=text.pending[kept], columns=text.columns[kept], end=None)


def _groups(rows: Iterable[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """Rows with equal keys, in their order."""
    groups: dict[Hashable, list[int]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())
