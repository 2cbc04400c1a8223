"""Batches of any form: inputs, labels, sizes, devices and subsets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, Subset

from knowiso_train.errors import DataError, InputTypeError, OptionError, ShapeError

INPUT_KEYS = ("pixel_values", "image", "images", "img", "input", "inputs", "x")
LABEL_KEYS = ("label", "labels", "target", "targets", "y")


def check_loader(loader: Any, what: str = "loader", *, again: bool = True) -> None:
    """Check that an argument is an iterable of batches.

    Args:
        loader: DataLoader or another iterable of batches.
        what: Name of the argument in error messages.
        again: Require that it can be read more than once, which excludes iterators.

    Raises:
        InputTypeError: Not an iterable of batches, or an iterator where it is read more than once.

    Examples:
        >>> check_loader([torch.zeros(2, 3, 8, 8)])
        >>> check_loader(iter([torch.zeros(2, 3, 8, 8)]), again=False)
    """
    # (images, labels), whereas batches of one loader have the same number of axes
    is_batch = isinstance(loader, (Tensor, Mapping)) or (
        isinstance(loader, (tuple, list))
        and all(isinstance(item, Tensor) for item in loader)
        and len({item.ndim for item in loader}) > 1
    )
    if is_batch or isinstance(loader, nn.Module) or not hasattr(loader, "__iter__"):
        raise InputTypeError(
            f"{what}: expected a DataLoader or another iterable of batches, got {type(loader).__name__}; "
            "put a single batch into a list"
        )
    if again and isinstance(loader, Iterator):
        raise InputTypeError(
            f"{what}: expected a DataLoader or a list of batches, which can be read more than once; "
            f"got an iterator ({type(loader).__name__})"
        )


def get_inputs(batch: Any) -> Tensor:
    """Return the images of a batch.

    Args:
        batch: Tensor; tuple or list with the images as its first element; or mapping with the images at one of
            `INPUT_KEYS`, else as its only floating tensor with two or more axes.

    Raises:
        InputTypeError: No tensor there, or several candidates.

    Examples:
        >>> get_inputs({"label": torch.zeros(4), "image": torch.ones(4, 3, 8, 8)}).shape
        torch.Size([4, 3, 8, 8])
    """
    key = _input_key(batch)
    images = batch if key is None else batch[key]
    if not isinstance(images, Tensor):
        entry = "" if key is None else f" with a {type(images).__name__} at {key!r}"
        raise InputTypeError(
            "expected a batch that is a tensor, a tuple or list that begins with one, or a mapping with one at "
            f"{INPUT_KEYS}; got {type(batch).__name__}{entry}. Pass forward= to call the network on such batches."
        )
    return images


def labels_of(batch: Any, description: str = "images") -> Tensor:
    """Return the class labels of a batch.

    Args:
        batch: Tuple or list with the labels as its second element, or mapping with the labels at one of `LABEL_KEYS`.
        description: Name of the images in error messages.

    Returns:
        (N,) int64 tensor on the device of the labels.

    Raises:
        DataError: No labels, labels that are not one integer per image, or negative labels.

    Examples:
        >>> labels_of({"image": torch.zeros(2, 3, 4, 4), "y": torch.tensor([1, 0])})
        tensor([1, 0])
    """
    labels: Any = None
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        labels = batch[1]
    if not isinstance(labels, Tensor):
        content = "none" if labels is None else type(labels).__name__
        raise DataError(
            f"{description}: expected a tensor of labels as the second element of each batch, "
            f"or at one of {LABEL_KEYS}, got {content} in a {type(batch).__name__}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.shape != (batch_size(batch),):
        raise DataError(
            f"{description}: expected one integer label for each image, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if bool((labels < 0).any()):
        raise DataError(
            f"{description}: expected labels of at least 0, got {int(labels.min())}; leave out images without a label"
        )
    return labels.long()


def replace_inputs(batch: Any, inputs: Any) -> Any:
    """Return a copy of a batch with other images in the place of those that `get_inputs` returns.

    Raises:
        InputTypeError: See `get_inputs`.
    """
    get_inputs(batch)
    key = _input_key(batch)
    if key is None:
        return inputs
    if isinstance(batch, Mapping):
        return _rebuild_mapping(batch, {**batch, key: inputs})
    return _rebuild_sequence(batch, [inputs, *batch[1:]])


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Move all tensors of a batch to a device, through tuples, lists and mappings; other values stay unchanged.

    Raises:
        InputTypeError: Tensors of the meta device, which have no data.
    """
    if any(tensor.is_meta for tensor in _tensors(batch)) and torch.device(device).type != "meta":
        raise InputTypeError("expected batches with data, got tensors on the meta device; check the loader")
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def batch_size(batch: Any) -> int:
    """Return the number of samples: the length of the images, else of the first tensor with an axis.

    Raises:
        InputTypeError: No tensor with at least one axis.

    Examples:
        >>> batch_size((torch.zeros(4, 3, 8, 8), torch.zeros(4)))
        4
    """
    try:
        return len(get_inputs(batch))
    # TypeError: images without axes
    except (InputTypeError, TypeError):
        for tensor in _tensors(batch):
            if tensor.ndim:
                return len(tensor)
    raise InputTypeError(f"expected a batch with at least one tensor to count samples, got {type(batch).__name__}")


