"""What is counted of a training on many GPUs, against processes that shard a model as the trainer does."""

import dataclasses
import gc
import queue
from typing import Any

import pytest
import torch
from helpers import small_config, start_group
from torch.distributed.tensor import DTensor
from torch.multiprocessing import get_context
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ttt_e2e.config.schema import RunConfig, TrainConfig
from ttt_e2e.errors import UserError
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.cluster import (
    BANDWIDTH_SHARE,
    GPUS_PER_NODE,
    HARDWARE,
    LATENCIES,
    Cluster,
    estimate,
    memory,
    memory_table,
    rows_at_a_time,
    scaling_table,
    step_time,
)
from ttt_e2e.model.cost import operations, prefix_operations, training_bytes
from ttt_e2e.model.trainable import set_trainable
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.training.distributed import DistributedContext, init_distributed
from ttt_e2e.training.optimizer import make_optimizer
from ttt_e2e.training.parallelize import ParallelModel

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied head, low rank": {
        "tie_word_embeddings": False,
        "fast_rank": 3,
        "inner_loop.learned_lr": True,
        "num_hidden_layers": 5,
    },
    "standard": {"suffix_layers": 0, "mini_batch_size": None},
}
PARTS: dict[str, dict[str, Any]] = {
    "all": {},
    "several micro-batches": {"accumulate": 2},
    "prefix recomputed": {"recompute_prefix": True},
    "suffix": {"trainable": "suffix"},
    "lora": {"trainable": "lora"},
}
CASES = [(model, "all") for model in MODELS] + [("plain", part) for part in PARTS if part != "all"]


