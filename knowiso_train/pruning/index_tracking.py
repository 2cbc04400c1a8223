"""Tracking of the indices that pruning keeps."""

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
from knowiso_train.features.modules import unwrap_model
from knowiso_train.pruning.kept_indices import (
    KeptIndices,
    by_dimension,
    flat_indices,
    float_tensors,
    tensor_shapes,
    to_axis_indices,
)

INDEXING_OPS = {"index_select", "__getitem__", "narrow", "select", "split", "chunk", "cat", "stack"}
COPY_OPS = {"clone", "detach", "contiguous"}
VIEW_OPS = {"view", "reshape", "flatten", "unflatten", "transpose", "permute", "t", "squeeze", "unsqueeze"}
TRACKED_OPS = INDEXING_OPS | COPY_OPS | VIEW_OPS
UNKNOWN_SOURCE = "?"  # no parameter or buffer of the network
Key = tuple[int, tuple[int, ...], tuple[int, ...]]
# One line of indices per dimension, as nearly always; else what gives the entries' flat indices
Numbers = list[Tensor] | Callable[[], Tensor]


@contextmanager
def track_kept_indices(model: nn.Module) -> Iterator[dict[str, KeptIndices]]:
    """Within the context a network is pruned in place; the dictionary it gives is filled when the context ends.

    Works with every library that cuts weights by indexing, torch-pruning among them, however many steps it takes;
    nothing of it is patched.

    Args:
        model: the network that is pruned within.

    Returns:
        For each tensor whose shape changed: which entries of the one from before it holds, as of `to_axis_indices`.
            What keeps its shape is taken as
        whole, whatever its values.

    Raises:
        CaptureError: at the end, for a tensor that became another shape in a way that could not be followed.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> with track_kept_indices(model) as kept:
        ...     model.weight = nn.Parameter(model.weight.data[:, [0, 2]])
        >>> kept
        {'weight': [None, [0, 2]]}
    """
    before = float_tensors(unwrap_model(model))
    shapes = tensor_shapes(model)  # `parameter.data = …` changes the very objects
    follower = _IndexTracker(before)
    kept: dict[str, KeptIndices] = {}
    with follower:
        yield kept
    for name, tensor in float_tensors(unwrap_model(model)).items():
        if name not in before or tuple(tensor.shape) == shapes[name]:
            continue
        source, numbers = follower.found(tensor) or ("", [])
        if not source or before[source] is not before[name]:
            raise CaptureError(
                f"{name!r} went from shape {shapes[name]} to {tuple(tensor.shape)} in a way that could not be followed. "
                "Expected indexing (weight[kept], index_select, cat, reshape) of the tensor from before, within the context"
            )
        kept |= (
            {name: by_dimension(numbers, shapes[name])}
            if isinstance(numbers, list)
            else to_axis_indices({name: numbers().clone()}, shapes)
        )


class _IndexTracker(TorchFunctionMode):
    """Does to the entries' numbers what is done to the entries, when it is asked for. Tensors are known by their memory: `nn.Parameter(x)` is x's."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.known: dict[Key, tuple[Callable[[], bool], str, Numbers]] = {}
        for name, tensor in tensors.items():  # the first name of a tied one stands
            self._remember(tensor, [torch.arange(size, device=tensor.device) for size in tensor.shape], name)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name not in TRACKED_OPS or "out" in kwargs:
            return result
        sources: set[str] = set()
        held, named = self._held(list(args), sources), self._held(kwargs, sources)
        if len(sources) != 1 or UNKNOWN_SOURCE in sources:
            return result
        source, lines = sources.pop(), held[0]
        if (
            name == "index_select"
            and len(held) == 3
            and isinstance(lines, _TensorOrigin)
            and isinstance(lines.numbers, list)
        ):
            cut = [
                line[held[2]] if dim == held[1] % len(lines.numbers) else line for dim, line in enumerate(lines.numbers)
            ]
            self._remember(result, cut, source)
        elif isinstance(result, (list, tuple)):
            for part, tensor in enumerate(result):
                self._remember(tensor, partial(_again, func, held, named, part), source)
        else:
            self._remember(result, partial(_again, func, held, named), source)
        return result

    def found(self, tensor: Tensor) -> tuple[str, Numbers] | None:
        """Name of the tensor that this one was cut from, and its entries' numbers in it."""
        key = _key(tensor)
        # Its memory was freed, and is another tensor's by now
        if key is None or key not in self.known or self.known[key][0]():
            return None
        return self.known[key][1:]

    def _held(self, value: Any, sources: set[str]) -> Any:
        """Arguments as they are now, with what is known of each tensor in its place."""
        if isinstance(value, dict):
            return {key: self._held(entry, sources) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self._held(entry, sources) for entry in value])
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():  # indices stay indices, whatever becomes of them later
            return value.clone()
        source, numbers = self.found(value) or (UNKNOWN_SOURCE, [])
        sources.add(source)
        return _TensorOrigin(numbers, self.shapes.get(source, ()))

    def _remember(self, tensor: Tensor, numbers: Numbers, source: str) -> None:
        if (key := _key(tensor)) is not None and self.found(tensor) is None:
            freed: Callable[[], bool] = StorageWeakRef(tensor.untyped_storage()).expired  # type: ignore[no-untyped-call]
            self.known[key] = freed, source, numbers


@dataclass(frozen=True)
class _TensorOrigin:
    """Stands for a tensor among the arguments of an operation."""

    numbers: Numbers
    shape: tuple[int, ...]


def _again(func: Callable[..., Any], args: Any, kwargs: Any, part: int | None = None) -> Tensor:
    result = func(*_flat(args), **_flat(kwargs))
    found: Tensor = result if part is None else result[part]
    return found


def _flat(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _flat(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_flat(entry) for entry in value])
    if isinstance(value, _TensorOrigin):
        return flat_indices(value.numbers, value.shape) if isinstance(value.numbers, list) else value.numbers()
    return value


def _key(tensor: Tensor) -> Key | None:
    memory = tensor.data_ptr()
    # Empty ones, and those on "meta", are all alike
    return (memory, tuple(tensor.shape), tensor.stride()) if memory else None
