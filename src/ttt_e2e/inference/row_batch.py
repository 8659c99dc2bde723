"""Several texts as rows of one state: joining it, leaving it, and reading a mini-batch of every row.

A text is a reference to a row (`RowRef`) of the state after its last call. Texts that stay together stay in that state
and continue from there without a copy; rows are copied only when one joins or leaves.

Shapes: B rows, T tokens.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_e2e.inference.streaming import ReadState, read_mini_batch
from ttt_e2e.inner_loop.step import InnerLoopState
from ttt_e2e.model.kv_cache import KVCache
from ttt_e2e.model.transformer import Transformer

MAX_LOGITS = 1 << 26  # in memory at once where nothing is learned: 256 MiB
_BATCHES_WITHOUT_LEARNING = 8


def chunk_size(model: Transformer, learn: bool) -> int:
    """How many tokens a text reads at once: a mini-batch, or up to eight of them where nothing is learned."""
    b = model.config.tokens_per_read
    if learn:
        return b
    return b * max(1, min(_BATCHES_WITHOUT_LEARNING, MAX_LOGITS // (model.config.vocab_size * b)))


@dataclass(frozen=True, eq=False)
class BatchedState:
    """A state of several texts. positions: tokens that each row has read, known without asking a GPU."""

    state: ReadState
    positions: tuple[int, ...]

    @cached_property
    def shapes(self) -> Hashable:
        """The shapes of a row's tensors: rows with equal ones can be learned from in one call."""
        return tuple(tuple(t.shape[1:]) for t in self.state.tensors())

    @cached_property
    def kind_and_cache_lengths(self) -> tuple[Hashable, tuple[int, ...]]:
        """The mixers' states: the shapes of all but caches, and the length of each cache, in slots.

        Rows of one kind can be read in one call if nothing is learned.
        """
        values = (*(self.state.static or ()), *self.state.loop.caches)
        others = tuple(tuple(t.shape[1:]) for value in values if not isinstance(value, KVCache) for t in value)
        return (len(values), others), tuple(value.num_slots for value in values if isinstance(value, KVCache))


class RowRef(NamedTuple):
    """One text's state: a row of a state of several. A value, as every state is."""

    batch: BatchedState
    row_index: int

    @property
    def position(self) -> int:
        """Tokens that the text has read."""
        return self.batch.positions[self.row_index]


def gather(rows: Sequence[RowRef], copy: bool = False) -> BatchedState:
    """The rows as one state, in their order. Their kind must be the same.

    It is the state that they are in if they are all of it and no copy is wanted, and otherwise a copy. In that, caches
    of texts that have read less than others have empty slots in front; there are none if all have read the same.
    """
    first = rows[0].batch
    if not copy and list(rows) == [RowRef(first, i) for i in range(len(first.positions))]:
        return first

    def join(values: tuple[Any, ...]) -> Any:
        parts = [[t[row.row_index : row.row_index + 1] for t in value] for row, value in zip(rows, values, strict=True)]
        if isinstance(values[0], KVCache):
            slots = max(min(value.num_slots, row.position) for row, value in zip(rows, values, strict=True))
            parts = [[F.pad(t, (0, 0, slots - t.shape[2], 0)) for t in part] for part in parts]  # or cut, if negative
        return type(values[0])(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def join_all(trees: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        return tuple(join(values) for values in zip(*trees, strict=True))

    states, positions = [row.batch.state for row in rows], tuple(row.position for row in rows)
    start, position_offsets_B = min(positions), None
    if max(positions) > start:
        device = first.state.tensors()[0].device
        position_offsets_B = torch.tensor([position - start for position in positions], device=device)
    static = None if states[0].static is None else join_all([state.static or () for state in states])
    loop = InnerLoopState(join_all([s.loop.fast for s in states]), join_all([s.loop.caches for s in states]))
    return BatchedState(ReadState(start, static, loop, position_offsets_B), positions)


def single_row(state: ReadState) -> RowRef:
    """The only row of the state of one text."""
    return RowRef(BatchedState(state, (state.position,)), 0)


def compact(rows: Iterable[RowRef]) -> dict[RowRef, RowRef]:
    """Copies of rows that keep a state alive most of whose rows are not among `rows`."""
    used: dict[BatchedState, set[int]] = {}
    for row in rows:
        used.setdefault(row.batch, set()).add(row.row_index)
    return {
        RowRef(batch, i): RowRef(gather([RowRef(batch, i)], copy=True), 0)
        for batch, indices in used.items()
        # At the start of a text all rows are views of the model's own weights.
        if 2 * len(indices) < len(batch.positions) and any(batch.positions)
        for i in indices
    }


def ids_tensor(model: Transformer, rows: Sequence[np.ndarray]) -> Tensor:
    """Token ids, equally many in every row, as a tensor [B, T] on the model's device."""
    return torch.from_numpy(np.stack(rows)).to(model.embedding.device)


def read_rows(
    model: Transformer, state: ReadState, rows: Sequence[np.ndarray], **options: Any
) -> tuple[ReadState, np.ndarray, list[float]]:
    """Read T of every row's T + 1 token ids, each of which predicts the next one; options as for `read_mini_batch`.

    Returns the state after them, their targets' losses in nats, float32 [B, T], and the norm of every row's gradient.
    """
    ids_BT = ids_tensor(model, rows)
    state, nll_BT, norm_B = read_mini_batch(model, state, ids_BT[:, :-1], ids_BT[:, 1:], **options)
    return state, nll_BT.float().cpu().numpy(), norm_B.tolist()
