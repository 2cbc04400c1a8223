"""Some images of a loader, evenly from all of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, Subset

from knowiso_train.errors import OptionError
from knowiso_train.features import check_loader


def sampled(loader: Iterable[Any], max_images: int | None, seed: int = 0) -> Iterable[Any]:
    """The loader, or, where it reads more than `max_images` of a map-style dataset, one that reads so many, drawn at random.

    Folders are sorted by class, so the first images of them would be those of a few classes. Other loaders are cut off by who reads them.

    Args:
        loader: DataLoader or any iterable of batches that can be read more than once.
        max_images: most images, or None for all.
        seed: of the draw.

    Raises:
        InputTypeError: an iterator, which can be read only once, or no iterable.
        OptionError: `max_images` below 1.

    Example:
        >>> loader = DataLoader(torch.utils.data.TensorDataset(torch.arange(100.0)), batch_size=4)
        >>> sum(len(batch[0]) for batch in sampled(loader, 10))
        10
    """
    if max_images is not None and max_images < 1:
        raise OptionError(f"max_images must be positive or None, got {max_images}")
    check_loader(loader)
    plain = type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)
    if max_images is None or not plain or not isinstance(loader, DataLoader) or not isinstance(loader.sampler, SequentialSampler):
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