def index_batch(batch: Any, index: Tensor) -> Any:
    """Select samples of a batch.

    Tensors with one row per sample are indexed along their first axis, also in nested containers. Nested lists and
    tuples with one item per sample, such as file names or boxes, are indexed too. Other values stay unchanged.

    Args:
        batch: Batch in a form that `get_inputs` accepts.
        index: (K,) indices, or (N,) boolean mask.

    Raises:
        ShapeError: A mask of another length, or an index that is not 1-D.
        InputTypeError: A batch without tensors.

    Examples:
        >>> index_batch({"image": torch.zeros(3, 1), "name": ["a", "b", "c"]}, torch.tensor([2, 0]))["name"]
        ['c', 'a']
    """
    size = batch_size(batch)
    if index.ndim != 1 or (index.dtype == torch.bool and len(index) != size):
        raise ShapeError(
            f"expected a 1-D index, or a boolean mask of length {size}; got {index.dtype} of shape {tuple(index.shape)}"
        )
    indices = index.nonzero().flatten() if index.dtype == torch.bool else index
    return _select(batch, indices, size, top=True)


def _select(batch: Any, index: Tensor, size: int, *, top: bool = False) -> Any:
    if isinstance(batch, Tensor):
        # A non-blocking copy to the CPU could be read before it is complete; on a GPU the stream orders it.
        non_blocking = batch.device.type != "cpu"
        is_indexed = batch.ndim and len(batch) == size
        return batch[index.to(batch.device, non_blocking=non_blocking)] if is_indexed else batch
    if isinstance(batch, Mapping):
        return _rebuild_mapping(batch, {key: _select(value, index, size) for key, value in batch.items()})
    if not isinstance(batch, (tuple, list)):
        return batch
    if not top and not _has_columns(batch, size) and len(batch) == size:
        return _rebuild_sequence(batch, [batch[i] for i in index.tolist()])
    return _rebuild_sequence(batch, [_select(item, index, size) for item in batch])


def _has_columns(batch: Sequence[Any], size: int) -> bool:
    """Return True for a list such as [images, labels], which holds columns also if it is as long as the batch."""
    return all(isinstance(item, Tensor) and item.ndim and len(item) == size for item in batch)


