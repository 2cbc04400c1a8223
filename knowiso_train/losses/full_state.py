"""State that a cast of the loss to half precision leaves as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class FullState(nn.Module):
    """A module whose buffers, and parameters, its parts' too, go to other devices and to a wider dtype, but never below their own.

    Example:
        >>> module = FullState()
        >>> module.register_buffer("mean", torch.zeros(2))
        >>> module.map = nn.Linear(2, 2)
        >>> module.half().mean.dtype, module.map.weight.dtype
        (torch.float32, torch.float32)
        >>> module.double().mean.dtype, module.map.weight.dtype
        (torch.float64, torch.float64)
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        buffers = dict(self._buffers)
        parameters = [(parameter, parameter.data) for parameter in self.parameters()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, own in buffers.items():
            moved = self._buffers[name]
            if own is not None and moved is not None and _narrower(moved, own):
                self._buffers[name] = own.to(moved.device)
        for parameter, own in parameters:
            if _narrower(parameter, own):
                gradient, parameter.grad = parameter.grad, None
                parameter.data = own.to(parameter.device)
                parameter.grad = None if gradient is None else gradient.to(own.dtype)
        return self


def _narrower(moved: Tensor, own: Tensor) -> bool:
    return torch.promote_types(own.dtype, moved.dtype) != moved.dtype
