"""Data parallelism: every process has the whole model and its own part of each batch; gradients are summed.

Under `torchrun` the processes find each other through its environment variables. Without it there is one process, and
nothing is exchanged.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ttt_e2e.hardware import choose_device


class DistributedContext(NamedTuple):
    """This process, number `rank` of `world_size`, and the device that it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_rank0(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def log(self, message: str) -> None:
        """Print a message above the progress bar, on rank 0 only."""
        if self.is_rank0:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of `tensors` by its sum over all processes, in one exchange."""
        if self.world_size > 1:
            buffer = torch.cat([tensor.reshape(-1) for tensor in tensors])
            dist.all_reduce(buffer)
            for tensor, part in zip(tensors, buffer.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def init_distributed(device: str) -> Iterator[DistributedContext]:
    """Connect the processes of `torchrun`, if there are several. device: "auto", "cpu", "cuda" or "cuda:N"."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if world_size == 1:
        yield DistributedContext(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield DistributedContext(dist.get_rank(), world_size, chosen)
    finally:
        dist.destroy_process_group()