def concatenate_batches(batches: Sequence[Any]) -> Any:
    """Join batches of one form into one batch, which `index_batch` can split again.

    Tensors with one row per sample are concatenated, and nested lists and tuples with one item per sample joined.
    Containers keep their classes; of other values, the first one is kept.

    Args:
        batches: One or more batches in a form that `index_batch` accepts.

    Raises:
        ShapeError: Images of different sizes, or other tensors that differ and have no row for each sample.
        InputTypeError: Batches of different forms, or without tensors.

    Examples:
        >>> batches = [{"image": torch.zeros(n, 1), "name": list("abc"[:n])} for n in (3, 1)]
        >>> concatenate_batches(batches)["name"]
        ['a', 'b', 'c', 'a']
    """
    return batches[0] if len(batches) == 1 else _join(batches, [batch_size(batch) for batch in batches], top=True)


def _join(values: Sequence[Any], sizes: Sequence[int], *, top: bool = False) -> Any:
    first = values[0]
    form = next((form for form in (Tensor, Mapping, (tuple, list)) if isinstance(first, form)), object)
    if not all(isinstance(value, form) for value in values):
        names = sorted({type(value).__name__ for value in values})
        raise InputTypeError(f"expected batches of one form, got {' and '.join(names)} at one place; check the loader")
    if isinstance(first, Tensor):
        return _join_tensors(values, sizes)
    if isinstance(first, Mapping):
        if any(value.keys() != first.keys() for value in values):
            raise InputTypeError(
                f"expected batches with the same keys, got {' and '.join(str(list(value)) for value in values[:2])}"
            )
        return _rebuild_mapping(first, {key: _join([value[key] for value in values], sizes) for key in first})
    if not isinstance(first, (tuple, list)):
        return first
    is_column = [_has_columns(value, size) for value, size in zip(values, sizes, strict=True)]
    if not top and not all(is_column) and [len(value) for value in values] == list(sizes):
        return _rebuild_sequence(first, [item for value in values for item in value])
    if any(len(value) != len(first) for value in values):
        raise InputTypeError(
            f"expected lists with one item per image in batches of {list(sizes)} images, or of one length; got "
            f"{[len(value) for value in values]} items"
        )
    return _rebuild_sequence(first, [_join(items, sizes) for items in zip(*values, strict=True)])


