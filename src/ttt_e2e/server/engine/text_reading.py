"""A text while a session reads it: tokenised slightly ahead of the model, and what its losses are so far."""

import asyncio
from collections.abc import Iterator

import numpy as np

from ttt_e2e.inference.pool_requests import Done, Losses
from ttt_e2e.inference.session_pool import SessionPool
from ttt_e2e.server.engine.records import ReadProgress, SessionSummary
from ttt_e2e.server.engine.worker import PooledSession

_MAX_SUBMITTED = 2  # one batch is read while the next is tokenised


class TextReading:
    """A text that is read by a session in the worker's pool.

    Args:
        pooled: the session.
        batches: the tokens of the text, some at a time, and how many bytes of it they are; taken in a thread.
        unscored: how many tokens the session had pending; their losses come first, and are not those of the text.
    """

    def __init__(self, pooled: PooledSession, batches: Iterator[tuple[np.ndarray, int]], unscored: int) -> None:
        self._pooled, self._batches, self._unscored = pooled, batches, unscored
        self._has_more, self._submitted = True, 0  # batches
        self._tokens = self._bytes = 0  # of the batches that were submitted
        self._scored, self._loss_sum = 0, 0.0

    async def advance(self) -> ReadProgress | None:
        """Read on until there are further losses; returns None once the whole text is read."""
        while self._has_more or self._submitted:
            if self._has_more and self._submitted < _MAX_SUBMITTED:
                await self._submit_batch()
                continue
            event = await self._pooled.next_event()
            self._submitted -= isinstance(event, Done)
            if isinstance(event, Losses):
                losses = event.losses[self._unscored :]
                self._unscored -= len(event.losses) - len(losses)
                if len(losses):
                    return self._progress(losses)
        return None

    def finished(self, session: SessionSummary) -> ReadProgress:
        """The last progress, once the session is saved."""
        loss = self._loss_sum / self._scored if self._scored else None
        return ReadProgress(self._scored, loss, None, session, self._bytes)

    async def _submit_batch(self) -> None:
        batch = await asyncio.to_thread(next, self._batches, None)
        if batch is None:
            self._has_more = False
            return
        ids, num_bytes = batch
        self._tokens += len(ids)
        self._bytes += num_bytes
        self._submitted += 1
        self._pooled.submit(SessionPool.submit_read, tokens=ids)

    def _progress(self, losses: np.ndarray) -> ReadProgress:
        self._scored += len(losses)
        self._loss_sum += float(losses.sum(dtype=np.float64))
        recent, num_bytes = float(losses.mean(dtype=np.float64)), self._bytes * self._scored // self._tokens
        return ReadProgress(self._scored, self._loss_sum / self._scored, recent, bytes=num_bytes)
