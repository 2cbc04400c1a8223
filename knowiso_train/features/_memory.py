"""Memory of the tensors that a forward pass creates."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from knowiso_train.errors import CapacityError
from knowiso_train.utils.memory import format_bytes


class ActivationMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context that counts the bytes of the tensors that are created within it and still exist.

    Tensors that share a storage count once. Workspaces within one operation are not counted.

    Args:
        limit: Largest number of bytes. None: no limit.

    Attributes:
        live: Bytes of the tensors that exist now.
        peak: Largest `live` so far.

    Raises:
        CapacityError: An operation whose result exceeds the limit.

    Examples:
        >>> import torch
        >>> with ActivationMemory() as memory:
        ...     temporary = torch.zeros(100, dtype=torch.uint8)
        ...     del temporary
        ...     kept = torch.zeros(20, dtype=torch.uint8)
        >>> memory.live, memory.peak
        (20, 100)
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit, self.live, self.peak = limit, 0, 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = weakref.finalize(storage, self._release, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)
        if self.limit is not None and self.live > self.limit:
            raise CapacityError(f"the tensors of a forward pass exceed {format_bytes(self.limit)}")

    def _release(self, key: int, size: int) -> None:
        self._storages.pop(key, None)
        self.live -= size