def _join_tensors(values: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    first = values[0]
    if not first.ndim or not all(value.ndim and len(value) == size for value, size in zip(values, sizes, strict=True)):
        if not first.ndim or all(torch.equal(first, value) for value in values):
            return first
        raise ShapeError(
            f"expected tensors with one row per image in batches of {list(sizes)} images, or equal ones; got shapes "
            f"{[tuple(value.shape) for value in values]}. Pass one batch, or a list with one tensor per image"
        )
    shapes = sorted({tuple(value.shape[1:]) for value in values})
    if len(shapes) > 1:
        raise ShapeError(
            f"expected images of one size, got {' and '.join(map(str, shapes))}; resize or crop them in the loader"
        )
    return torch.cat(list(values))


def _input_key(batch: Any) -> Any:
    """Return the key or index of the images in a batch; None for the batch itself."""
    if isinstance(batch, (tuple, list)) and batch:
        return 0
    if not isinstance(batch, Mapping):
        return None
    for key in INPUT_KEYS:
        if key in batch:
            return key
    candidates = [
        key
        for key, value in batch.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2
    ]
    if len(candidates) == 1:
        return candidates[0]
    raise InputTypeError(
        f"expected images at one of {INPUT_KEYS}, or a single floating tensor with two or more axes, in the batch; "
        f"got keys {list(batch)}, {len(candidates)} such tensor(s). Pass forward= to call the network on such batches."
    )


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of nested lists, tuples, mappings and dataclasses with a function applied to every tensor.

    Examples:
        >>> map_tensors({"logits": torch.ones(1), "loss": None}, lambda tensor: 2 * tensor)
        {'logits': tensor([2.]), 'loss': None}
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return _rebuild_mapping(value, {key: map_tensors(item, function) for key, item in value.items()})
    if isinstance(value, (tuple, list)):
        return _rebuild_sequence(value, [map_tensors(item, function) for item in value])
    if is_dataclass(value) and not isinstance(value, type):
        copied = copy.copy(value)
        for field in fields(value):
            object.__setattr__(copied, field.name, map_tensors(getattr(value, field.name), function))
        return copied
    return value


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(item)


def _rebuild_mapping(batch: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """Return a mapping of the same class with other values, so that BatchEncoding keeps its attributes."""
    if type(batch) is dict or not hasattr(batch, "__setitem__"):
        return values
    copied = copy.copy(batch)
    for key, value in values.items():
        copied[key] = value
    return copied


def _rebuild_sequence(batch: Sequence[Any], values: list[Any]) -> Any:
    batch_type: Any = type(batch)
    # Named tuples take their fields as separate arguments.
    return batch_type(*values) if hasattr(batch, "_fields") else batch_type(values)


def image_size(images: Tensor) -> tuple[int, int] | None:
    """Return (height, width) of images (N, C, H, W); None for other inputs.

    Examples:
        >>> image_size(torch.zeros(2, 3, 8, 6)), image_size(torch.zeros(2, 20))
        ((8, 6), None)
    """
    return (images.shape[2], images.shape[3]) if images.ndim == 4 else None


def subsample_loader(loader: Iterable[Any], max_images: int | None, seed: int = 0) -> Iterable[Any]:
    """Return a loader of at most `max_images` random images where the dataset allows random access, else the loader.

    Random, because image folders are sorted by class: their first images would cover only a few classes. Callers stop
    reading other loaders early.

    Args:
        loader: DataLoader, or another iterable of batches that can be read more than once.
        max_images: Maximum number of images. None: all.
        seed: Seed of the random choice.

    Raises:
        InputTypeError: An iterator, which can be read only once, or no iterable.
        OptionError: `max_images` below 1.

    Examples:
        >>> loader = DataLoader(torch.utils.data.TensorDataset(torch.arange(100.0)), batch_size=4)
        >>> sum(len(batch[0]) for batch in subsample_loader(loader, 10))
        10
    """
    if max_images is not None and max_images < 1:
        raise OptionError(f"max_images must be positive or None, got {max_images}")
    check_loader(loader)
    if max_images is None or not _reads_in_order(loader):
        return loader
    count = len(loader.dataset)  # type: ignore[arg-type]
    if count <= max_images:
        return loader
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(count, generator=generator)[:max_images].sort().values.tolist()
    return DataLoader(
        Subset(loader.dataset, indices),
        batch_size=loader.batch_size or 64,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
    )


def shuffle_loader(loader: Iterable[Any]) -> Iterable[Any]:
    """Return a loader of the same images in random order where it reads a dataset in its own order, else the loader.

    Image folders are sorted by class, and batches of one class do not train.

    Examples:
        >>> loader = DataLoader(torch.utils.data.TensorDataset(torch.arange(100.0)), batch_size=50)
        >>> first = next(iter(shuffle_loader(loader)))[0]
        >>> len(first), bool((first.diff() == 1).all())
        (50, False)
    """
    if not _reads_in_order(loader) or loader.batch_size is None:
        return loader
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        shuffle=True,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
    )


def _reads_in_order(loader: Iterable[Any]) -> TypeGuard[DataLoader[Any]]:
    """Return whether a loader is a plain `DataLoader` that reads a map-style dataset from first to last."""
    is_map_style = type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)
    return is_map_style and isinstance(loader, DataLoader) and isinstance(loader.sampler, SequentialSampler)


def tensor_leaves(value: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples, mappings and dataclasses, in order; other values are left out.

    Examples:
        >>> tensor_leaves((torch.ones(1), None, {"loss": 3, "aux": [torch.zeros(1)]}))
        [tensor([1.]), tensor([0.])]
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in fields(value)]
    if not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in tensor_leaves(item)]
