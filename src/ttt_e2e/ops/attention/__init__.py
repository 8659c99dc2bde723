"""Causal attention over a whole text or a sliding window of it.

- `inner_loop_attention` returns its vjp as well, and both are differentiable: for everything the inner loop learns
  through.
- `sdpa` goes through PyTorch's fused kernel and is differentiable once: for everything else.
- `windowed_attention` is differentiable twice by autograd, in memory linear in the number of tokens: the operator for
  use outside of this package.

`reference.py` holds the formulas, as plain PyTorch; `tiled.py` and `triton.py` compute the same tile by tile, and
`operators.py` chooses between them. A cap on scores is in `inner_loop_attention` and `sdpa` alone, which then compute
the definition. Which keys a query may see is said in `mask.py`; `sink.py` has what it sees in place of the first key
when that has left its window.

Shapes: B sequences, T queries, S keys (the queries are at the positions of the last T), H query heads, G key/value
heads, K head dimension, N new keys: the last N, the variables of the inner loss. The keys before them are cached, and
constants to it.
"""

from ttt_e2e.ops.attention.inner_loop import inner_loop_attention
from ttt_e2e.ops.attention.mask import causal_window_mask
from ttt_e2e.ops.attention.operators import windowed_attention
from ttt_e2e.ops.attention.scaled_dot_product import sdpa
from ttt_e2e.ops.attention.sink import Sink

__all__ = ["Sink", "causal_window_mask", "inner_loop_attention", "sdpa", "windowed_attention"]
