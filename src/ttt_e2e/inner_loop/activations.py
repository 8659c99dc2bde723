"""How much memory the activations of a training step take, counted without computing anything.

A step runs on PyTorch's fake tensors, which have shapes and no memory, for a few mini-batches; a longer sequence
saves the same amount more with every mini-batch.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ttt_e2e.config.schema import ModelConfig, RunConfig, TrainConfig
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.cost import fast_weights
from ttt_e2e.model.counting import KEPT_GRAPHS
from ttt_e2e.model.mixers import MIXER_COSTS
from ttt_e2e.model.trainable import choose_trainable
from ttt_e2e.model.transformer import Transformer


class Activations(NamedTuple):
    """Bytes of what the graph saves, and of states between mini-batches that are kept without a graph."""

    graph: int
    states: int


def activation_bytes(config: RunConfig, context: int) -> Activations:
    """About how many bytes of activations a training step on sequences of `context` tokens holds, eagerly on a CPU.

    Counted is what the graph saves; with activation checkpointing or truncation also the states between mini-batches
    and the graph of the mini-batches that go backward together. Not counted are gradients on their way, and what
    low-rank additions save.
    """
    model, train = config.model, config.train
    b = model.mini_batch_size or context
    count, rows = -(-context // b), max(1, train.batch // train.accumulate)
    steps = min(train.truncated_bptt_steps or count, count)
    mode = train.activation_checkpointing
    everything = dataclasses.replace(train, activation_checkpointing="none", truncated_bptt_steps=None)
    if not model.can_learn or train.train_mode == "pretrain" or (mode == "none" and steps == count):
        return Activations(rows * _saved_by_graph(model, everything, context), 0)
    # With checkpointing a pass forward saves, of the loop, the graphs of its last mini-batches alone.
    recomputed = dataclasses.replace(everything, activation_checkpointing="mini-batch")
    saved = _saved_by_graph(model, recomputed, context)
    if mode == "none":
        graph = _growth(model, everything)[2] - _growth(model, recomputed)[2]
        return Activations(rows * (saved + max(0, steps - KEPT_GRAPHS) * graph), 0)
    states = steps - 1 if mode == "mini-batch" else 2 * math.isqrt(steps - 1)
    return Activations(rows * saved, rows * states * _state_bytes(model, train, context))


def _saved_by_graph(model: ModelConfig, train: TrainConfig, context: int) -> int:
    """What the graph of one sequence saves."""
    b = model.mini_batch_size or context
    if "full" in model.mixers[model.prefix_layers + 1 :] or context <= (_full_window(model, b) + 1) * b:
        return _saved(model, train, context)
    few, saved, more = _growth(model, train)
    return saved + more * (context - few * b) // b


def _growth(model: ModelConfig, train: TrainConfig) -> tuple[int, int, int]:
    """Mini-batches that fill the window, what their graph saves, and what it saves more with every further one."""
    b = model.mini_batch_size or 1
    few = _full_window(model, b)
    short, longer = (_saved(model, train, n * b) for n in (few, few + 1))
    return few, short, longer - short


def _full_window(model: ModelConfig, b: int) -> int:
    """Mini-batches after which the windows are full."""
    return -(-model.sliding_window // b) + 1


def _saved(model: ModelConfig, train: TrainConfig, context: int) -> int:
    """The same of a sequence that is walked as a whole."""
    own: set[int] = set()
    saved: dict[int, torch.UntypedStorage] = {}  # kept, so that no other one gets its address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with FakeTensorMode():
        network = Transformer(model)
        weights = dict(network.named_parameters())
        trained = choose_trainable(model, train, {name: tuple(w.shape) for name, w in weights.items()}).trained
        for name in weights.keys() - trained:
            weights[name].requires_grad_(False)
        own |= {weight.untyped_storage()._cdata for weight in weights.values()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            sequence_loss(
                network,
                torch.zeros(1, context + 1, dtype=torch.int64),
                learn=train.train_mode == "meta",
                activation_checkpointing=train.activation_checkpointing,
                recompute_prefix=train.recompute_prefix,
                truncated_bptt_steps=train.truncated_bptt_steps,
                dtype=getattr(torch, train.dtype),
                prefix_frozen=train.prefix_frozen,
            )
    return sum(storage.nbytes() for storage in saved.values())


def _state_bytes(model: ModelConfig, train: TrainConfig, context: int) -> int:
    """Of a state between two mini-batches: fast weights, and the caches of the mixers in the loop."""
    inside = model.mixers[model.prefix_layers + 1 :]
    cached = sum(MIXER_COSTS[name](model, context).cached for name in inside)
    return 4 * fast_weights(model) + (2 if train.dtype == "bfloat16" else 4) * cached
