"""The sinks of a converted model: what its attention gives to a text's first token, measured on a calibration text.

The value is exact: the first token sees only itself, so it has the same value in every text. The logit of a head is the
logarithm of the mean of exp(score), over the scores that queries past the window give to the first token in the
original model. It has no position, so nothing is extrapolated however long a text gets.

The model is walked block by block, so that memory does not grow with its depth.

Shapes: T tokens, D hidden size, H query heads, G key/value heads, K head dimension.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.data.text import short_chunks, text_chunks
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.model.block import Block
from ttt_e2e.model.mixers.attention import Attention
from ttt_e2e.model.mixers.base import Positions
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.progress import ProgressBar

TEXT = Path(__file__).parent / "calibration.txt"
"""The calibration text that comes with the package: about 12,000 tokens of English and code."""

_TOKENS_PAST_WINDOW = 2048
_NO_SINK = -1e4  # a logit whose exponential is zero beside any other's, and which can be stored and trained

Read = Callable[[str], Tensor]


class SinkLosses(NamedTuple):
    """Mean losses in nats per token on the calibration text, past the window."""

    full_attention: float
    without_sink: float
    with_sink: float


def calibration_ids(tokenizer: Tokenizer, text: Path, window: int) -> np.ndarray:
    """The token that begins texts and the first tokens of `text`, at least as many as `calibrate_sinks` reads of them.

    What comes after these is neither encoded nor looked at. Raises UserError if the text cannot be read.
    """
    parts, missing = [np.array([tokenizer.bos], np.int64)], window + _TOKENS_PAST_WINDOW
    for ids in tokenizer.encode_chunks(short_chunks(text_chunks(text))):
        parts.append(ids)
        missing -= len(ids)
        if missing <= 0:
            break
    return np.concatenate(parts)


@torch.no_grad()
def calibrate_sinks(
    config: ModelConfig,
    read: Read,
    ids_T: np.ndarray,
    max_context: int,
    trained_windows: Sequence[int | None],
    progress: bool = False,
) -> tuple[dict[str, Tensor], SinkLosses | None]:
    """The sinks of all windowed attentions, by the names of their parameters, and what they are worth.

    Args:
        config: of the converted model, with `attention_sink`.
        read: gives every other parameter by its name, in float32.
        ids_T: token ids of the calibration text, the token that begins texts included. The first `sliding_window` +
            2048 are read.
        max_context: how many tokens the original can see. With a window of that length, the queries are those of the
            second half of it, and no losses are measured.
        trained_windows: the window of each layer of the original, None for full attention. A layer that keeps its
            window gets a sink of no weight.
        progress: show a progress bar.

    Raises:
        UserError: if the text is shorter than the window.
    """
    window = config.sliding_window
    length = min(window + _TOKENS_PAST_WINDOW, max_context, len(ids_T) - 1)
    if length < min(window + 1, max_context):
        raise UserError(
            f"The calibration text has {len(ids_T)} tokens, too few for a window of {window}; give a longer one with "
            "--calibration-text, choose a shorter window, or convert with --sink none."
        )
    is_past = length > window
    first_query = window if is_past else length // 2
    ids_1T = torch.from_numpy(ids_T[: length + 1].astype(np.int64))[None]
    with torch.device("meta"):  # parameters are in memory only while they are needed
        model = Transformer(config)
    model.embedding = nn.Parameter(read("embedding"))
    positions = model.positions(0, length, torch.float32)
    full = without = with_sink = model.embed(ids_1T[:, :-1], torch.float32)
    sinks: dict[str, Tensor] = {}
    for i, block in enumerate(ProgressBar(model.blocks, "calibrating sinks", disable=not progress, leave=False)):
        assert isinstance(block, Block)
        _fill(block, f"blocks.{i}.", read)
        mixer = block.mixer
        if isinstance(mixer, Attention) and mixer.sink is not None:
            if is_past:
                mixer.sink_logit.fill_(-torch.inf)
                without = _run(model, block, without, positions)
            mixer.sink_logit.fill_(_NO_SINK)
            if trained_windows[i] != window:
                _set_sink(mixer, block.mixer_norm(full)[0], positions, slice(first_query, trained_windows[i]))
            sinks |= {f"blocks.{i}.mixer.{name}": getattr(mixer, name).clone() for name in ("sink_logit", "sink_value")}
            if is_past:
                with_sink = _run(model, block, with_sink, positions)
            mixer.window = trained_windows[i]
            mixer.sink_logit.fill_(-torch.inf)
            full = _run(model, block, full, positions)
        else:
            full, without, with_sink = (_run(model, block, x, positions) for x in (full, without, with_sink))
        block.to("meta")
    if not is_past:
        return sinks, None
    _fill(model.final_norm, "final_norm.", read)
    if not config.tie_word_embeddings:
        model.head = nn.Parameter(read("head"))
    targets_1T = ids_1T[:, window + 1 :]
    losses = [float(model.losses(x[:, window:], targets_1T)[0].mean()) for x in (full, without, with_sink)]
    return sinks, SinkLosses(*losses)


def _set_sink(mixer: Attention, n_1TD: Tensor, positions: Positions, queries: slice) -> None:
    """Set a mixer's sink from its inputs in the original model, in which these queries see the first token."""
    q_1HTK, keys, _ = mixer.project(n_1TD, positions)
    groups = mixer.num_heads // mixer.num_kv_heads
    first_key_H1K = keys.k_BGSK[0, :, :1].repeat_interleave(groups, 0)
    score_HT = (q_1HTK[0, :, queries] * first_key_H1K).sum(-1) * mixer.config.head_dim**-0.5
    score_HT = mixer.capped(score_HT)
    mixer.sink_logit.copy_(score_HT.logsumexp(-1) - math.log(score_HT.shape[1]))
    mixer.sink_value.copy_(keys.v_BGSK[0, :, 0])


def _run(model: Transformer, block: Block, x_1TD: Tensor, positions: Positions) -> Tensor:
    """The block with its initial fast weights, if it has any."""
    fast = model.fast_kind(*(w[None] for w in block.fast.start())) if hasattr(block, "fast") else None
    return block(x_1TD, positions, fast=fast)[0]


def _fill(module: nn.Module, prefix: str, read: Read) -> None:
    """Give a module on the meta device its parameters; a sink's are zeros."""
    module.to_empty(device="cpu")
    for name, parameter in module.named_parameters():
        if ".sink_" in name:
            parameter.zero_()
        else:
            parameter.copy_(read(prefix + name))
