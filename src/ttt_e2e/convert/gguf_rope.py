"""Rotary positions of GGUF files, as `rope_parameters` of a config.json.

llama.cpp knows linear scaling and YaRN by their settings. Of the scaling of Llama 3.1 a file has only the result: what
every pair's rate is divided by. The settings are found from that.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ttt_e2e.errors import UserError

_PUBLISHED = (8192, 1.0, 4.0)  # of Llama 3.1, 3.2 and 3.3: original context, low and high factor
_CLOSE = 1e-4  # in relation to the numbers in the file, which are float32


def rope_parameters(get: Callable[..., Any], head_dim: int, factors_P: np.ndarray | None, path: Path) -> dict[str, Any]:
    """The rotary settings of the GGUF file `path`.

    get: gives a setting by its name without the architecture, and a default. factors_P: what the rate of each pair,
    from the fastest to the slowest, is divided by; None if nothing is. Raises UserError for what is not supported.
    """
    theta = get("rope.freq_base", 10_000.0)
    # As in llama.cpp, a factor without a type is linear; files of 2023 have it under another name.
    kind = get("rope.scaling.type", "linear")
    factor = get("rope.scaling.factor") or get("rope.scale_linear") or 1.0
    if kind == "none" or (kind == "linear" and factor == 1):
        if factors_P is None or (factors_P == 1).all():
            return {"rope_type": "default", "rope_theta": theta}
        return {"rope_theta": theta, **_llama3(factors_P, theta, head_dim, path)}
    if factors_P is not None:
        raise UserError(f"{path} scales its rotary positions twice, by {kind} and rope_freqs; it cannot be converted.")
    if kind not in ("linear", "yarn"):
        raise UserError(
            f"{path} has rotary positions of the type {kind!r}, which is unsupported in GGUF files; convert the "
            "original checkpoint, with `ttt-e2e convert from-hf`."
        )
    # Converters write the attention factor of a config.json there, but llama.cpp multiplies YaRN's own by it.
    for name in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"):
        if get(name) is not None:
            raise UserError(
                f"{path} has {name} = {get(name)}, which programs read differently; convert the original checkpoint, "
                "with `ttt-e2e convert from-hf`."
            )
    settings = {
        "rope_type": kind,
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": get("rope.scaling.original_context_length"),
        "beta_fast": get("rope.scaling.yarn_beta_fast"),
        "beta_slow": get("rope.scaling.yarn_beta_slow"),
    }
    return {name: value for name, value in settings.items() if value is not None}


def _llama3(factors_P: np.ndarray, theta: float, head_dim: int, path: Path) -> dict[str, Any]:
    """The settings of llama3 scaling that give `factors_P`.

    Of every rate a share is kept, and the rest divided by the largest factor. The share is linear in the turns t that a
    pair makes per token, (t * original - low) / (high - low), and clamped to 0 and 1. So only two of the three numbers
    count, and the low one is 1 in every published model.
    """
    factor = float(str(np.float32(factors_P.max())))
    if len(factors_P) == head_dim // 2 and (factors_P > 0).all():
        turns_P = theta ** (-2 * np.arange(head_dim // 2) / head_dim) / (2 * math.pi)
        kept_P = (1 / factors_P - 1 / factor) / (1 - 1 / factor)
        found = [_PUBLISHED]
        between_P = (kept_P > 1e-3) & (kept_P < 1 - 1e-3)
        if between_P.sum() > 1:
            slope, start = np.polyfit(turns_P[between_P], kept_P[between_P], 1)
            if slope > 0 > start:
                found.append((round(-slope / start), 1.0, float(f"{1 - 1 / start:.6g}")))
        for original, low, high in found:
            share_P = ((turns_P * original - low) / (high - low)).clip(0, 1)
            if np.allclose(1 / (share_P + (1 - share_P) / factor), factors_P, rtol=_CLOSE, atol=0):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "original_max_position_embeddings": original,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                }
    raise UserError(
        f"{path} scales its rotary positions by factors (rope_freqs) that are not Llama 3's; convert the original "
        "checkpoint, with `ttt-e2e convert from-hf`."
    )
