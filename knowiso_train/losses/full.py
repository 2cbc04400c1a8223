"""State that a cast of the loss to half precision leaves as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class FullBuffers(nn.Module):
    """A module whose buffers go to other devices, and to a wider dtype, but never below their own.

    Example:
        >>> module = FullBuffers()
        >>> module.register_buffer("mean", torch.zeros(2))
        >>> module.half().mean.dtype, module.double().mean.dtype
        (torch.float32, torch.float64)
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, own in before.items():
            moved = self._buffers[name]
            if own is not None and moved is not None and torch.promote_types(own.dtype, moved.dtype) != moved.dtype:
                self._buffers[name] = own.to(moved.device)
        return self
