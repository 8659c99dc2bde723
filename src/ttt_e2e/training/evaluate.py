"""Evaluation during training: the loss on validation documents, with and without learning while reading."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ttt_e2e.config.schema import TrainConfig
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.training.parallelize import ParallelModel

QUARTERS = 4


def evaluate_sequences(
    parallel: ParallelModel, sequences: Sequence[np.ndarray], bos: int, config: TrainConfig
) -> dict[str, Any]:
    """The mean loss, in nats per token, of `sequences`: int64 arrays of at most `config.context` + 1 ids.

    The processes share them; targets equal to `bos` do not count. Returns "loss" and the number of "tokens", with a
    suffix also "loss_without_learning", the "gain" from learning, and "gain_by_quarter" of the context, None where no
    sequence is long enough.
    """
    model, dist = parallel.model, parallel.dist
    modes = [True, False] if model.suffix else [True]
    # Sums of losses by mode (learning or not) and quarter, and the number of tokens by quarter.
    sums = torch.zeros(len(modes), QUARTERS, dtype=torch.float64)
    counts = torch.zeros(QUARTERS, dtype=torch.float64)
    by_length = sorted(map(torch.from_numpy, sequences[dist.rank :: dist.world_size]), key=len, reverse=True)
    size, dtype = config.batch // config.accumulate // dist.world_size, getattr(torch, config.dtype)
    at_most = -(-len(sequences) // dist.world_size)
    for start in range(0, at_most, size):
        # Who has run out of sequences goes on with one that does not count: weights are gathered from all processes.
        batch = by_length[start : start + size] or [torch.full((2,), bos)]
        tokens_BT1 = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=bos).to(dist.device)
        quarter_T = torch.arange(tokens_BT1.shape[1] - 1) * QUARTERS // config.context
        for row, learn in enumerate(modes):
            with torch.no_grad():
                result = parallel(sequence_loss, tokens_BT1, bos=bos, learn=learn, dtype=dtype)
            mask_BT = result.mask_BT.cpu().double()
            sums[row].index_add_(0, quarter_T, (result.nll_BT.cpu().double() * mask_BT).sum(0))
        counts.index_add_(0, quarter_T, mask_BT.sum(0))
    sums, counts = sums.to(dist.device), counts.to(dist.device)
    dist.all_reduce(sums)
    dist.all_reduce(counts)
    means = [float(total / counts.sum()) for total in sums.sum(1)]
    measured: dict[str, Any] = {"loss": means[0], "tokens": int(counts.sum())}
    if model.suffix:
        gains = ((sums[1] - sums[0]) / counts).tolist()
        by_quarter = [gain if count > 0 else None for gain, count in zip(gains, counts.tolist(), strict=True)]
        measured |= {"loss_without_learning": means[1], "gain": means[1] - means[0], "gain_by_quarter": by_quarter}
    return measured
