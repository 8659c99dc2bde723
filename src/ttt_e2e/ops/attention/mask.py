"""Which keys a query of causal attention, windowed or full, may see."""

import torch
from torch import Tensor


def causal_window_mask(
    num_queries: int, num_keys: int, window: int | None, like: Tensor, num_empty_slots: Tensor | None = None
) -> Tensor:
    """0 where a query may see a key, minus infinity elsewhere: a mask to be added to attention scores.

    The queries stand at the positions of the last keys. A query sees the last `window` keys up to its own position.

    Args:
        num_queries: T.
        num_keys: S, at least T.
        window: Number of keys that a query sees, its own included; None for all of them.
        like: A tensor that gives the mask's dtype and device.
        num_empty_slots: How many of the first keys hold nothing and are seen by no query: a 0-dim integer tensor for
            all rows, an integer tensor [B] for each row of a batch, or None if there are none.

    Returns:
        [T, S], or [B, 1, T, S] if `num_empty_slots` is [B].
    """
    key_S = torch.arange(num_keys, device=like.device)
    query_T = torch.arange(num_keys - num_queries, num_keys, device=like.device)
    hidden = hidden_keys(query_T, key_S, window if window is None or window < num_keys else None)
    if num_empty_slots is not None:
        hidden = hidden | (key_S < (num_empty_slots[:, None, None, None] if num_empty_slots.dim() else num_empty_slots))
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)


def hidden_keys(query_T: Tensor, key_S: Tensor, window: int | None) -> Tensor:
    """[..., T, S]: whether a key's position is after the query's, or at least `window` before it.

    Both tensors hold positions, [..., T] and [..., S].
    """
    distance_TS = query_T[..., :, None] - key_S[..., None, :]
    return distance_TS < 0 if window is None else (distance_TS < 0) | (distance_TS >= window)
