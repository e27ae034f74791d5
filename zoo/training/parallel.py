"""Several processes: their agreements, and sharding by FSDP2. With one process everything here is a no-op.

DDP is accelerate's. For FSDP2, accelerate takes GPUs only and exchanges the optimizer's parameters after the fact, so
`fully_shard` is called directly, before the optimizer is made: one way for CPU and GPU. Parameters stay in float32 and
autocast chooses the precision, as under DDP. What is saved is gathered first: checkpoints know nothing of shards.
"""

from __future__ import annotations

import datetime
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from zoo.errors import ConfigError

__all__ = ["TIMEOUT", "Peers", "gather", "is_broken_connection", "shard", "shard_optimizer_state", "whole"]

TIMEOUT = datetime.timedelta(minutes=10)  # for a process that hangs; one that ends is noticed at once
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

T = TypeVar("T")


class Peers:
    """What the processes of a run tell each other, over gloo: none of it waits for the accelerator."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT) if processes > 1 else None
        self.pending: tuple[Tensor, Any] | None = None

    def gather(self, value: T) -> list[T]:
        """`value` of each process, in order of rank."""
        values = [value] * self.processes
        if self.group is not None:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def wait(self) -> None:
        if self.group is not None:
            dist.barrier(group=self.group)

    def any(self, asked: bool) -> bool:
        return any(self.gather(asked))

    def any_lately(self, asked: bool) -> bool:
        """Whether any process asked at the call before this one; the answer has had a whole update to arrive."""
        if self.group is None:
            return asked
        before, vote = self.pending, torch.tensor(int(asked))
        self.pending = vote, dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.group, async_op=True)
        if before is None:
            return False
        before[1].wait()
        return bool(before[0])

    def copy_from_first(self, tensors: list[Tensor]) -> None:
        """Overwrite `tensors`, on the accelerator, with those of the first process."""
        if self.group is not None:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)


def is_broken_connection(error: BaseException) -> bool:
    """Whether `error` says that another process cannot be reached. gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


def shard(model: nn.Module, device: torch.device) -> None:
    """Divide parameters and gradients of `model` among the processes, block by block. Raises ConfigError."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    try:
        for block in reversed(_blocks(model)):  # inner ones first
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"train.parallel fsdp cannot shard {type(model).__name__}: {error}") from None


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What is gathered together for its forward pass: members of containers that have parts of their own."""
    return [
        member
        for container in model.modules()
        if isinstance(container, CONTAINERS)
        for member in container.children()
        if not isinstance(member, CONTAINERS) and any(True for _ in member.children())
    ]


def whole(value: Any) -> Any:
    """`value`, nested dicts and lists, with every sharded tensor gathered on the CPU. All processes must call it."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [whole(item) for item in value]
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


@torch.no_grad()
def gather(source: nn.Module, into: nn.Module) -> None:
    """Copy the tensors of a sharded module into a whole one. All processes must call it."""
    targets = into.state_dict()
    for name, tensor in source.state_dict().items():
        targets[name].copy_(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def shard_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state dict of an optimizer with each tensor divided as `optimizer`'s parameter that it belongs to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def divide(value: Any, parameter: Tensor) -> Any:
        if not (isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.ndim):
            return value
        mesh, placements = parameter.device_mesh, parameter.placements
        alike = value.shape == parameter.shape  # factored statistics are not, and small
        value = value.to(parameter.device)
        return distribute_tensor(value, mesh, placements if alike else [Replicate()], src_data_rank=None)

    return {
        **state,
        "state": {
            index: {key: divide(value, parameters[index]) for key, value in entries.items()}
            for index, entries in state["state"].items()
        },
    }
