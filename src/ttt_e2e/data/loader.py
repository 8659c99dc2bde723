"""Sequences of T+1 tokens from long documents, shuffled by a seed, from a position that can be restored."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ttt_e2e.data.shards import TokenSet
from ttt_e2e.errors import UserError


class SequenceLoader(Iterator[torch.Tensor]):
    """An endless iterator of batches: int64 tensors [batch, context + 1] on the CPU.

    In an epoch every document of more than `context` tokens is cut into windows of `context + 1` tokens that overlap by
    one, so that no token is a target twice. The first window starts at random within the tokens that are left over.
    Shorter documents are first joined, in random order, into one stream that is cut in the same way. The windows of an
    epoch come in random order, and a batch may extend into the next epoch. Of every `world_size * batch` sequences, the
    process `rank` gets its own `batch`. With `same_windows` every epoch has the windows of the first, in another order.

    The order is a function of the tokens, `context` and `seed` alone, so the position is two numbers. Raises UserError
    if the tokens do not fill one window.
    """

    def __init__(
        self,
        tokens: TokenSet,
        context: int,
        batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        same_windows: bool = False,
    ) -> None:
        if context < 1 or batch < 1 or not 0 <= rank < world_size:
            raise ValueError(f"invalid loader: {context=}, {batch=}, {rank=}, {world_size=}")
        self.tokens, self.context, self.batch, self.seed = tokens, context, batch, seed
        self.rank, self.world_size, self.same_windows = rank, world_size, same_windows
        is_long = tokens.lengths > context
        self._long = np.flatnonzero(is_long)
        self._short = np.flatnonzero(~is_long)
        windows = (tokens.lengths[self._long] - 1) // context
        self._window_starts = np.cumsum(windows) - windows
        self._long_windows = int(windows.sum())
        self._short_total = int(tokens.lengths[self._short].sum())
        self.windows = self._long_windows + max(0, (self._short_total - 1) // context)
        if self.windows == 0:
            raise UserError(
                f"{tokens.where} holds {tokens.total} tokens in {len(tokens)} documents, "
                f"too few for one sequence of {context + 1}; choose a shorter context=N or prepare more text."
            )
        self._epoch, self._index = 0, 0
        self._shuffle()

    def __next__(self) -> torch.Tensor:
        return self.next_batch()[1]

    def next_batch(self) -> tuple[list[int], torch.Tensor]:
        """The next batch, and the indices of its windows within their epoch, which `window` takes."""
        windows, sequences = [], []
        self._advance(self.rank * self.batch)
        for _ in range(self.batch):
            windows.append(int(self._order[self._index]))
            sequences.append(self.window(windows[-1]))  # at once: the next one may be in another epoch
            self._advance(1)
        self._advance((self.world_size - 1 - self.rank) * self.batch)
        return windows, torch.stack(sequences)

    def window(self, index: int) -> torch.Tensor:
        """The window `index` of this epoch, int64 [context + 1]."""
        sequence = np.empty(self.context + 1, np.int64)
        self._read(index, sequence)
        return torch.from_numpy(self.tokens.check_ids(sequence))

    def state(self) -> dict[str, Any]:
        """The position and what it belongs to, as plain values for JSON; equal on all ranks."""
        position = {"epoch": self._epoch, "index": self._index, "seed": self.seed}
        return {**position, "context": self.context, "batch": self.batch, "data": self.tokens.digest}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken; only `batch`, `world_size` and the seed may be others here."""
        if state["data"] != self.tokens.digest:
            raise UserError(
                f"{self.tokens.where} does not hold the tokens that the saved position belongs to; "
                "continue with those, or start a new run."
            )
        if state["context"] != self.context:
            raise UserError(
                f"The saved position belongs to a context of {state['context']} tokens, not {self.context}; "
                "continue with that, or start a new run."
            )
        self.seed, self._epoch, self._index = state["seed"], state["epoch"], state["index"]
        self._shuffle()

    def _advance(self, sequences: int) -> None:
        epochs, self._index = divmod(self._index + sequences, self.windows)
        if epochs:
            self._epoch += epochs
            self._shuffle()

    def _shuffle(self) -> None:
        """Draw the starts and the order of this epoch."""
        # The raw output of the bit generator: only that is promised to be the same in all versions of numpy.
        bits = np.random.PCG64([self.seed, self._epoch])
        self._order = np.argsort(bits.random_raw(self.windows), kind="stable")
        if self.same_windows:
            bits = np.random.PCG64([self.seed, 0])
            bits.random_raw(self.windows)  # the order
        leftover = (self.tokens.lengths[self._long] - 1) % self.context
        self._offsets = (bits.random_raw(len(self._long)) % (leftover + 1).astype(np.uint64)).astype(np.int64)
        self._packed = self._short[np.argsort(bits.random_raw(len(self._short)), kind="stable")]
        packed_lengths = self.tokens.lengths[self._packed]
        self._packed_starts = np.cumsum(packed_lengths) - packed_lengths
        packed_leftover = max(0, self._short_total - 1) % self.context
        self._packed_offset = int(bits.random_raw(1)[0] % np.uint64(packed_leftover + 1))

    def _read(self, window: int, into: np.ndarray) -> None:
        if window < self._long_windows:
            nth = int(np.searchsorted(self._window_starts, window, side="right")) - 1
            start = int(self._offsets[nth] + (window - self._window_starts[nth]) * self.context)
            into[:] = self.tokens.document(int(self._long[nth]), start, start + self.context + 1)
            return
        position = self._packed_offset + (window - self._long_windows) * self.context
        nth = int(np.searchsorted(self._packed_starts, position, side="right")) - 1
        while len(into):
            start = position - int(self._packed_starts[nth])
            part = self.tokens.document(int(self._packed[nth]), start, start + len(into))
            into[: len(part)] = part
            into, position, nth = into[len(part) :], position + len(part), nth + 1


def val_sequences(tokens: TokenSet, context: int, max_tokens: int) -> list[np.ndarray]:
    """The sequences to evaluate on: int64 arrays of 2 to `context + 1` tokens, always the same ones.

    First the beginning of every document, then the next `context` tokens of every document that has more, and so on,
    with at most `max_tokens` targets in all. Raises UserError if there is no such sequence.
    """
    sequences: list[np.ndarray] = []
    room = max_tokens
    for start in range(0, int(tokens.lengths.max()), context):
        room_before = room
        for document in np.flatnonzero(tokens.lengths > start + 1).tolist():
            targets = min(context, int(tokens.lengths[document]) - start - 1)
            if targets <= room:
                ids = tokens.document(document, start, start + targets + 1)
                sequences.append(tokens.check_ids(ids).astype(np.int64))
                room -= targets
        if room == room_before:
            break
    if not sequences:
        raise UserError(
            f"{tokens.where} has no sequence to evaluate on within {max_tokens} tokens; "
            "raise train.eval_tokens, or set train.eval_every=0 to train without evaluations."
        )
    return sequences
