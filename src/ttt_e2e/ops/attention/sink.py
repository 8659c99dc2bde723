"""Attention sinks: what a query sees beside its window, once that has left the first token behind.

A pretrained Transformer puts the weight that it has no use for on the first token of a text (Xiao et al., "Efficient
Streaming Language Models with Attention Sinks", arXiv 2309.17453). A window that slides off this token would take that
away. The first token sees only itself, so its key and value are constants; in their place a sink has a logit for every
query head and a value for every key/value head: one more column of the softmax. Queries that still see the first token
do not see the sink, so their outputs are those of plain attention.

With l the logsumexp of the scores and o the attention over the keys, the sink's weight is p = sigmoid(logit - l), the
output o + p (value - o), and its logsumexp l - log(1 - p).

Shapes: B sequences, T queries, S keys, H query heads, G key/value heads, K head dimension.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Sink(NamedTuple):
    """The sink of one layer."""

    logit_H: Tensor
    value_GK: Tensor


class SeenSink(NamedTuple):
    """A sink, and which queries see it."""

    sink: Sink
    seen_T: Tensor | None  # booleans [T], or [B, 1, T] where that differs from row to row; None: all queries do

    @property
    def scores(self) -> Tensor:
        """The scores of the sink, [H, T] or [B, H, T], or [H, 1]: minus infinity where a query does not see it."""
        return self.if_seen(self.sink.logit_H[:, None], -torch.inf)

    def if_seen(self, x_HT: Tensor, other: float) -> Tensor:
        """x where a query sees the sink, `other` elsewhere."""
        return x_HT if self.seen_T is None else x_HT.where(self.seen_T, other)

    def values(self, num_heads: int) -> Tensor:
        """The value that each query head reads."""
        return self.sink.value_GK.repeat_interleave(num_heads // self.sink.value_GK.shape[0], 0)


def seen_sink(
    sink: Sink | None,
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    window: int | None,
    num_empty_slots: Tensor | None = None,
) -> SeenSink | None:
    """The sink as the queries see it: those whose window has left the first key that holds something.

    A key leaves a cache when it leaves the window. So either that key is the text's first token, or all queries see the
    sink. Arguments as for `inner_loop_attention`. None if no query can see it.
    """
    queries, keys = q_BHTK.shape[2], k_BGSK.shape[2]
    if sink is None or window is None or window >= keys:
        return None
    if num_empty_slots is None and keys - queries >= window:
        return SeenSink(sink, None)
    first_T = torch.arange(keys - queries - window + 1, keys - window + 1, device=q_BHTK.device)
    if num_empty_slots is None:
        return SeenSink(sink, first_T > 0)
    if num_empty_slots.dim() == 1:
        num_empty_slots = num_empty_slots[:, None, None]
    return SeenSink(sink, first_T > num_empty_slots)


def add_sink(o_BHTK: Tensor, lse_BHT: Tensor, seen: SeenSink) -> tuple[Tensor, Tensor, Tensor]:
    """Attention with a sink, from attention over the keys alone and the logsumexp of its scores.

    Returns the output [B, H, T, K], the logsumexp of all scores [B, H, T], and the weight of the sink [B, H, T].
    """
    above_BHT = seen.sink.logit_H.to(lse_BHT.dtype)[:, None] - lse_BHT
    p_BHT = seen.if_seen(above_BHT.sigmoid(), 0.0)
    value_HK = seen.values(o_BHTK.shape[1]).to(lse_BHT.dtype)
    y_BHTK = o_BHTK + p_BHT[..., None] * (value_HK[:, None] - o_BHTK)
    return y_BHTK.to(o_BHTK.dtype), lse_BHT + seen.if_seen(F.softplus(above_BHT), 0.0), p_BHT
