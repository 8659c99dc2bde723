"""Which keys a query of causal attention may see; what its forward pass leaves to the backward passes."""

from typing import NamedTuple

import torch
from torch import Tensor


class KeyView(NamedTuple):
    """What the queries of one call see of the S keys, and which keys are variables of the inner loss."""

    window: int  # number of keys that a query sees, its own included, at most S
    num_empty_slots: Tensor | None = None  # how many of the first keys hold nothing, a 0-dim integer tensor
    num_new_keys: int = 0  # N: the last N keys are variables, those before are constants


class Attended(NamedTuple):
    """What went into a forward pass, and what came out."""

    q: Tensor  # [B, H, T, K]
    k: Tensor  # [B, G, S, K]
    v: Tensor
    o: Tensor  # [B, H, T, K]
    lse: Tensor  # the logsumexp of the scores, [B, H, T]


Tangents = tuple[Tensor, Tensor, Tensor]
"""a, b, c: the gradients of dq, dk and dv."""


def causal_window_mask(
    num_queries: int, num_keys: int, window: int | None, like: Tensor, num_empty_slots: Tensor | None = None
) -> Tensor:
    """A mask to add to attention scores: 0 where a query may see a key, minus infinity elsewhere.

    The queries are at the positions of the last keys. Each sees the last `window` keys up to its own position.

    Args:
        num_queries: T.
        num_keys: S, at least T.
        window: Number of keys that a query sees, its own included; None for all of them.
        like: A tensor that gives the mask's dtype and device.
        num_empty_slots: How many of the first keys hold nothing: 0-dim, or [B] for each row; None if there are none.

    Returns:
        [T, S], or [B, 1, T, S] if `num_empty_slots` is [B].
    """
    key_S = torch.arange(num_keys, device=like.device)
    if num_empty_slots is not None and num_empty_slots.dim() == 1:
        num_empty_slots = num_empty_slots[:, None, None]
    limit = window if window is None or window < num_keys else None
    hidden = hidden_keys(key_S[num_keys - num_queries :], key_S, limit, num_empty_slots)
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)


def hidden_keys(query_T: Tensor, key_S: Tensor, window: int | None, first_key: int | Tensor | None = None) -> Tensor:
    """Whether a query may not see a key: one at a later position, `window` or more before it, or before `first_key`.

    From positions [..., T] and [..., S] (`first_key` broadcasts to these) to booleans [..., T, S].
    """
    distance_TS = query_T[..., :, None] - key_S[..., None, :]
    hidden_TS = distance_TS < 0
    if window is not None:
        hidden_TS = hidden_TS | (distance_TS >= window)
    if first_key is not None:
        hidden_TS = hidden_TS | (key_S < first_key)[..., None, :]
    return hidden_TS
