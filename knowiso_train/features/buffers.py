"""Snapshots of the buffers of networks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

PLAIN_TYPES = (bool, int, float, str, type(None))


class BufferSnapshot:
    """Copies of the buffers of modules, to be restored after forward passes that change them.

    Observers, counters, caches and some running statistics change in eval mode too. Restored are values, shapes,
    storages, identities and names, so buffers that share memory share it again. If a forward pass replaced a buffer,
    the plain attributes of that module (numbers, text and None) are restored with it, as they describe the buffer.

    Args:
        modules: Modules, without their submodules.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> snapshot = BufferSnapshot([layer])
        >>> _ = layer(torch.ones(4, 2))
        >>> snapshot.restore()
        >>> layer.running_mean
        tensor([0., 0.])
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        # TorchScript fixes the names of buffers, and its tables cannot be written
        self._tables = [_Table(module) for module in modules if not isinstance(module, torch.jit.ScriptModule)]
        buffers = {id(buffer): buffer for module in modules for buffer in module.buffers(recurse=False)}
        self._contents = [_Content(buffer) for buffer in buffers.values() if not is_lazy(buffer)]

    def restore(self) -> None:
        """Restore all buffers."""
        for table in self._tables:
            table.restore()
        for content in self._contents:
            content.restore()


class _Table:
    """Names and identities of a module's buffers."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.buffers = module, dict(module._buffers)
        self.non_persistent = set(module._non_persistent_buffers_set)
        self.attributes: dict[str, Any] = {}
        if self.buffers:
            self.attributes = {name: value for name, value in vars(module).items() if isinstance(value, PLAIN_TYPES)}

    def restore(self) -> None:
        table = self.module._buffers
        same = len(table) == len(self.buffers) and all(
            name in table and table[name] is buffer for name, buffer in self.buffers.items()
        )
        if same:
            return
        table.clear()
        table.update(self.buffers)
        self.module._non_persistent_buffers_set.clear()
        self.module._non_persistent_buffers_set.update(self.non_persistent)
        vars(self.module).update(self.attributes)


class _Content:
    """Values, shape and storage of one buffer."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        # `.data` shares the storage but no version counter: restoring does not invalidate a pending backward pass
        self.view = buffer.data
        self.values = _distinct(self.view).clone()

    def restore(self) -> None:
        with torch.inference_mode(self.buffer.is_inference()), torch.no_grad():
            _distinct(self.view).copy_(self.values)
            # A resized buffer, or one whose `.data` was assigned
            if self.buffer.layout == torch.strided and (
                self.buffer.data_ptr() != self.view.data_ptr()
                or self.buffer.shape != self.view.shape
                or self.buffer.stride() != self.view.stride()
                or self.buffer.dtype != self.view.dtype
            ):
                self.buffer.data = self.view


def _distinct(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor without the repetitions of an expanded axis, which cannot be written."""
    if tensor.layout == torch.strided:
        for axis, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[axis] > 1:
                tensor = tensor.narrow(axis, 0, 1)
    return tensor