def run_config(model: str, part: str, shards: int = -1) -> RunConfig:
    groups = {} if shards == -1 else {"data_parallel_replicate_degree": 4 // shards}
    train = TrainConfig(**{**groups, "context": 6, "batch": 8, "warmup_steps": 0, "lr_init": 1e-3, **PARTS[part]})
    return RunConfig(small_config(**MODELS[model]), train)


class Exchanges(TorchDispatchMode):
    """Bytes of the whole tensors that are exchanged, by the kind of collective, and all memory that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, StorageWeakRef] = {}
        self.bytes = {"_allgather_base_": 0, "_reduce_scatter_base_": 0, "allreduce_": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._overloadpacket.__name__
        if func.namespace == "c10d" and name in self.bytes:
            self.bytes[name] += max(t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor))
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not isinstance(tensor, DTensor):
                self.made[tensor.untyped_storage()._cdata] = StorageWeakRef(tensor.untyped_storage())
        return result

    def kept_bytes(self) -> int:
        """Of the memory that was made, what is still in use; FSDP makes storages of gathered weights empty."""
        gc.collect()
        left = (torch.UntypedStorage._new_with_weak_ptr(made.cdata) for made in self.made.values())
        return sum(storage.nbytes() for storage in left if storage is not None)


def measure(config: RunConfig, processes: DistributedContext) -> dict[str, int]:
    """Bytes of what this process holds after a step, of what was whole in it, and of what was exchanged.

    "between" is what it holds beside weights before the last micro-batch.
    """
    torch.manual_seed(0)
    model = Transformer(config.model)
    set_trainable(model, config.train)
    parallel = ParallelModel(model, processes).shard(config.train)
    optimizer = make_optimizer(model, config.train)
    found = {"whole": 0, "between": 0}

    def loss(network: Transformer) -> torch.Tensor:
        found["whole"] = sum(p.nbytes for p in network.parameters() if not isinstance(p, DTensor))
        text = torch.zeros(1, config.train.context + 1, dtype=torch.int64)
        train = config.train
        return sequence_loss(
            network, text, prefix_frozen=train.prefix_frozen, recompute_prefix=train.recompute_prefix
        ).loss

    with Exchanges() as exchanges:
        for i in range(config.train.accumulate):
            parallel.set_requires_all_reduce(i == config.train.accumulate - 1)
            found["between"] = exchanges.kept_bytes()
            parallel(loss).backward()
    optimizer.step()
    weights = list(model.parameters())
    moments = [optimizer.state[w][name] for w in weights if w in optimizer.state for name in ("exp_avg", "exp_avg_sq")]
    parts = {"weights": weights, "gradients": [w.grad for w in weights if w.grad is not None], "moments": moments}
    return (
        found | exchanges.bytes | {name: sum(t.to_local().nbytes for t in tensors) for name, tensors in parts.items()}
    )


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str, int], dict[str, int]]:
    """`measure` on rank 0 of four processes: one group of four, and two groups of two."""
    results = get_context("fork").Queue()

    def process() -> None:
        torch.set_num_threads(1)
        with init_distributed("cpu", 60) as processes:
            found = {(*case, n): measure(run_config(*case, n), processes) for case in CASES for n in (2, 4)}
        if processes.is_rank0:
            results.put(found)

    processes = start_group(4, process)
    found: dict = {}
    while not found:
        ended = not any(one.is_alive() for one in processes)
        try:
            found = results.get(timeout=1)
        except queue.Empty:
            if ended:  # before this process looked
                break
    for one in processes:
        one.join()
    assert [one.exitcode for one in processes] == [0] * 4
    return found


@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.parametrize(("model", "part"), CASES)
def test_sizes_are_those_of_sharded_processes(measured: dict, model: str, part: str, shards: int) -> None:
    config, found = run_config(model, part), measured[model, part, shards]
    counted = memory(config, Cluster("h100", 4, shards))
    for name in ("weights", "gradients", "moments"):
        assert getattr(counted, name) == found[name]
    network = Transformer(config.model)
    set_trainable(network, config.train)
    blocks = [sum(p.nbytes for p in block.parameters()) for block in network.prefix]
    in_blocks = {p for block in network.prefix for p in block.parameters()}
    gradients = sum(p.nbytes for p in network.parameters() if p.requires_grad and p not in in_blocks)
    assert counted.gathered == found["whole"] + gradients + sum(sorted(blocks)[-2:])
    assert found["between"] == (counted.gradients if config.train.accumulate > 1 else 0)


@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.parametrize(("model", "part"), CASES)
def test_traffic_is_that_of_sharded_processes(measured: dict, model: str, part: str, shards: int) -> None:
    """Of n processes each receives (n - 1) / n of what is gathered or reduced, and twice that of what is summed."""
    config, found, groups = run_config(model, part), measured[model, part, shards], 4 // shards
    received = (found["_allgather_base_"] + found["_reduce_scatter_base_"]) * (shards - 1) / shards
    received += 2 * found["allreduce_"] * (groups - 1) / groups
    assert step_time(config, Cluster("h100", 4, shards)).received_bytes == pytest.approx(received)


def test_one_gpu_holds_what_one_process_does_and_waits_for_nobody() -> None:
    config, h100 = run_config("plain", "all"), HARDWARE["h100"]
    alone = estimate(config, Cluster("h100", 1, 1), 1000, 100)
    held = alone.memory
    assert held.weights + held.gradients + held.moments == training_bytes(config.model)
    assert (held.gathered, held.total) == (0, training_bytes(config.model) + 1100)
    assert alone.time.exposed == alone.time.communication == alone.time.received_bytes == 0
    tokens = config.train.batch * config.train.context
    needed = operations(config.model, config.train.context).training_recomputed * tokens
    assert alone.time.computation == pytest.approx(needed / (0.4 * h100.float32))
    assert alone.time.optimizer == pytest.approx(7 * held.weights / h100.memory_bandwidth)
    assert alone.time.total == alone.time.computation + alone.time.optimizer
    assert alone.tokens_per_second == pytest.approx(tokens / alone.time.total)


def test_recomputation_and_dtype_change_the_time() -> None:
    def computation(**changes: Any) -> float:
        config = run_config("plain", "all")
        train = dataclasses.replace(config.train, context=30, **changes)
        return step_time(RunConfig(config.model, train), Cluster("h100", 8, 8)).computation

    none, once, twice = (computation(activation_checkpointing=mode) for mode in ("none", "mini-batch", "sqrt"))
    assert none < once and twice - once == pytest.approx(once - none)
    assert computation(accumulate=1) == pytest.approx(once)
    h100 = HARDWARE["h100"]
    prefix = prefix_operations(run_config("plain", "all").model, 30) / (0.4 * h100.float32)
    assert computation(recompute_prefix=True) == pytest.approx(once + prefix)
    assert computation(recompute_prefix=True, trainable="suffix") == computation(trainable="suffix")
    assert computation(dtype="bfloat16") == pytest.approx(once * h100.float32 / h100.bfloat16)


def ring_seconds(size: float, ranks: int, per_node: int) -> float:
    """An all-gather by a ring of H100s, walked step by step: everyone passes on the part that it got last."""
    h100, parts = HARDWARE["h100"], [{i} for i in range(ranks)]
    last, seconds, steps_between_nodes = list(range(ranks)), LATENCIES[0], -(-ranks // per_node) - 1
    crosses = steps_between_nodes > 0
    bandwidth = BANDWIDTH_SHARE * (min(h100.nvlink, per_node * h100.network) if crosses else h100.nvlink)
    for step in range(ranks - 1):
        last = [last[i - 1] for i in range(ranks)]
        for mine, part in zip(parts, last, strict=True):
            mine.add(part)
        seconds += LATENCIES[2] if step < steps_between_nodes else LATENCIES[1]
        seconds += size / ranks / bandwidth
    assert all(len(mine) == ranks for mine in parts)
    return seconds


@pytest.mark.parametrize(("gpus", "shards"), [(2, 2), (8, 8), (8, 2), (64, 64), (64, 8), (64, 4), (32, 16), (16, 1)])
def test_seconds_of_rings(gpus: int, shards: int) -> None:
    """With so little computation hardly anything is hidden: what is exposed is what the rings take."""
    config = run_config("standard", "all")
    train = dataclasses.replace(config.train, batch=gpus, context=1)
    time = step_time(RunConfig(config.model, train), Cluster("h100", gpus, shards))
    groups, expected = gpus // shards, 0.0
    units: dict[str, list[torch.Tensor]] = {}
    for name, parameter in Transformer(config.model).named_parameters():
        units.setdefault(name.split(".")[1] if name.startswith("blocks") else "loop", []).append(parameter)
    for name, weights in units.items():
        padded = sum(4 * shards * -(-len(w) // shards) * w[0].numel() for w in weights)
        if shards > 1:
            expected += (2 if name == "loop" else 3) * ring_seconds(padded, shards, min(shards, GPUS_PER_NODE))
        if groups > 1:
            expected += 2 * ring_seconds(padded / shards, groups, min(groups, max(1, GPUS_PER_NODE // shards)))
    assert time.communication == pytest.approx(expected)
    assert 0.9 * expected < time.exposed <= expected


def test_more_computation_hides_the_prefix_but_not_the_loop() -> None:
    config, cluster = run_config("plain", "all"), Cluster("h100", 64, 64)
    train = dataclasses.replace(config.train, batch=64)
    exposed = [
        step_time(RunConfig(config.model, dataclasses.replace(train, context=context)), cluster).exposed
        for context in (1, 10**9)
    ]
    whole = step_time(RunConfig(config.model, train), cluster).communication
    assert 0 < exposed[1] < exposed[0] < whole


def test_clusters_that_do_not_fit() -> None:
    for arguments, sentence in (
        (("h300", 8, 8), "no figures of 'h300'; choose one of a100, h100, h200, b200"),
        (("h100", 12, 12), "12 GPUs are not whole nodes of 8"),
        (("h100", 16, 3), "16 GPUs do not split into groups of 3"),
        (("h100", 8, 16), "8 GPUs do not split into groups of 16"),
    ):
        with pytest.raises(UserError, match=sentence):
            Cluster(*arguments)
    with pytest.raises(UserError, match=r"A batch of 64 sequences does not split over 3 GPUs with 2 .* multiple of 6"):
        rows_at_a_time(TrainConfig(accumulate=2), 3)


def test_tables() -> None:
    config = run_config("plain", "all")
    estimates = [estimate(config, Cluster("h200", n, n), 2**30, 2**20) for n in (1, 2, 4)]
    lines = scaling_table(estimates).splitlines()
    assert [line.split()[0] for line in lines] == ["GPUs", "1", "2", "4"]
    assert lines[1].endswith("100 %") and not lines[3].endswith("100 %")
    parts = dict(line.split(maxsplit=1) for line in memory_table(estimates[0].memory).splitlines())
    assert list(parts) == ["weights", "gradients", "moments", "gathered", "activations", "states", "total"]
    assert (parts["activations"], parts["states"]) == ("1 GiB", "1 MiB")
