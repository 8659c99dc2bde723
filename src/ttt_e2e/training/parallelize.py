"""Data parallelism: every process has the whole model and its own part of the batch; gradients are averaged.

Under `torchrun` the processes find each other by themselves; alone, everything here does nothing.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ttt_e2e.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process (`rank`) among `world`, and the device that it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_rank0(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of `tensors` by its sum over all processes, in one exchange."""
        if self.world == 1:
            return
        buffer = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(buffer)
        for tensor, part in zip(tensors, buffer.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Return when every process is here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """This process and its peers; `device` is "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".

    Raises UserError for a device that is not there.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device, local)
    if world == 1:
        yield Processes(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), world, chosen)
    finally:
        dist.destroy_process_group()


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device called `device`, "auto" being a GPU if there is one. Raises UserError if it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"There is no device {device!r}; choose auto, cpu or cuda.") from error
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank if chosen.index is None else chosen.index)
        if not torch.cuda.is_available() or chosen.index >= torch.cuda.device_count():
            raise UserError(f"There is no device {device!r} here: {torch.cuda.device_count()} GPUs; choose cpu.")
    elif chosen.type != "cpu":
        raise UserError(f"Devices such as {device!r} are not supported; choose auto, cpu or cuda.")
    return chosen
