"""The sinks of a converted model: what its attention gives to a text's first token, measured on a calibration text.

The value is exact: the first token sees only itself, so it has the same value in every text. The logit of a head is the
logarithm of the mean of exp(score) that its queries past the window give to the first token, in the original model. It
has no position, so nothing is extrapolated however long a text gets.

The model is walked block by block, so that memory does not grow with it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.errors import UserError
from ttt_e2e.model.mixers.attention import Attention
from ttt_e2e.model.transformer import Block, Transformer

TEXT = Path(__file__).parent / "calibration.txt"
_TOKENS_PAST_WINDOW = 2048


class PastTheWindow(NamedTuple):
    """Mean losses in nats per token on the calibration text, past the window."""

    full_attention: float
    without_sink: float
    with_sink: float


@torch.no_grad()
def calibrate_sinks(
    config: ModelConfig,
    read: Callable[[str], Tensor],
    tokens_T: np.ndarray,
    progress: bool = False,
) -> tuple[dict[str, Tensor], PastTheWindow]:
    """The sinks of all windowed attentions, by the names of their parameters, and what they are worth.

    Args:
        config: of the converted model, with `attention_sink`.
        read: gives every other parameter by its name, float32.
        tokens_T: ids of the calibration text, its first token included; the first `sliding_window` + 2049 are used.
        progress: show a progress bar.

    Raises:
        UserError: the text is not longer than the window.
    """
    window = config.sliding_window
    if len(tokens_T) < window + 2:
        raise UserError(
            f"The calibration text has {len(tokens_T)} tokens, not more than the window of {window}; give a longer one "
            "with --calibration-text, choose a shorter window, or convert with --sink none."
        )
    ids_1T = torch.from_numpy(np.asarray(tokens_T[: window + _TOKENS_PAST_WINDOW + 1], np.int64))[None]
    with torch.device("meta"):  # parameters are there only as long as they are needed
        model = Transformer(config)
    model.embedding = nn.Parameter(read("embedding"))
    positions = model.positions(0, ids_1T.shape[1] - 1, torch.float32)
    full = bare = sunk = model.lookup(ids_1T[:, :-1], model.embedding)
    sinks: dict[str, Tensor] = {}
    for i, block in enumerate(tqdm(model.blocks, "calibrating sinks", disable=not progress, leave=False)):
        _fill(block, f"blocks.{i}.", read)
        mixer, fast = block.mixer, None
        if i >= config.prefix_layers:
            fast = model.fast_kind(*(w[None] for w in block.fast.start()))

        def step(x_1TD: Tensor, block: Block = block, fast: tuple[Tensor, ...] | None = fast) -> Tensor:
            return block(x_1TD, positions, fast=fast)[0]

        if isinstance(mixer, Attention) and mixer.sink is not None:
            mixer.sink_logit.fill_(-torch.inf)
            bare = step(bare)
            q_1HTK, keys, _ = mixer.project(block.mixer_norm(full)[0], positions)
            score_HT = (q_1HTK[0, :, window:] @ keys.k_BGSK[0, :, 0].repeat_interleave(mixer.num_heads // mixer.num_kv_heads, 0)[..., None])[..., 0] * config.head_dim**-0.5
            mixer.sink_logit.copy_(score_HT.logsumexp(-1) - np.log(score_HT.shape[-1]))
            mixer.sink_value.copy_(keys.v_BGSK[0, :, 0])
            sinks |= {f"blocks.{i}.mixer.{name}": getattr(mixer, name).clone() for name in ("sink_logit", "sink_value")}
            sunk = step(sunk)
            mixer.window = None
            full = step(full)
        else:
            full, bare, sunk = step(full), step(bare), step(sunk)
        block.to("meta")
    _fill(model.final_norm, "final_norm.", read)
    if not config.tie_word_embeddings:
        model.head = nn.Parameter(read("head"))
    past = [float(model.losses(x[:, window:], ids_1T[:, window + 1 :])[0].mean()) for x in (full, bare, sunk)]
    return sinks, PastTheWindow(*past)


def _fill(module: nn.Module, prefix: str, read: Callable[[str], Tensor]) -> None:
    """Give a module on the meta device its parameters; those of a sink are zeros."""
    module.to_empty(device="cpu")
    for name, parameter in module.named_parameters():
        parameter.copy_(torch.zeros_like(parameter) if "sink_" in name else read(prefix + name))
