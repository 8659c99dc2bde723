"""Operations of matrix products, counted: a product and its sum are two."""

from ttt_e2e.config.schema import ModelConfig

# The recomputed loop keeps the graph of this many mini-batches at the end of a sequence: the backward pass begins with
# them, before it holds anything else, so that keeping them raises no peak.
KEPT_GRAPHS = 2


def product_operations(tokens: int, inputs: int, outputs: int) -> int:
    """Operations of a linear layer over some tokens."""
    return 2 * tokens * inputs * outputs


def num_pairs(tokens: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees, over the first `tokens` of a text."""
    window = tokens if window is None else min(window, tokens)
    return window * (window + 1) // 2 + (tokens - window) * window


def projection_operations(config: ModelConfig, tokens: int) -> int:
    """Attention's projections to queries, keys and values, and of its output."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return product_operations(tokens, config.hidden_size, heads * config.head_dim)


def score_operations(config: ModelConfig, pairs: int) -> int:
    """Of so many pairs in every head: the score, and the value's part in the sum."""
    return 2 * product_operations(pairs, config.num_attention_heads, config.head_dim)
