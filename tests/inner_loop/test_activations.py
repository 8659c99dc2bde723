"""Activations are counted as a real step saves them."""

from typing import Any

import pytest
import torch
from helpers import small_config

from ttt_e2e.config.schema import RunConfig, TrainConfig
from ttt_e2e.inner_loop.activations import activation_bytes
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.trainable import choose_trainable
from ttt_e2e.model.transformer import Transformer

WIDE: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, sliding_window=16, mini_batch_size=8)


def saved_by_a_step(config: RunConfig, context: int) -> int:
    """Bytes of the tensors that the graph of a real step on one sequence saves, weights left out."""
    model, saved = Transformer(config.model), {}
    weights = dict(model.named_parameters())
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    for name in weights.keys() - choose_trainable(config.model, config.train, shapes).trained:
        weights[name].requires_grad_(False)
    own = {w.untyped_storage().data_ptr() for w in weights.values()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        text = torch.zeros(1, context + 1, dtype=torch.int64)
        train = config.train
        options: dict[str, Any] = {"dtype": getattr(torch, train.dtype), "prefix_frozen": train.prefix_frozen}
        sequence_loss(model, text, **options, recompute_prefix=train.recompute_prefix)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trainable", ["all", "suffix"])
@pytest.mark.parametrize("pattern", [("window",), ("mamba2", "full", "window", "window")])
def test_a_long_sequence_saves_what_is_counted(pattern: tuple[str, ...], trainable: Any, dtype: Any) -> None:
    train = TrainConfig(activation_checkpointing="none", batch=1, trainable=trainable, dtype=dtype)
    config = RunConfig(small_config(**WIDE, pattern=pattern), train)
    for context in (24, 96):
        assert sum(activation_bytes(config, context)) == pytest.approx(saved_by_a_step(config, context), rel=0.1)


def test_recomputed_prefix_saves_the_inputs_of_its_blocks() -> None:
    model = small_config(**WIDE)
    stored, recomputed, frozen = (
        RunConfig(model, TrainConfig(activation_checkpointing="none", batch=1, **part))
        for part in ({}, {"recompute_prefix": True}, {"trainable": "suffix"})
    )
    real = saved_by_a_step(recomputed, 24)
    assert sum(activation_bytes(recomputed, 24)) == pytest.approx(real, rel=0.1)
    inputs = 3 * 4 * 24 * model.hidden_size  # of two prefix blocks and of the first suffix block's mixer
    below = real - saved_by_a_step(frozen, 24)
    assert inputs <= below < 2 * inputs < (saved_by_a_step(stored, 24) - real) / 2


def test_rows_of_a_process_are_counted_and_checkpointing_saves() -> None:
    def count(**changes: Any) -> int:
        train = TrainConfig(**{"batch": 1, "activation_checkpointing": "none", **changes})
        return sum(activation_bytes(RunConfig(small_config(**WIDE), train), 512))

    everything, states, few_states = (count(activation_checkpointing=m) for m in ("none", "mini-batch", "sqrt"))
    assert everything > 2 * states > 2 * few_states
    assert count(batch=12, accumulate=4) == 3 * everything
    assert count(truncated_bptt_steps=4) < count(truncated_bptt_steps=8) < everything / 2
    assert count(train_mode="pretrain") < everything / 2
