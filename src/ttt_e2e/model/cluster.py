"""What a training costs on many GPUs, by counting: memory of a GPU, communication, the time of a step.

Nothing is run, and nothing of it has been measured on GPUs. Counted is training with PyTorch's `fully_shard` (FSDP2):

- Weights, gradients and AdamW's moments are cut along their first dimension into as many shards as the GPUs of a group;
  with several groups every group has all of them. A group's GPUs are neighbours: it fills nodes before it takes more.
- A prefix block is gathered when it is used, forward and again backward, the next one meanwhile. Everything else
  (embedding, suffix, last norm, head) is used by the whole mini-batch loop: it stays gathered for a micro-batch.
- Gradients are reduced within a group in every micro-batch: those of a prefix block when they are known, all others at
  the end. So a GPU adds up its shard of them; groups sum their shards in the last micro-batch.
- All of it is float32, but frozen weights are bfloat16 if training is.

Assumptions about time:

- Matrix products run at a share of the peak rate, the utilization; all else a GPU computes is in that share.
- The optimizer reads and writes its shard at the full bandwidth of the memory.
- Collectives are rings: of n GPUs each receives (n - 1) / n of the result, at `BANDWIDTH_SHARE` of the stated bandwidth
  of NVLink, or of the network where a group spans nodes; then the ring runs through all adapters of a node. Every step
  of a ring waits for `LATENCIES`.
- A prefix block's communication is hidden behind the prefix's computation, forward and backward, as far as that lasts.
  The communication of everything else is not hidden.
- Every GPU is as fast as every other, none fails, and data and checkpoints take no time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from ttt_e2e.config.schema import RunConfig, TrainConfig
from ttt_e2e.errors import UserError
from ttt_e2e.model.cost import in_bytes, operations, prefix_operations
from ttt_e2e.model.trainable import choose_trainable
from ttt_e2e.model.transformer import parameter_shapes


class GPU(NamedTuple):
    """Stated figures of a GPU in its node: bytes, dense operations a second, bytes a second in one direction."""

    memory: float
    bfloat16: float
    float32: float  # without TF32, as PyTorch multiplies float32 by default
    memory_bandwidth: float
    nvlink: float
    network: float


# Sources: NVIDIA's data sheets "A100 80GB", "H100" and "H200", all SXM; for the B200 the "Blackwell Architecture
# Technical Brief" (HGX B200), its memory from the DGX B200 user guide (1,440 GB for eight). Of rates that are stated
# with sparsity it is half, and of NVLink, which is stated for both directions together, too. Network: a node has an
# adapter for every GPU, of 200 Gb/s in a DGX A100 and of 400 Gb/s in a DGX H100, H200 and B200 (user guides at
# docs.nvidia.com/dgx). Memory is counted in units of 10^9 bytes; drivers report up to 7 % more, which is left for
# CUDA's context, NCCL's buffers and fragmentation.
HARDWARE = {
    "a100": GPU(80e9, 312e12, 19.5e12, 2.039e12, 300e9, 25e9),
    "h100": GPU(80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    "h200": GPU(141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9),
    "b200": GPU(180e9, 2250e12, 80e12, 8e12, 900e9, 50e9),
}
GPUS_PER_NODE = 8

UTILIZATION = 0.4
"""Default share of the peak rate at which matrix products run: an assumption, not a measurement of this project."""
BANDWIDTH_SHARE = 0.8
"""Share of a stated bandwidth that a collective reaches: an assumption."""
# Seconds: of a collective, and of a ring's step over NVLink and over the network. Those of NCCL's own model for rings
# with the protocol "Simple" (github.com/NVIDIA/nccl, src/graph/tuning.cc).
LATENCIES = (8.4e-6, 3.4e-6, 14e-6)


@dataclass(frozen=True)
class Cluster:
    """GPUs of a kind, and how many of them share one copy of the weights.

    Raises UserError if there are no figures of the kind, or if the GPUs are not whole nodes, or not whole groups.
    """

    hardware: str
    gpus: int
    shards: int
    utilization: float = UTILIZATION

    def __post_init__(self) -> None:
        if self.hardware not in HARDWARE:
            raise UserError(f"There are no figures of {self.hardware!r}; choose one of {', '.join(HARDWARE)}.")
        if self.gpus > GPUS_PER_NODE and self.gpus % GPUS_PER_NODE:
            raise UserError(
                f"{self.gpus} GPUs are not whole nodes of {GPUS_PER_NODE}; choose a multiple of {GPUS_PER_NODE}, or at "
                f"most {GPUS_PER_NODE}."
            )
        if self.shards < 1 or self.gpus % self.shards:
            raise UserError(
                f"{self.gpus} GPUs do not split into groups of {self.shards} (data_parallel_shard_degree); choose a "
                f"divisor of {self.gpus}."
            )

    @property
    def gpu(self) -> GPU:
        """One of them."""
        return HARDWARE[self.hardware]

    def rate(self, train: TrainConfig) -> float:
        """Stated operations a second of a GPU in the dtype of training."""
        return self.gpu.bfloat16 if train.dtype == "bfloat16" else self.gpu.float32


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU with the largest shard, at least; what a backward pass needs for a moment comes on top."""

    weights: int
    gradients: int
    moments: int
    gathered: int
    """What is whole: the weights that the loop uses and two prefix blocks; gradients of the loop's weights."""
    activations: int
    states: int
    """Fast weights and caches between mini-batches."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, and what a GPU receives in it."""

    computation: float
    optimizer: float
    communication: float
    """All of it, hidden or not."""
    exposed: float
    """Communication that is not hidden behind computation."""
    received_bytes: float

    @property
    def total(self) -> float:
        """The step."""
        return self.computation + self.optimizer + self.exposed


