"""Batches of any form: inputs, labels, sizes, devices and subsets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, Subset

from knowiso_train.errors import DataError, InputTypeError, OptionError, ShapeError

INPUT_KEYS = ("pixel_values", "image", "images", "img", "input", "inputs", "x")
LABEL_KEYS = ("label", "labels", "target", "targets", "y")


def check_loader(loader: Any, what: str = "loader", *, again: bool = True) -> None:
    """That something can be read batch by batch.

    Args:
        loader: DataLoader or another iterable of batches.
        what: it is, for the error.
        again: whether it is read more than once, which an iterator cannot be.

    Raises:
        InputTypeError: it cannot.

    Example:
        >>> check_loader([torch.zeros(2, 3, 8, 8)])
        >>> check_loader(iter([torch.zeros(2, 3, 8, 8)]), again=False)
    """
    if isinstance(loader, (Tensor, nn.Module)) or not hasattr(loader, "__iter__"):
        raise InputTypeError(
            f"{what}: expected a DataLoader or any other iterable of batches of images, got {type(loader).__name__}; put a single batch into a list"
        )
    if again and isinstance(loader, Iterator):
        raise InputTypeError(
            f"{what}: expected a DataLoader or a list of batches, which can be read more than once; got an iterator ({type(loader).__name__})"
        )


def get_inputs(batch: Any) -> Tensor:
    """The images of a batch.

    Args:
        batch: the tensor itself; a tuple or list, whose first element is taken; or a mapping, of which the first
            present of `INPUT_KEYS` is taken,
            else the only floating tensor with two axes or more.

    Raises:
        InputTypeError: no tensor there, or a choice between several.

    Example:
        >>> get_inputs({"label": torch.zeros(4), "image": torch.ones(4, 3, 8, 8)}).shape
        torch.Size([4, 3, 8, 8])
    """
    key = _input_key(batch)
    found = batch if key is None else batch[key]
    if not isinstance(found, Tensor):
        where = "" if key is None else f" with a {type(found).__name__} at {key!r}"
        raise InputTypeError(
            f"expected a batch that is a tensor, a tuple or list whose first element is one, or a mapping with one at {INPUT_KEYS}; "
            f"got {type(batch).__name__}{where}. Pass forward= to call the network on such batches."
        )
    return found


def labels_of(batch: Any, description: str = "images") -> Tensor:
    """Return the class labels of a batch.

    Args:
        batch: Tuple or list with the labels as its second element, or mapping with the labels at one of `LABEL_KEYS`.
        description: Name of the images in error messages.

    Returns:
        (N,) int64 tensor on the device of the labels.

    Raises:
        DataError: No labels, labels that are not one integer per image, or negative labels.

    Example:
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
            f"{description}: expected a tensor of labels as the second element of each batch or at one of {LABEL_KEYS}, "
            f"got {content} in a {type(batch).__name__}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.shape != (batch_size(batch),):
        raise DataError(
            f"{description}: expected one integer label for each image, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if bool((labels < 0).any()):
        raise DataError(
            f"{description}: expected labels of at least 0, got {int(labels.min())}; leave out images without a label"
        )
    return labels.long()


def replace_inputs(batch: Any, inputs: Any) -> Any:
    """The batch with other images in the place where `get_inputs` finds them.

    Raises:
        InputTypeError: as `get_inputs`.
    """
    get_inputs(batch)
    key = _input_key(batch)
    if key is None:
        return inputs
    if isinstance(batch, Mapping):
        return _rebuilt_mapping(batch, {**batch, key: inputs})
    return _rebuilt_sequence(batch, [inputs, *batch[1:]])


def to_device(batch: Any, device: torch.device | str) -> Any:
    """The batch with every tensor in it on a device; what is no tensor, tuple, list or mapping stays as it is."""
    return _mapped(batch, lambda tensor: tensor.to(device, non_blocking=True))


def batch_size(batch: Any) -> int:
    """Number of samples: the length of the images, or of the first tensor where `get_inputs` finds none.

    Raises:
        InputTypeError: no tensor with at least one axis.

    Example:
        >>> batch_size((torch.zeros(4, 3, 8, 8), torch.zeros(4)))
        4
    """
    try:
        return len(get_inputs(batch))
    except (InputTypeError, TypeError):  # TypeError: a tensor without axes
        for tensor in _tensors(batch):
            if tensor.ndim:
                return len(tensor)
    raise InputTypeError(f"expected a batch with at least one tensor to count samples, got {type(batch).__name__}")


def index_batch(batch: Any, index: Tensor) -> Any:
    """Some samples of a batch.

    Tensors with one row per sample are indexed along their first axis, wherever they are; so are lists and tuples
    inside the batch with one item
    per sample (file names, boxes). Everything else is passed on.

    Args:
        batch: see `get_inputs`.
        index: 1-D, indices or a boolean mask.

    Raises:
        ShapeError: a mask of another length, or an index that is not 1-D.
        InputTypeError: a batch without tensors.

    Example:
        >>> index_batch({"image": torch.zeros(3, 1), "name": ["a", "b", "c"]}, torch.tensor([2, 0]))["name"]
        ['c', 'a']
    """
    size = batch_size(batch)
    if index.ndim != 1 or (index.dtype == torch.bool and len(index) != size):
        raise ShapeError(
            f"expected a 1-D index, or a boolean mask of length {size}; got {index.dtype} of shape {tuple(index.shape)}"
        )
    chosen = index.nonzero().flatten() if index.dtype == torch.bool else index
    return _selected(batch, chosen, size, top=True)


def _selected(batch: Any, index: Tensor, size: int, *, top: bool = False) -> Any:
    if isinstance(batch, Tensor):
        # What comes to the CPU is read at once; what goes to a GPU it finds in its queue
        waits = batch.device.type == "cpu"
        return batch[index.to(batch.device, non_blocking=not waits)] if batch.ndim and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return _rebuilt_mapping(batch, {key: _selected(value, index, size) for key, value in batch.items()})
    if not isinstance(batch, (tuple, list)):
        return batch
    # [images, labels] of two samples
    columns = all(isinstance(item, Tensor) and item.ndim and len(item) == size for item in batch)
    if not top and not columns and len(batch) == size:
        return _rebuilt_sequence(batch, [batch[i] for i in index.tolist()])
    return _rebuilt_sequence(batch, [_selected(item, index, size) for item in batch])


def _input_key(batch: Any) -> Any:
    """Where in the batch the images are; None for the batch itself."""
    if isinstance(batch, (tuple, list)) and batch:
        return 0
    if not isinstance(batch, Mapping):
        return None
    for key in INPUT_KEYS:
        if key in batch:
            return key
    maps = [
        key
        for key, value in batch.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2
    ]
    if len(maps) == 1:
        return maps[0]
    raise InputTypeError(
        f"cannot tell which entry of the batch is the images: expected one of {INPUT_KEYS}, or a single floating tensor with two axes or more; "
        f"got keys {list(batch)}, {len(maps)} such tensor(s). Pass forward= to call the network on such batches."
    )


def _mapped(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return _rebuilt_mapping(batch, {key: _mapped(value, function) for key, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        return _rebuilt_sequence(batch, [_mapped(item, function) for item in batch])
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(item)


def _rebuilt_mapping(batch: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """The same kind of mapping (Hugging Face's BatchEncoding offers attributes) with other values."""
    if type(batch) is dict or not hasattr(batch, "__setitem__"):
        return values
    rebuilt = copy.copy(batch)
    for key, value in values.items():
        rebuilt[key] = value
    return rebuilt


def _rebuilt_sequence(batch: Sequence[Any], values: list[Any]) -> Any:
    kind = type(batch)
    return kind(*values) if hasattr(batch, "_fields") else kind(values)  # type: ignore[call-arg]  # namedtuples take their fields one by one


def image_size(images: Tensor) -> tuple[int, int] | None:
    """(height, width) of images (N, C, H, W); None for other inputs.

    Example:
        >>> image_size(torch.zeros(2, 3, 8, 6)), image_size(torch.zeros(2, 20))
        ((8, 6), None)
    """
    return (images.shape[2], images.shape[3]) if images.ndim == 4 else None


def subsample_loader(loader: Iterable[Any], max_images: int | None, seed: int = 0) -> Iterable[Any]:
    """The loader, or, where it reads more than `max_images` of a map-style dataset, one that reads so many, drawn at random.

    Folders are sorted by class, so the first images of them would be those of a few classes. Other loaders are cut off
    by who reads them.

    Args:
        loader: DataLoader or any iterable of batches that can be read more than once.
        max_images: most images, or None for all.
        seed: of the draw.

    Raises:
        InputTypeError: an iterator, which can be read only once, or no iterable.
        OptionError: `max_images` below 1.

    Example:
        >>> loader = DataLoader(torch.utils.data.TensorDataset(torch.arange(100.0)), batch_size=4)
        >>> sum(len(batch[0]) for batch in subsample_loader(loader, 10))
        10
    """
    if max_images is not None and max_images < 1:
        raise OptionError(f"max_images must be positive or None, got {max_images}")
    check_loader(loader)
    plain = type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)
    if (
        max_images is None
        or not plain
        or not isinstance(loader, DataLoader)
        or not isinstance(loader.sampler, SequentialSampler)
    ):
        return loader
    count = len(loader.dataset)  # type: ignore[arg-type]
    if count <= max_images:
        return loader
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:max_images].sort().values.tolist()
    return DataLoader(
        Subset(loader.dataset, chosen),
        batch_size=loader.batch_size or 64,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
    )
