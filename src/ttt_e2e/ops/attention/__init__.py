"""Causal attention over a whole text or a sliding window, and its derivatives."""

from ttt_e2e.ops.attention.inner_loop import inner_loop_attention
from ttt_e2e.ops.attention.mask import causal_window_mask
from ttt_e2e.ops.attention.operators import windowed_attention
from ttt_e2e.ops.attention.scaled_dot_product import sdpa

__all__ = ["causal_window_mask", "inner_loop_attention", "sdpa", "windowed_attention"]
