"""The angular rates of rotary positions, as pretrained and as scaled for a longer context.

Four kinds of scaling were published: "linear" (Chen et al. 2023, arXiv 2306.15595), "yarn" (Peng et al. 2023, arXiv
2309.00071), "longrope" (Ding et al. 2024, arXiv 2402.13753), and "llama3", which came with the code of Llama 3.1.

Shapes: P = K/2 rotary pairs of a head.
"""

import math

import torch
from torch import Tensor

from ttt_e2e.config.schema import ModelConfig


def frequencies(config: ModelConfig, device: torch.device | str, local: bool = False) -> Tensor:
    """The angle in radians by which each pair turns from one token to the next, [P] in float64.

    local: of the blocks that `rope_local_pattern` names, where nothing is scaled.
    """
    pairs, theta = config.head_dim // 2, config.rope_local_base_freq if local else config.rope_theta
    rate_P = theta ** (-torch.arange(pairs, device=device, dtype=torch.float64) / pairs)
    scaling = config.rope_scaling
    if local or scaling.rope_type == "default":
        return rate_P
    if scaling.rope_type == "longrope":
        factor_P = torch.tensor(scaling.pair_factors, device=device, dtype=torch.float64)
        return torch.where(factor_P > 0, rate_P / factor_P, 0.0)
    stretched_P = rate_P / scaling.factor
    if scaling.rope_type == "linear":
        return stretched_P
    kept_P = _kept(config, rate_P)
    return kept_P * rate_P + (1 - kept_P) * stretched_P


def _kept(config: ModelConfig, rate_P: Tensor) -> Tensor:
    """The share of every pair's rate that is kept: 0 for a scaled rate, 1 for the original one."""
    scaling = config.rope_scaling
    slow, fast = scaling.low_freq_factor, scaling.high_freq_factor
    assert scaling.original_max_position_embeddings is not None
    # Radians per token of a pair that turns once in the original context.
    turn = 2 * math.pi / scaling.original_max_position_embeddings
    if scaling.rope_type == "llama3":
        return ((rate_P / turn - slow) / (fast - slow)).clamp(0, 1)
    # YaRN goes from one to the other along the pairs, between those that turn `fast` and `slow` times.
    pairs = len(rate_P)
    first, last = (-pairs * math.log(turns * turn) / math.log(config.rope_theta) for turns in (fast, slow))
    first, last = max(math.floor(first), 0), min(math.ceil(last), 2 * pairs - 1)
    index_P = torch.arange(pairs, device=rate_P.device, dtype=torch.float64)
    return 1 - ((index_P - first) / (last - first or 0.001)).clamp(0, 1)
