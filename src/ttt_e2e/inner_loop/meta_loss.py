"""The loss that meta-training minimises: of a whole sequence, through all of its inner updates.

Shapes: B sequences, T tokens, N mini-batches of b tokens, D hidden size.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ttt_e2e.config.schema import ActivationCheckpointing
from ttt_e2e.inner_loop.functions import EAGER, LoopFunctions
from ttt_e2e.inner_loop.recompute import RecomputedLoop, SequenceLoop, TruncatedLoop, loop_parameters
from ttt_e2e.inner_loop.step import MiniBatch, initial_state, masked_mean
from ttt_e2e.model.counting import KEPT_GRAPHS
from ttt_e2e.model.mixers.base import CacheView, Positions
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.ops.attention import causal_window_mask
from ttt_e2e.ops.elementwise import accumulation_dtype


class LossOutput(NamedTuple):
    """The loss of some sequences."""

    loss: Tensor  # the mean over sequences, a scalar
    nll_BT: Tensor  # every token's loss in nats, float32, without a graph
    mask_BT: Tensor  # 1 where the token counts, else 0


def sequence_loss(
    model: Transformer,
    tokens_BT1: Tensor,
    *,
    bos: int | None = None,
    learn: bool = True,
    inner_lr: float | None = None,
    activation_checkpointing: ActivationCheckpointing = "none",
    recompute_prefix: bool = False,
    truncated_bptt_steps: int | None = None,
    dtype: torch.dtype = torch.float32,
    functions: LoopFunctions = EAGER,
    prefix_frozen: bool = False,
    prefix_BTD: Tensor | None = None,
) -> LossOutput:
    """The training loss of sequences that each start a text, differentiable through the inner updates.

    It is the mean over sequences of their `mini_batch_mean`. It works for a standard model too, where nothing is
    updated, and under `torch.no_grad`, where the model learns all the same and no graph is kept.

    Args:
        model: any model.
        tokens_BT1: token ids [B, T + 1], int64: T inputs, and the targets one token later.
        bos: targets equal to this id do not count.
        learn: whether the fast weights are updated.
        inner_lr: inner learning rate; None for the model's own.
        activation_checkpointing: what is stored of the loop for the outer gradient; see `TrainConfig`.
        recompute_prefix: of what runs before the loop, only every block's input is stored.
        truncated_bptt_steps: through how many mini-batches the outer gradient goes; None: all. See `TrainConfig`.
        dtype: of the matrix products.
        functions: `EAGER`, or compiled ones.
        prefix_frozen: nothing that runs before the loop is trained: no graph of it is kept.
        prefix_BTD: what `LoopFunctions.forward_prefix` returns for these tokens, if it is known already.

    Raises ValueError if there is no sequence, or no target in them.
    """
    config = model.config
    if tokens_BT1.dim() != 2 or len(tokens_BT1) < 1 or tokens_BT1.shape[1] < 2:
        raise ValueError(f"tokens must be [B, T + 1] with B and T at least 1, not {list(tokens_BT1.shape)}")
    inputs_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
    batch, length = inputs_BT.shape
    b = config.mini_batch_size or length
    mask_BT = torch.ones_like(targets_BT, dtype=accumulation_dtype(dtype))
    if bos is not None:
        mask_BT = (targets_BT != bos).to(mask_BT.dtype)
    positions = model.positions(0, length, dtype)
    if functions.static_cache:
        torch.compiler.cudagraph_mark_step_begin()
    x_BTD = prefix_BTD
    if x_BTD is None:
        with torch.no_grad() if prefix_frozen else nullcontext():
            x_BTD = functions.forward_prefix(model, inputs_BT, positions, dtype, recompute_prefix)
    if not model.suffix:
        nll_BT = functions.losses(model, x_BTD, targets_BT)
    elif not learn:
        fast = model.initial_fast_weights(batch)
        x_BTD, _, _ = model.forward_suffix(x_BTD, positions, fast, None, second_order=False)
        nll_BT = functions.losses(model, x_BTD, targets_BT)
    else:
        num_slots = 0
        if functions.static_cache:  # a window, or all tokens but those of a mini-batch
            num_slots = config.loop_window or max(0, -(-length // b) - 1) * b
        batches = split_mini_batches(model, x_BTD, targets_BT, mask_BT, positions, num_slots)
        start = initial_state(model, batch, dtype, num_slots)
        lr = config.inner_loop.lr if inner_lr is None else inner_lr
        loop = SequenceLoop(
            model=model,
            start=start,
            batches=batches,
            lr=torch.tensor(lr, dtype=mask_BT.dtype, device=x_BTD.device),
            keep_all=activation_checkpointing == "mini-batch",
            parameters=loop_parameters(model),
            functions=functions,
        )
        tensors = (*(batch.x_BbD for batch in batches), *start.tensors(), *loop.parameters)
        if torch.is_grad_enabled() and truncated_bptt_steps is not None and truncated_bptt_steps < len(batches):
            num_graphs = truncated_bptt_steps if activation_checkpointing == "none" else KEPT_GRAPHS
            options = (truncated_bptt_steps, num_graphs, lambda nll_BT: mini_batch_mean(nll_BT, mask_BT, b).mean())
            loss, nll_BT = TruncatedLoop.apply(loop, *options, *tensors)
            return LossOutput(loss, nll_BT, mask_BT)
        if activation_checkpointing == "none" or not torch.is_grad_enabled():
            nll_BT = torch.cat(loop.walk(start, 0, len(batches))[1], 1)
        else:
            nll_BT = RecomputedLoop.apply(loop, *tensors)
    return LossOutput(mini_batch_mean(nll_BT, mask_BT, b).mean(), nll_BT.detach(), mask_BT)


def mini_batch_mean(nll_BT: Tensor, mask_BT: Tensor, b: int) -> Tensor:
    """Mean over mini-batches of b tokens of their masked means, [B]; a shorter last one weighs by its length."""
    means_BN = torch.stack([masked_mean(n, m) for n, m in zip(nll_BT.split(b, 1), mask_BT.split(b, 1), strict=True)], 1)
    lengths_N = torch.tensor([n.shape[1] for n in nll_BT.split(b, 1)], dtype=means_BN.dtype, device=nll_BT.device)
    return means_BN @ (lengths_N / lengths_N.sum())


def split_mini_batches(
    model: Transformer, x_BTD: Tensor, targets_BT: Tensor, mask_BT: Tensor, positions: Positions, num_slots: int = 0
) -> list[MiniBatch]:
    """A whole sequence cut into mini-batches, the last perhaps shorter; see `static_cache_view` for `num_slots`."""
    b, length = model.config.mini_batch_size, x_BTD.shape[1]
    assert b is not None
    starts = range(0, length, b)
    views = [CacheView()] * len(starts)
    if num_slots:
        # Mini-batches with equally many empty slots before them share a mask: all those with a full window do.
        shared: dict[tuple[int, int], CacheView] = {}
        for n, start in enumerate(starts):
            key = (min(start, num_slots), min(b, length - start))
            if key not in shared:
                shared[key] = static_cache_view(key[0], key[1], num_slots, model.config.loop_window, positions.cos)
            views[n] = shared[key]
    parts = (x_BTD.split(b, 1), targets_BT.split(b, 1), mask_BT.split(b, 1))
    cut = [positions.slice(start, start + b) for start in starts]
    return [MiniBatch(*part) for part in zip(*parts, cut, views, strict=True)]


def static_cache_view(seq_len: int, length: int, num_slots: int, window: int | None, like: Tensor) -> CacheView:
    """The view of caches that have `num_slots` slots from the start, after `seq_len` tokens and for `length` more.

    `like` gives the mask's dtype and device, such as the cosines of the positions.
    """
    seq_lens = torch.tensor(seq_len, dtype=torch.int32, device=like.device)
    attn_mask_TS = None
    if like.device.type == "cpu":  # a GPU's operators need no mask, and it would be large there
        num_empty_slots = (num_slots - seq_lens).clamp(min=0)
        attn_mask_TS = causal_window_mask(length, num_slots + length, window, like, num_empty_slots)
    return CacheView(seq_lens, attn_mask_TS, max_slots=num_slots)
