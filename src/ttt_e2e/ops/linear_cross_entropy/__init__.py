"""Cross-entropy from hidden states and the head's matrix, differentiable twice, without holding all logits.

`linear_cross_entropy` is the function to call. `cross_entropy_forward` and `cross_entropy_backward` are for callers
that write out their own gradient, as the inner loop does. `reference.py` holds the formulas; `tiled.py` walks over
chunks of tokens and vocabulary, `triton.py` fuses that walk's work between the matrix products, and `capped.py` is the
walk for logits with a cap. None of them keeps logits from forward to backward: only one logsumexp per token.

Shapes: N tokens, D hidden size, V vocabulary.
"""

from ttt_e2e.ops.linear_cross_entropy.operators import (
    cross_entropy_backward,
    cross_entropy_double_backward,
    cross_entropy_forward,
    linear_cross_entropy,
)

__all__ = ["cross_entropy_backward", "cross_entropy_double_backward", "cross_entropy_forward", "linear_cross_entropy"]
