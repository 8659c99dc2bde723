"""Names and layouts of the official JAX implementation, and how they map to ours.

There, linear weights are [in, out] and stacked over layers, and rotary pairs are neighbours (2i, 2i + 1). Here they are
[out, in] with query, key and value (and gate and value) in one matrix, and rotary pairs are (i, i + K/2). The mapping
is linear and one to one, so it serves gradients and optimiser moments as well as weights.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ttt_e2e.config import ModelConfig
from ttt_e2e.errors import UserError

_MODEL = "language_model.model."
_BLOCKS = _MODEL + "h.blocks."
_PRIME = _MODEL + "h.prime_storage."


def state_dict_from_official(arrays: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict from the official flat parameter names and arrays, of any floating dtype.

    arrays: such as "language_model.model.wte.weight" [V, D]; per-layer arrays are stacked on their first axis. A name
    may carry anything in front of "language_model". Raises UserError for a missing, unknown or misshapen array.
    """
    left = {name[name.find("language_model") :]: np.asarray(array) for name, array in arrays.items()}

    def take(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in left:
            raise UserError(f"The official parameters lack {name!r}.")
        array = left.pop(name)
        if array.shape != shape:
            raise UserError(f"{name!r} has shape {array.shape}; the configuration asks for {shape}.")
        return torch.from_numpy(np.ascontiguousarray(array))

    layers, suffix, width, hidden = config.layers, config.suffix_layers, config.width, config.mlp_width
    queries, keys = config.heads * config.head_width, config.kv_head_count * config.head_width

    def norms(source: str, target: str, count: int, first: int) -> dict[str, Tensor]:
        stacked = take(source, (count, width))
        return {f"blocks.{first + i}.{target}.weight": stacked[i] for i in range(count)}

    def mlps(source: str, target: str, count: int, first: int) -> dict[str, Tensor]:
        gate, value = (take(f"{source}.{w}.weight", (count, width, hidden)) for w in ("w1", "w3"))
        out = take(f"{source}.w2.weight", (count, hidden, width))
        result = {}
        for i in range(count):
            result[f"blocks.{first + i}.{target}.w_in"] = torch.cat((gate[i].T, value[i].T)).contiguous()
            result[f"blocks.{first + i}.{target}.w_out"] = out[i].T.contiguous()
        return result

    state = {
        "embedding": take(_MODEL + "wte.weight", (config.vocab_size, width)),
        "final_norm.weight": take(_MODEL + "ln_f.weight", (width,)),
    }
    if not config.tied_head:
        state["head"] = take("language_model.lm_head.weight", (width, config.vocab_size)).T.contiguous()
    mixer = _BLOCKS + "seq_modeling_block."
    wq, wk = (
        take(mixer + "wq.weight", (layers, width, queries)),
        take(mixer + "wk.weight", (layers, width, keys)),
    )
    wv, wo = (
        take(mixer + "wv.weight", (layers, width, keys)),
        take(mixer + "wo.weight", (layers, queries, width)),
    )
    for i in range(layers):
        rows = (_halves(wq[i].T, config.head_width), _halves(wk[i].T, config.head_width), wv[i].T)
        state[f"blocks.{i}.mixer.w_qkv"] = torch.cat(rows)
        state[f"blocks.{i}.mixer.w_out"] = wo[i].T.contiguous()
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            stacked = take(f"{mixer}{name}.weight", (layers, config.head_width))
            for i in range(layers):
                state[f"blocks.{i}.mixer.{name}"] = _halves(stacked[i], config.head_width)
    state |= mlps(_BLOCKS + "feed_forward", "mlp", layers, 0)
    if suffix:
        state |= mlps(_PRIME + "feed_forward_prime", "fast", suffix, layers - suffix)
    for wanted, post in ((config.pre_norm, ""), (config.post_norm, "post_")):
        if wanted:
            state |= norms(f"{_BLOCKS}seq_{post}norm.weight", f"mixer_{post}norm", layers, 0)
            state |= norms(f"{_BLOCKS}ffn_{post}norm.weight", f"mlp_{post}norm", layers, 0)
            if suffix:
                state |= norms(f"{_PRIME}ffn_prime_{post}norm.weight", f"fast_{post}norm", suffix, layers - suffix)
    if left:
        raise UserError(f"Unknown official parameters: {', '.join(sorted(left))}.")
    return state


def _halves(rows: Tensor, head_width: int) -> Tensor:
    """Rows of neighbouring rotary pairs, reordered head by head to the pairs (i, i + K/2)."""
    heads = rows.unflatten(0, (-1, head_width))
    return torch.cat((heads[:, 0::2], heads[:, 1::2]), 1).flatten(0, 1)