@dataclass(frozen=True)
class Estimate:
    """A training step on a number of GPUs: `batch` sequences, of which every GPU has as many."""

    gpus: int
    shards: int
    batch: int
    tokens_per_second: float
    memory: Memory
    time: StepTime


def rows_at_a_time(train: TrainConfig, gpus: int) -> int:
    """Sequences that a GPU trains on at a time. Raises UserError if the batch does not split."""
    parts = gpus * train.accumulate
    if train.batch % parts:
        raise UserError(
            f"A batch of {train.batch} sequences does not split over {gpus} GPUs with {train.accumulate} micro-batches "
            f"each; choose train.batch as a multiple of {parts}."
        )
    return train.batch // parts


def estimate(config: RunConfig, cluster: Cluster, activations: int, states: int) -> Estimate:
    """What a step costs on a cluster. activations, states: bytes of the sequences that a GPU trains on at a time.

    Raises UserError if the batch does not split over the GPUs.
    """
    time, batch = step_time(config, cluster), config.train.batch
    held = memory(config, cluster, activations, states)
    return Estimate(cluster.gpus, cluster.shards, batch, batch * config.train.context / time.total, held, time)


def memory(config: RunConfig, cluster: Cluster, activations: int = 0, states: int = 0) -> Memory:
    """Memory of a GPU. activations, states: bytes of the sequences that it trains on at a time."""
    train, n = config.train, cluster.shards
    *prefix, loop = units = _units(config)
    own = sum(unit.trained_in(n) for unit in units)
    gathered = 0
    if n > 1:
        blocks = sorted((unit.bytes_in(1, train) for unit in prefix), reverse=True)
        gathered = loop.bytes_in(1, train) + 4 * loop.trained_in(1) + sum(blocks[:2])
    weights = sum(unit.bytes_in(n, train) for unit in units)
    return Memory(weights, 4 * own, 8 * own, gathered, activations, states)


def step_time(config: RunConfig, cluster: Cluster) -> StepTime:
    """Time of an optimizer step. Raises UserError if the batch does not split over the GPUs."""
    train, gpu, n = config.train, cluster.gpu, cluster.shards
    rows = rows_at_a_time(train, cluster.gpus)
    rate = cluster.utilization * cluster.rate(train)
    of = operations(config.model, train.context, train.train_mode, train.prefix_frozen)
    again = of.training_recomputed - of.training  # a second time where not even all states are kept
    recomputed = again * {"none": 0, "mini-batch": 1, "sqrt": 2}[train.activation_checkpointing]
    computation = rows * train.context * (of.training + recomputed) / rate
    forward = rows * prefix_operations(config.model, train.context) / rate
    recomputed_prefix = forward if train.recompute_prefix and not train.prefix_frozen else 0.0
    computation += recomputed_prefix
    backward = 2 * forward + recomputed_prefix

    *prefix, loop = _units(config)
    gather, reduce, summed = _Traffic(), _Traffic(), _Traffic()
    for unit in prefix:
        gather += _gather(n * unit.bytes_in(n, train), cluster)
        reduce += _reduce(unit.trained_in(n), cluster)
        summed += _sum_over_groups(unit.trained_in(n), cluster)
    gather_again = gather
    if train.prefix_frozen and prefix:  # as the loop's backward pass begins, FSDP gathers the block below it regardless
        gather_again = _gather(n * prefix[-1].bytes_in(n, train), cluster)
    in_loop = _gather(n * loop.bytes_in(n, train), cluster) + _reduce(loop.trained_in(n), cluster)
    loop_summed = _sum_over_groups(loop.trained_in(n), cluster)
    total = train.accumulate * (gather + gather_again + reduce + in_loop) + summed + loop_summed

    def beyond(traffic: _Traffic, seconds: float) -> float:
        return max(0.0, traffic.seconds - seconds)

    exposed = train.accumulate * (beyond(gather, forward) + in_loop.seconds) + loop_summed.seconds
    exposed += (train.accumulate - 1) * beyond(gather_again + reduce, backward)
    exposed += beyond(gather_again + reduce + summed, backward)
    trained = sum(unit.trained_in(n) for unit in (*prefix, loop))
    optimizer = 28 * trained / gpu.memory_bandwidth  # reads 4 numbers, writes 3
    return StepTime(train.accumulate * computation, optimizer, total.seconds, exposed, total.bytes)


