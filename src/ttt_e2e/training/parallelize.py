"""Weights, gradients and moments over several processes: PyTorch's `fully_shard` on a mesh of them.

Every process takes its own part of each batch. The mesh is `data_parallel_replicate_degree` groups of
`data_parallel_shard_degree` processes: within a group each process holds one part of every weight, of its gradient and
of AdamW's moments; the groups hold the same. The model itself is untouched:

- A prefix block's weights are gathered when the block runs, forward and again backward, and let go after it.
- All other weights are gathered once for a whole pass: the mini-batch loop uses the suffix, the last norm and the head
  again and again, its recomputation runs backward passes inside the backward pass, and each of them would otherwise
  gather and reduce. They are let go, and their gradients reduced, when the outer backward pass has ended.
- Fast weights, caches and states belong to sequences, so they are each process's own.

Gathered weights are float32, as they are in one process. FSDP's own mixed precision would round norms, initial fast
weights and inner learning rates as well, and give other results than one process.
"""

import copy
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ttt_e2e.config.schema import TrainConfig
from ttt_e2e.errors import UserError
from ttt_e2e.inner_loop.compiled import compiled_functions
from ttt_e2e.inner_loop.functions import LoopFunctions
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.training.distributed import DistributedContext

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

T = TypeVar("T")


class ParallelModel:
    """A model and how to run it: in one process as it stands, in several with its weights gathered.

    Attributes:
        model: the model; with several processes its parameters are DTensors, except while a function runs.
        dist: this process, and the others.
    """

    def __init__(self, model: Transformer, dist: DistributedContext) -> None:
        self.model, self.dist = model, dist
        self._root: FSDPModule | None = None
        self._template: Transformer | None = None  # on the meta device
        if dist.is_rank0:
            meta = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
            self._template = copy.deepcopy(model, meta)

    def shard(self, config: TrainConfig) -> "ParallelModel":
        """If there are several processes, move the model to the device and keep only this process's part of it.

        All processes must have the same weights. Returns self.
        """
        if self.dist.world_size == 1:
            return self
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        # A block returns its mixer's state as well, slices of what it computed. Nothing is ever written into them.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        shape = mesh_shape(config, self.dist.world_size)
        mesh = init_device_mesh(self.dist.device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))
        mesh = mesh if shape[0] > 1 else mesh["dp_shard"]
        for block in self.model.prefix:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        self._root = fully_shard(_Root(self.model), mesh=mesh, reshard_after_forward=False)
        for module in self._root.modules():  # type: ignore[attr-defined]
            if isinstance(module, FSDPModule):
                # Losses are divided before, as they are for micro-batches.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return self

    def __call__(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """`function(model, *args, **options)`, in which the model's parameters are plain tensors.

        With several processes, all of them must call it, and it may not be called in itself.
        """
        if self._root is None:
            return function(self.model, *args, **options)
        result: T = self._root(function, *args, **options)  # type: ignore[operator]
        if not torch.is_grad_enabled():
            self._root.reshard()  # otherwise the backward pass does it
        return result

    def compiled_functions(self) -> LoopFunctions:
        """The functions of the loop, compiled for this model."""
        return compiled_functions(self.dist.device, sharded=None if self._root is None else self.model)

    def set_requires_all_reduce(self, required: bool) -> None:
        """Whether the next backward pass sums the gradients over the groups, or adds them up in this one.

        Within a group they are reduced after every backward pass: no process keeps more than its part of them.
        """
        if self._root is not None:
            self._root.set_requires_all_reduce(required)

    def gather(self) -> Transformer | None:
        """The whole model as it is now, with ordinary tensors in the CPU's memory: a copy on rank 0, None elsewhere.

        What is never trained need not be copied. All processes must call it.
        """
        weights = {}
        for name, parameter in self.model.named_parameters():
            weight = whole(parameter.detach())
            if self._template is not None:
                weights[name] = weight.to("cpu", copy=parameter.requires_grad)
        if self._template is None:
            return None
        model = copy.deepcopy(self._template)
        model.load_state_dict(weights, assign=True)
        return model


class _Root(nn.Module):
    """Runs any function of the model, so that `fully_shard` has a forward pass to put its hooks around."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        return function(self.model, *args, **options)


def mesh_shape(config: TrainConfig, world_size: int) -> tuple[int, int]:
    """Groups of processes that hold the same, and processes in each. Raises UserError if they are not `world_size`."""
    replicate, shard = config.data_parallel_replicate_degree, config.data_parallel_shard_degree
    if shard == -1 and world_size % replicate == 0:
        shard = world_size // replicate
    if replicate * shard != world_size:
        raise UserError(
            f"A mesh of data_parallel_replicate_degree={replicate} x data_parallel_shard_degree={shard} does not fit "
            f"{world_size} process{'es' if world_size > 1 else ''}; choose factors of {world_size}, "
            "or -1 for as many shards as there is room for."
        )
    return replicate, shard


def whole(tensor: Tensor) -> Tensor:
    """`tensor` itself, or a whole copy of one that several processes hold in parts, which all of them must ask for."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
