"""Process groups: sums, gathers and gradient reduction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class ProcessGroup:
    """Default process group where it is initialized, else this process alone.

    Examples:
        >>> ProcessGroup().size
        1
    """

    def __init__(self) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if active else 0
        self.size = dist.get_world_size() if active else 1

    def sum_(self, *tensors: Tensor) -> None:
        """Sum each tensor over the processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def gather(self, value: Any) -> list[Any]:
        """Return a picklable value of every process, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast_(self, tensors: list[Tensor]) -> None:
        """Overwrite tensors with those of rank 0, in place."""
        if self.size > 1:
            for tensor in tensors:
                moved = tensor.to(self.device)
                dist.broadcast(moved, 0)
                tensor.copy_(moved)

    @property
    def device(self) -> torch.device:
        """Device that collectives need their tensors on: CUDA under NCCL, else the CPU."""
        if self.size > 1 and "nccl" in str(dist.get_backend()):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


def all_reduce_gradients(parameters: Sequence[nn.Parameter], group: ProcessGroup) -> list[RemovableHandle]:
    """Copy parameters from rank 0 and average their gradients over the processes in every later backward pass.

    Args:
        parameters: Parameters outside of DDP.
        group: Processes to average over.

    Returns:
        Handles of the gradient hooks; none for a single process or without parameters.

    Examples:
        >>> all_reduce_gradients([nn.Parameter(torch.zeros(2))], ProcessGroup())
        []
    """
    if group.size == 1 or not parameters:
        return []
    with torch.no_grad():
        group.broadcast_([parameter.data for parameter in parameters])

    def mean(gradient: Tensor) -> Tensor:
        total = gradient.to(group.device, copy=True)
        group.sum_(total)
        return (total / group.size).to(gradient.device)

    trained: list[Any] = [parameter for parameter in parameters if parameter.requires_grad]
    return [parameter.register_hook(mean) for parameter in trained]
