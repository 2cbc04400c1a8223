"""Tracking of the indices that pruning keeps.

Every pruning library cuts a weight by indexing: `weight[kept]`, `index_select`, `cat` of slices, and so on. While
`track_kept_indices` is active, a `TorchFunctionMode` sees each of these calls and maintains a table

    memory of a tensor -> (name of a tensor of the model, indices of its entries)

At the beginning, the table holds the model's parameters and buffers, each with all of its indices. When an indexing
operation takes a tensor of the table, its result is entered into the table. The result's indices are what the same
operation makes of the indices of its argument: if `y = x[[0, 2]]`, then `indices(y) = indices(x)[[0, 2]]`.

Three properties keep this cheap and correct:

1. Replay is lazy. An entry holds a closure that applies the operation to flat indices, and only the entries of the
   final parameters are evaluated. `index_select`, the operation of most libraries, is applied to one index tensor per
   axis at once, without flat indices of the whole weight.
2. Tensors are identified by address, shape and stride, since `nn.Parameter(x)`, `x.data` and `x.detach()` are new
   objects with the memory of `x`. Each entry has a weak reference to its storage: once the storage is freed, its
   address can belong to another tensor, and the entry is void.
3. Index arguments are copied when the operation runs, so that later changes in place have no effect on the replay.

An operation on several tensors of the model, on a tensor that is not in the table, or on values (`weight * 2`) makes no
entry. A parameter of a new shape without an entry is reported as an error instead of being guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from knowiso_train.errors import CaptureError
from knowiso_train.features.wrappers import unwrap_model
from knowiso_train.pruning.kept_indices import (
    KeptIndices,
    axis_lists,
    flat_indices,
    float_tensors,
    tensor_shapes,
    to_axis_indices,
)

INDEXING_OPS = {"index_select", "__getitem__", "narrow", "select", "split", "chunk", "cat", "stack"}
COPY_OPS = {"clone", "detach", "contiguous"}
VIEW_OPS = {"view", "reshape", "flatten", "unflatten", "transpose", "permute", "t", "squeeze", "unsqueeze"}
TRACKED_OPS = INDEXING_OPS | COPY_OPS | VIEW_OPS
# Address, shape and stride
TensorKey = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class TensorOrigin:
    """Entries of a parameter or buffer that a tensor holds.

    Attributes:
        source: Name of the parameter or buffer; None for a tensor of unknown origin.
        shape: Shape of the parameter or buffer before pruning.
        indices: One index tensor per axis, or a function that returns flat indices in the tensor's shape.
    """

    source: str | None
    shape: tuple[int, ...]
    indices: list[Tensor] | Callable[[], Tensor]

    def flat(self) -> Tensor:
        """Return flat indices into the source, in the tensor's shape."""
        return flat_indices(self.indices, self.shape) if isinstance(self.indices, list) else self.indices()

    def kept_indices(self) -> KeptIndices:
        """Return the indices as `to_axis_indices` does."""
        if isinstance(self.indices, list):
            return axis_lists(self.indices, self.shape)
        return to_axis_indices({"": self.flat().clone()}, {"": self.shape})[""]


@contextmanager
def track_kept_indices(model: nn.Module) -> Iterator[dict[str, KeptIndices]]:
    """Track which entries of a model's tensors are kept while the model is pruned in place.

    Works with every library that cuts weights by indexing, torch-pruning among them, in any number of steps.

    Args:
        model: Model that is pruned within the context.

    Returns:
        A dictionary that is filled when the context ends: for each tensor whose shape changed, the kept indices as of
        `to_axis_indices`. A tensor of unchanged shape counts as complete, whatever its values.

    Raises:
        CaptureError: At the end, for a tensor of a new shape whose origin is unknown.

    Examples:
        >>> model = nn.Linear(3, 2)
        >>> with track_kept_indices(model) as kept:
        ...     model.weight = nn.Parameter(model.weight.data[:, [0, 2]])
        >>> kept
        {'weight': [None, [0, 2]]}
    """
    before = float_tensors(unwrap_model(model))
    # `parameter.data = …` changes the shape of the same object
    shapes = tensor_shapes(model)
    tracker = _IndexTracker(before)
    kept: dict[str, KeptIndices] = {}
    with tracker:
        yield kept
    for name, tensor in float_tensors(unwrap_model(model)).items():
        if name not in before or tuple(tensor.shape) == shapes[name]:
            continue
        origin = tracker.origin(tensor)
        # Tied tensors have one origin under several names
        if origin is None or origin.source is None or before[origin.source] is not before[name]:
            raise CaptureError(
                f"cannot track how {name!r} changed from shape {shapes[name]} to {tuple(tensor.shape)}. Expected "
                "indexing of the former tensor (weight[kept], index_select, cat, reshape) within the context"
            )
        kept[name] = origin.kept_indices()


