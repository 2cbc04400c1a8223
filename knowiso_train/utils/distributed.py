"""Process groups: sums, gathers and gradient reduction."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

Result = TypeVar("Result")


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

    def run_on_first(self, function: Callable[[], Result]) -> Result:
        """Run a function in rank 0, and return its picklable result in all processes.

        Raises:
            Exception: The error of the function in rank 0; without this the others would wait for it.

        Examples:
            >>> ProcessGroup().run_on_first(lambda: 3)
            3
        """
        if self.size == 1:
            return function()
        outcome: tuple[Any, str | Exception | None] = None, None
        error: Exception | None = None
        if self.rank == 0:
            try:
                outcome = function(), None
            except Exception as caught:
                error = caught
                outcome = None, caught if _can_be_pickled(caught) else f"{type(caught).__name__}: {caught}"
        result, failure = self.gather(outcome)[0]
        if error is not None:
            raise error
        if failure is not None:
            raise failure if isinstance(failure, Exception) else RuntimeError(failure)
        first: Result = result
        return first

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


def _can_be_pickled(error: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    # Errors with arguments of their own raise anything
    except Exception:
        return False
    return True


def all_reduce_gradients(parameters: Sequence[nn.Parameter], group: ProcessGroup) -> list[RemovableHandle]:
    """Copy parameters from rank 0 and average their gradients over the processes in every later backward pass.

    Every process needs a gradient of at least one of them in the same backward passes.

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
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    mean = _GradientMean(trained, group)
    hooks: list[Any] = [partial(mean.collect, index) for index in range(len(trained))]
    tensors: list[Any] = trained
    return [tensor.register_hook(hook) for tensor, hook in zip(tensors, hooks, strict=True)]


class _GradientMean:
    """Mean of gradients over the processes, in one reduction at the end of a backward pass.

    Hooks run in the order of the autograd graph, which may differ between processes, for instance where one has no
    images. Collectives of each hook could then be of different parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: ProcessGroup) -> None:
        self.parameters, self.group = parameters, group
        self._collected: dict[int, Tensor] = {}

    def collect(self, index: int, gradient: Tensor) -> Tensor:
        """Keep the gradient of a parameter until the end of the pass, and let autograd add zeros."""
        if not self._collected:
            Variable._execution_engine.queue_callback(self._reduce)
        self._collected[index] = gradient
        return torch.zeros_like(gradient)

    @torch.no_grad()
    def _reduce(self) -> None:
        collected, self._collected = self._collected, {}
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in self.parameters) else torch.float32
        parts = [torch.zeros(len(self.parameters), dtype=dtype, device=self.group.device)]
        for index, parameter in enumerate(self.parameters):
            gradient = collected.get(index)
            parts[0][index] = gradient is not None
            values = torch.zeros_like(parameter) if gradient is None else gradient
            parts.append(values.detach().flatten().to(self.group.device, dtype))
        flat = torch.cat(parts)
        self.group.sum_(flat)
        has_gradient, *sums = torch.split(flat, [len(part) for part in parts])
        for parameter, present, values in zip(self.parameters, has_gradient.tolist(), sums, strict=True):
            if present:
                mean = (values / self.group.size).view_as(parameter).to(parameter.device, parameter.dtype)
                parameter.grad = mean if parameter.grad is None else parameter.grad.add_(mean)
