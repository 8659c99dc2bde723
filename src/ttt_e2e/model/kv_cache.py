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
        """`append` for a cache that nobody else needs any more: in place, where its memory has room behind it."""
        buffer, total = self.buffer if isinstance(self, BufferedKVCache) else None, self.num_slots + new.num_slots
        if buffer is None or buffer.stop + new.num_slots > buffer.k.shape[2]:
            buffer = KVBuffer(self, capacity=total + total // 2)  # so that few calls copy the cache
        return buffer.append(new, keep=total)

    def last(self, count: int | None) -> "KVCache":
        """A view of the last `count` slots, or of all if there are fewer or if `count` is None."""
        if count is None or count >= self.num_slots:
            return self
        drop = self.num_slots - count
        rest = type(self)(self.k_BGSK[:, :, drop:], self.v_BGSK[:, :, drop:])
        if isinstance(self, BufferedKVCache) and isinstance(rest, BufferedKVCache):
            rest.buffer = self.buffer
        return rest

    def contiguous(self) -> "KVCache":
        """The cache in memory of its own, so that it keeps nothing larger alive."""
        return KVCache(self.k_BGSK.contiguous(), self.v_BGSK.contiguous())


class BufferedKVCache(KVCache):
    """A cache whose slots are the last ones written to a buffer with room for more. A copy has no buffer."""

    buffer: "KVBuffer | None" = None


class KVBuffer:
    """Memory for `capacity` slots, which tokens are appended to. Only the newest cache may be appended to again."""

    def __init__(self, cache: KVCache, capacity: int):
        batch, heads, self.stop, head_dim = cache.k_BGSK.shape
        self.k, self.v = (x.new_empty(batch, heads, capacity, head_dim) for x in cache)
        self.k[:, :, : self.stop], self.v[:, :, : self.stop] = cache

    def append(self, new: KVCache, keep: int) -> BufferedKVCache:
        """Write `new` behind the last token; returns the cache of the last `keep` slots."""
        start, self.stop = self.stop, self.stop + new.num_slots
        self.k[:, :, start : self.stop], self.v[:, :, start : self.stop] = new
        first = self.stop - keep
        cache = BufferedKVCache(self.k[:, :, first : self.stop], self.v[:, :, first : self.stop])
        cache.buffer = self
        return cache