class _IndexTracker(TorchFunctionMode):
    """Table of the origins of tensors, see the docstring of this module.

    Args:
        tensors: Tensors of the model by name. Of the names of a tied one, the first is its source.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._table: dict[TensorKey, tuple[Callable[[], bool], TensorOrigin]] = {}
        for name, tensor in tensors.items():
            shape = tuple(tensor.shape)
            axes = [torch.arange(size, device=tensor.device) for size in shape]
            self._record(tensor, TensorOrigin(name, shape, axes))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name not in TRACKED_OPS or "out" in kwargs:
            return result
        origins: list[TensorOrigin] = []
        traced_args, traced_kwargs = self._trace(list(args), origins), self._trace(kwargs, origins)
        if not origins or origins[0].source is None or len({origin.source for origin in origins}) > 1:
            return result
        source, shape = origins[0].source, origins[0].shape
        axes = origins[0].indices
        if name == "index_select" and len(traced_args) == 3 and traced_args[0] is origins[0] and isinstance(axes, list):
            dim, index = traced_args[1] % len(axes), traced_args[2]
            selected = [indices[index] if axis == dim else indices for axis, indices in enumerate(axes)]
            self._record(result, TensorOrigin(source, shape, selected))
        elif isinstance(result, (list, tuple)):
            for part, tensor in enumerate(result):
                replay = partial(_replay, func, traced_args, traced_kwargs, part)
                self._record(tensor, TensorOrigin(source, shape, replay))
        else:
            self._record(result, TensorOrigin(source, shape, partial(_replay, func, traced_args, traced_kwargs)))
        return result

    def origin(self, tensor: Tensor) -> TensorOrigin | None:
        """Return the origin of a tensor, None if it is unknown."""
        is_freed, origin = self._table.get(_key(tensor), (None, None))
        return None if is_freed is None or is_freed() else origin

    def _trace(self, value: Any, origins: list[TensorOrigin]) -> Any:
        """Copy the arguments of an operation with an origin in place of each tensor of numbers.

        Args:
            value: Arguments.
            origins: List that the origins are appended to.
        """
        if isinstance(value, dict):
            return {key: self._trace(entry, origins) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self._trace(entry, origins) for entry in value])
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return value.clone()
        origin = self.origin(value) or TensorOrigin(None, (), [])
        origins.append(origin)
        return origin

    def _record(self, tensor: Tensor, origin: TensorOrigin) -> None:
        # Empty tensors, and those on "meta", all have the address 0. Copies without effect keep their first entry
        if tensor.data_ptr() and self.origin(tensor) is None:
            storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            self._table[_key(tensor)] = storage.expired, origin


def _key(tensor: Tensor) -> TensorKey:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _replay(func: Callable[..., Any], args: Any, kwargs: Any, part: int | None = None) -> Tensor:
    """Apply an operation to the flat indices of its arguments, and return its result or one part of it."""
    result = func(*_evaluate(args), **_evaluate(kwargs))
    indices: Tensor = result if part is None else result[part]
    return indices


def _evaluate(value: Any) -> Any:
    """Replace the origins among arguments by their flat indices."""
    if isinstance(value, dict):
        return {key: _evaluate(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_evaluate(entry) for entry in value])
    return value.flat() if isinstance(value, TensorOrigin) else value
