"""The processes of a training: how they find each other, speak with one voice, and notice one that is missing.

Under `torchrun` the processes find each other through its environment variables. Without it there is one process, and
nothing is exchanged. Beside the group that carries weights and gradients there is one over gloo, which carries what the
processes tell each other about files, errors and signals.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ttt_e2e.errors import UserError
from ttt_e2e.hardware import choose_device

# How long the processes that are left wait for each other's answers when an exchange has failed.
_ANSWER_SECONDS = 5.0

T = TypeVar("T")


class DistributedContext(NamedTuple):
    """This process, number `rank` of `world_size`, and the device that it computes on."""

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # over gloo, if there are several

    @property
    def is_rank0(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def log(self, message: str) -> None:
        """Print a message above the progress bar, on rank 0 only."""
        if self.is_rank0:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over all processes."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def gather(self, value: T) -> list[T]:
        """The small `value` of every process, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        if self.world_size > 1:
            dist.barrier(self.control)

    @contextmanager
    def one_error(self) -> Iterator[None]:
        """Leave the block together, or end together.

        If the block raises UserError or OSError in some processes, the first of them raises it, and all others raise
        SystemExit. The block must not exchange anything unless all processes fail there alike.
        """
        error: Exception | None = None
        try:
            yield
        except (UserError, OSError) as caught:
            error = caught
        failed = self.gather(error is not None)
        if error is not None and failed.index(True) == self.rank:
            raise error
        if any(failed):
            raise SystemExit(1)

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        """Raise UserError, in one process, unless `facts` by name are the same in all processes."""
        with self.one_error():
            for rank, theirs in enumerate(self.gather(dict(facts))):
                for name, value in facts.items():
                    if self.is_rank0 and theirs[name] != value:
                        raise UserError(
                            f"Rank {rank} has {name} = {theirs[name]}, but rank 0 has {value}; start all processes "
                            "with the same versions, settings and files."
                        )


@contextmanager
def init_distributed(device: str, timeout_seconds: float) -> Iterator[DistributedContext]:
    """Connect the processes of `torchrun`, if there are several.

    If one of them ends or hangs, so that an exchange in the block fails, one of the others raises UserError, which
    names it, and all others raise SystemExit.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
        timeout_seconds: how long a process waits for the others.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if world_size == 1:
        yield DistributedContext(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    here = DistributedContext(rank, world_size, chosen, dist.new_group(backend="gloo", timeout=timeout))
    try:
        yield here
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        dist.destroy_process_group()  # so that those who wait for this process fail, too, and answer
        raise _who_is_missing(store, rank, world_size, timeout, error) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _who_is_missing(
    store: dist.Store, rank: int, world_size: int, timeout: timedelta, error: Exception
) -> UserError | SystemExit:
    """What to raise after a failed exchange: in the first process that is left a sentence that names the others."""
    keys = [f"ttt-e2e/answer/{other}" for other in range(world_size)]
    try:
        store.set(keys[rank], "here")
        with suppress(RuntimeError):
            store.wait(keys, timedelta(seconds=_ANSWER_SECONDS))
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:
        missing = [0]  # which keeps the store, if torchrun does not
    if rank != next((other for other in range(world_size) if other not in missing), rank):
        return SystemExit(1)
    if not missing:
        return UserError(f"An exchange between the processes failed: {error}; continue with --resume.")
    who = f"Rank {missing[0]} does" if len(missing) == 1 else f"Ranks {', '.join(map(str, missing))} do"
    return UserError(
        f"{who} not answer: it was killed, failed, or hangs since {timeout.total_seconds():g} s, which is "
        "train.timeout_seconds; continue with --resume."
    )
