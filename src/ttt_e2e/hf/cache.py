"""What a batch of texts has left behind in the model: the cache of the transformers library.

A text is read as a `Session` reads it. It learns at the borders of its own mini-batches, counted from its own first
token, and only once the token after them is known. Tokens since the last border are kept, so that they can be learned
from together when they are a mini-batch; a second state, which nothing was learned on the way to, stands after them.

Texts share a call wherever they can: to learn, those at the same position; to be predicted, all that are given the same
number of tokens.

Shapes: B texts, T tokens of a call, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache as TransformersCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import batches_without_learning, find_divergence, token_ids
from ttt_e2e.inference.streaming import ReadState, forward, read_mini_batch, stacked, start_reading
from ttt_e2e.model.mixers.attention import Cache
from ttt_e2e.model.transformer import Transformer

NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What the library calls a cache, in arguments and in outputs: past_key_values in its older versions."""


class _Place(NamedTuple):
    """One text's state: a row of a state of several texts that went through a call together."""

    state: ReadState
    row: int
    position: int


class _Text(NamedTuple):
    """One text. It is a value.

    border: after its last whole mini-batch. pending: the tokens since then, int64 [n]; columns: where in the input they
    were. end: after all of these; None if that is not known yet.
    """

    border: _Place
    pending: np.ndarray
    columns: np.ndarray
    end: _Place | None