def memory_table(of: Memory) -> str:
    """The parts of the memory of a GPU as plain text, a line each."""
    parts = {field.name: getattr(of, field.name) for field in fields(of)} | {"total": of.total}
    return "\n".join(f"{name:<12}{in_bytes(size):>12}" for name, size in parts.items())


def scaling_table(estimates: Sequence[Estimate]) -> str:
    """Estimates as plain text, a line each; the efficiency is the time of the first one's step over the step's."""
    columns = ("shards", "batch", "memory", "compute", "comm", "exposed", "step", "tokens/s", "efficiency")
    lines = [f"{'GPUs':<6}" + "".join(f"{name:>11}" for name in columns)]
    for at in estimates:
        time = at.time
        seconds = (f"{s:.3g} s" for s in (time.computation, time.communication, time.exposed, time.total))
        efficiency = f"{100 * estimates[0].time.total / time.total:.0f} %"
        cells = (str(at.shards), str(at.batch), in_bytes(at.memory.total), *seconds)
        cells += (f"{at.tokens_per_second:,.0f}", efficiency)
        lines.append(f"{at.gpus:<6}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


class _Unit(NamedTuple):
    """Shapes of the parameters that are gathered together."""

    trained: list[tuple[int, ...]]
    frozen: list[tuple[int, ...]]

    def trained_in(self, n: int) -> int:
        """Trained numbers in the largest of n shards."""
        return _largest_shard(self.trained, n)

    def bytes_in(self, n: int, train: TrainConfig) -> int:
        """Bytes of the weights in the largest of n shards."""
        return 4 * self.trained_in(n) + (2 if train.dtype == "bfloat16" else 4) * _largest_shard(self.frozen, n)


def _largest_shard(shapes: list[tuple[int, ...]], n: int) -> int:
    return sum(-(-rows // n) * math.prod(rest) for rows, *rest in shapes)


def _units(config: RunConfig) -> list[_Unit]:
    """Every prefix block, and at the end everything else."""
    model, train = config.model, config.train
    shapes = parameter_shapes(model)
    trained, adapted = choose_trainable(model, train, shapes)
    units = [_Unit([], []) for _ in range(model.prefix_layers + 1)]

    def unit_of(name: str) -> _Unit:
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else model.prefix_layers
        return units[min(layer, model.prefix_layers)]

    for name in trained:
        unit_of(name).trained.append(shapes[name])
    for name in shapes.keys() - trained:
        unit_of(name).frozen.append(shapes[name])
    for name in adapted:
        rows, columns = shapes[name]
        unit_of(name).trained.extend([(train.lora.r, columns), (rows, train.lora.r)])
    return units


class _Traffic(NamedTuple):
    """Seconds of communication, and bytes that a GPU receives."""

    seconds: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "_Traffic") -> "_Traffic":  # type: ignore[override]
        return _Traffic(self.seconds + other.seconds, self.bytes + other.bytes)

    def __rmul__(self, times: int) -> "_Traffic":  # type: ignore[override]
        return _Traffic(times * self.seconds, times * self.bytes)


def _gather(size: float, cluster: Cluster) -> _Traffic:
    """All-gather of `size` bytes in a group; a reduce-scatter takes as long."""
    n = cluster.shards
    return _ring(size, n, min(n, GPUS_PER_NODE), cluster.gpu)


def _reduce(shard: int, cluster: Cluster) -> _Traffic:
    """Reduce-scatter in a group of gradients in float32, of which a GPU keeps `shard`."""
    return _gather(4 * cluster.shards * shard, cluster)


def _sum_over_groups(shard: int, cluster: Cluster) -> _Traffic:
    """All-reduce over the groups of what a GPU keeps."""
    n, groups = cluster.shards, cluster.gpus // cluster.shards
    return 2 * _ring(4 * shard, groups, min(groups, max(1, GPUS_PER_NODE // n)), cluster.gpu)


def _ring(size: float, n: int, per_node: int, gpu: GPU) -> _Traffic:
    """An all-gather of `size` bytes by n GPUs, of which `per_node` are in a node."""
    if n == 1 or size == 0:
        return _Traffic()
    nodes = -(-n // per_node)
    start, nvlink_step, network_step = LATENCIES
    latency = start + (n - nodes) * nvlink_step + (nodes - 1) * network_step
    bandwidth = gpu.nvlink if nodes == 1 else min(gpu.nvlink, per_node * gpu.network)
    received = size * (n - 1) / n
    return _Traffic(latency + received / (BANDWIDTH_SHARE * bandwidth), received)
