"""The keys and values that attention keeps of the tokens before.

There is one form: S slots, oldest token first, filled from the right. How many of them are empty follows from the
number of tokens that a row has read (`CacheView.seq_lens`). How many slots there are is a matter of allocation: while
a text is read, S grows up to the window; under a compiler all slots are there from the start, so that every mini-batch
has the same shapes; and rows that have read different numbers of tokens share the largest S.

Shapes: B sequences, G key/value heads, S slots, T new tokens, K head dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class KVCache(NamedTuple):
    """Rotated keys and values of the last tokens: a value, as every mixer's state is."""

    k_BGSK: Tensor
    v_BGSK: Tensor

    @property
    def num_slots(self) -> int:
        """Slots, filled and empty ones (S)."""
        return self.k_BGSK.shape[2]

    def append(self, new: "KVCache") -> "KVCache":
        """The cache with the keys and values of T more tokens behind its last slot."""
        if self.num_slots == 0:
            return new
        return KVCache(torch.cat((self.k_BGSK, new.k_BGSK), 2), torch.cat((self.v_BGSK, new.v_BGSK), 2))

    def append_(self, new: "KVCache") -> "BufferedKVCache":
        """`append` for a cache that nobody else needs any more: in place, where its memory has room behind it.

        What stands behind the cache is overwritten, so that a call that failed half-way can be made again.
        """
        total = self.num_slots + new.num_slots
        buffer, stop = (self.buffer, self.stop) if isinstance(self, BufferedKVCache) else (None, 0)
        if buffer is None or stop + new.num_slots > buffer.num_slots:
            batch, heads, stop, head_dim = self.k_BGSK.shape
            room = total + total // 2  # so that few calls copy the cache
            buffer = KVCache(*(x.new_empty(batch, heads, room, head_dim) for x in self))
            buffer.k_BGSK[:, :, :stop], buffer.v_BGSK[:, :, :stop] = self
        end = stop + new.num_slots
        buffer.k_BGSK[:, :, stop:end], buffer.v_BGSK[:, :, stop:end] = new
        return BufferedKVCache.of(buffer, end - total, end)

    def last(self, count: int | None) -> "KVCache":
        """A view of the last `count` slots, or of all if there are fewer or if `count` is None."""
        if count is None or count >= self.num_slots:
            return self
        if isinstance(self, BufferedKVCache) and self.buffer is not None:
            return BufferedKVCache.of(self.buffer, self.stop - count, self.stop)
        drop = self.num_slots - count
        return KVCache(self.k_BGSK[:, :, drop:], self.v_BGSK[:, :, drop:])

    def without_last(self, count: int) -> "KVCache":
        """A view of all but the last `count` slots."""
        stop = self.num_slots - count
        return KVCache(self.k_BGSK[:, :, :stop], self.v_BGSK[:, :, :stop])

    def contiguous(self) -> "KVCache":
        """The cache in memory of its own, so that it keeps nothing larger alive."""
        return KVCache(self.k_BGSK.contiguous(), self.v_BGSK.contiguous())


class BufferedKVCache(KVCache):
    """A cache that is a part of a buffer, up to the slot `stop`, with room behind it. A copy has no buffer."""

    buffer: KVCache | None = None
    stop: int = 0

    @classmethod
    def of(cls, buffer: KVCache, start: int, stop: int) -> "BufferedKVCache":
        """The slots `start` to `stop` of `buffer`."""
        cache = cls(buffer.k_BGSK[:, :, start:stop], buffer.v_BGSK[:, :, start:stop])
        cache.buffer, cache.stop = buffer, stop
        return cache