class ReadingCache(TransformersCache):
    """Many texts, one a row of the input. It begins empty; `read` fills it.

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
        keep: int,
        *,
        learn: bool,
        later: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        """Read on; returns the logits [B, keep, V] after the last `keep` columns, zeros where a column is masked.

        mask [B, T], or [B, width + T] for everything from the start: 0 where a token is none of the text. Tokens since
        the last border are forgotten if the mask now leaves them out. learn: from all mini-batches that are whole.
        later: whether these tokens may have to be read again: to learn from them, if that is not now, or without those
        that a later mask leaves out. dtype: of the matrix products.
        Raises UserError if the batch has another size than before, for ids outside of the vocabulary, and if learning
        diverged; all is as before then.
        """
        batch, length = tokens_BT.shape
        texts = self._texts or _fresh(model, batch, dtype)
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
                texts = tuple(_without(text, marks[i]) for i, text in enumerate(texts))
        token_ids(ids[seen], model.config.vocab_size)
        call = _Call(model, dtype, texts, [row[s] for row, s in zip(ids, seen, strict=True)], seen[:, -keep:].sum(1))
        if learn:
            call.learn()
        call.predict()
        added = [self.width + np.flatnonzero(row) for row in seen]
        self._texts = call.outcome(added, later)
        self.width += length
        logits_BTV = torch.zeros(batch, keep, model.config.vocab_size, dtype=dtype, device=model.embedding.device)
        for i, pieces in enumerate(call.logits):
            logits_BTV[i, np.flatnonzero(seen[i, -keep:])] = torch.cat(pieces)
        return logits_BTV

    # -- what the transformers library asks of a cache -----------------------------------------------------------------

    is_compileable = False
    is_croppable = False
    is_linear = [False]  # noqa: RUF012 - so that `generate` gives it only what it has not read yet, of ids from the start

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the input so far, padding included; they are the same for every layer."""
        return self.width

    def reset(self) -> None:
        """Forget everything."""
        self.width, self._texts = 0, ()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows in this order; a row may come several times."""
        self._texts = tuple(self._texts[i] for i in beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Take every row so many times."""
        self._texts = tuple(text for text in self._texts for _ in range(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: raises UserError, unless nothing is to be removed."""
        if tokens_to_remove != 0:
            raise UserError("What was read cannot be taken back; keep a copy of the cache from before (copy.copy).")


class _Call:
    """Some tokens more for every text. wanted: after how many of the last ones each text's logits are wanted."""

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
        dummy = torch.empty(0, model.config.vocab_size, dtype=dtype, device=model.embedding.device)
        self.logits = [[dummy] for _ in texts]

    def learn(self) -> None:
        """Learn from all whole mini-batches whose next token is known, as many texts at a time as stand together."""
        b = self.model.config.mini_batch_size
        assert b is not None
        while ready := [i for i, pending in enumerate(self.pending) if len(pending) > b]:
            for rows in _groups(ready, lambda i: self.borders[i].position):
                state = _settled(_together([self.borders[i] for i in rows]), self.borders[rows[0]].position)
                ids_BT = self._tensor([self.pending[i][: b + 1] for i in rows])
                wanted = [self.wanted[i] + b - len(self.pending[i]) for i in rows]
                if max(wanted) > 0:
                    self._score(state, ids_BT[:, :-1], rows, wanted)
                after, nll_Bb, norm_B = read_mini_batch(
                    self.model, state, ids_BT[:, :-1], ids_BT[:, 1:], dtype=self.dtype
                )
                losses, norms = nll_Bb.float().cpu().numpy(), norm_B.tolist()
                for at, i in enumerate(rows):
                    position = self.borders[i].position
                    found = find_divergence(losses[at], norms[at], position, position > 0, self.model.config.vocab_size)
                    if found is not None:
                        raise UserError(
                            f"Learning diverged in row {i} of the batch: {found[0]}; the cache is as it was before. "
                            "Read with learn_while_reading=False, or with a model of a smaller inner_loop.lr."
                        )
                    self.borders[i] = _Place(after, at, position + b)
                    self.pending[i], self.ends[i] = self.pending[i][b:], None

    def predict(self) -> None:
        """Go on to the end of every text, without learning, and keep the logits that are wanted there."""
        starts, tokens = [], []
        for border, end, pending, new in zip(self.borders, self.ends, self.pending, self.new, strict=True):
            starts.append(border if end is None else end)
            tokens.append(pending if end is None else new)
        given = [i for i in range(len(starts)) if len(tokens[i])]
        for rows in _groups(given, lambda i: (len(tokens[i]), _kind(starts[i].state))):
            state = _together([starts[i] for i in rows])
            after = self._score(state, self._tensor([tokens[i] for i in rows]), rows, [self.wanted[i] for i in rows])
            for at, i in enumerate(rows):
                self.ends[i] = _Place(after, at, starts[i].position + len(tokens[i]))

    def outcome(self, added: Sequence[np.ndarray], later: bool) -> tuple[_Text, ...]:
        """The texts as they are now. added: the columns of the new tokens."""
        texts = []
        borders = _less(self.borders) if later else self.borders
        for i, (text, border) in enumerate(zip(self.texts, borders, strict=True)):
            end = self.ends[i]
            if later or end is None:
                columns = np.concatenate((text.columns, added[i]))
                kept = len(self.pending[i])
                texts.append(_Text(border, self.pending[i], columns[len(columns) - kept :], end))
            else:
                texts.append(_Text(end, self.pending[i][:0], added[i][:0], end))
        return tuple(texts)

    def _score(self, state: ReadState, ids_BT: Tensor, rows: Sequence[int], wanted: Sequence[int]) -> ReadState:
        """The state after `ids`, nothing learned; keeps the logits after each row's last `wanted` ones of them."""
        length = ids_BT.shape[1]
        first = length - min(length, max(0, *wanted))
        piece = self.model.config.read_batch * batches_without_learning(self.model.config)
        for at in range(0, first, piece):  # no logits of a whole text at once
            part_BT = ids_BT[:, at : min(at + piece, first)]
            state, _, _ = read_mini_batch(self.model, state, part_BT, part_BT, learn=False, dtype=self.dtype)
        if first < length:
            logits_BTV, state = forward(self.model, state, ids_BT[:, first:], self.dtype)
            for at, (i, count) in enumerate(zip(rows, wanted, strict=True)):
                if count > 0:
                    self.logits[i].append(logits_BTV[at, -min(length, count) :])
        return state

    def _tensor(self, rows: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(rows)).to(self.model.embedding.device)


def _fresh(model: Transformer, batch: int, dtype: torch.dtype) -> tuple[_Text, ...]:
    """Texts of which nothing is read yet."""
    state, nothing = start_reading(model, batch, dtype), np.empty(0, np.int64)
    return tuple(_Text(_Place(state, row, 0), nothing, nothing, None) for row in range(batch))


def _without(text: _Text, marks: np.ndarray) -> _Text:
    """The text less the pending tokens whose columns are not marked."""
    kept = marks[text.columns]
    if kept.all():
        return text
    return text._replace(pending=text.pending[kept], columns=text.columns[kept], end=None)


def _less(places: Sequence[_Place]) -> list[_Place]:
    """The same places, copied out of states most of whose rows none of them is, so that the rest is freed."""
    used = Counter(state for state, _ in {(id(place.state), place.row) for place in places})

    def alone(place: _Place) -> _Place:
        tensors = place.state.tensors()
        if place.position == 0 or 2 * used[id(place.state)] >= len(tensors[0]):  # at the start all rows are one
            return place
        return _Place(stacked([place.state], [place.row], [place.position]), 0, place.position)

    return [alone(place) for place in places]


def _groups(rows: Iterable[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """Rows with equal keys, in their order."""
    groups: dict[Hashable, list[int]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _kind(state: ReadState) -> Hashable:
    """What states must have in common to be one: the shapes of a row, whatever the number of slots of its caches."""

    values = (*(state.static or ()), *state.loop.caches)
    return tuple(Cache if isinstance(value, Cache) else tuple(tuple(t.shape[1:]) for t in value) for value in values)


def _settled(state: ReadState, position: int) -> ReadState:
    """The state of texts at `position`, less the slots that are empty where they were read beside others further on."""
    if state.position_offsets_B is None:
        return state

    def cut(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            Cache(*(t[:, :, max(0, t.shape[2] - position) :] for t in value)) if isinstance(value, Cache) else value
            for value in values
        )

    loop = state.loop._replace(caches=cut(state.loop.caches))
    return ReadState(position, None if state.static is None else cut(state.static), loop)


def _together(places: Sequence[_Place]) -> ReadState:
    """One state of several rows, in their order: the one that they are all of, else a copy."""
    first = places[0].state
    tensors = first.tensors()
    whole = not tensors or len(tensors[0]) == len(places)
    if whole and all(place.state is first and place.row == row for row, place in enumerate(places)):
        return first
    return stacked([p.state for p in places], [p.row for p in places], [p.position for p in places])
