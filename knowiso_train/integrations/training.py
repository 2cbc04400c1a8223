"""Images for training: order and augmentation depend on (seed, epoch, index) alone, so a killed run can be taken up to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from knowiso_train.errors import DataError, OptionError
from knowiso_train.integrations.datasets import image_loader


class TrainingImages(Dataset[tuple[Tensor, int]]):
    """Images of another dataset, augmented. A key carries its epoch, `epoch * len + index`, so workers need not be told of it.

    Args:
        images: map-style dataset of (float image (C, H, W), integer label).
        seed: of the augmentation.
        padding: pixels of black on each side, of which a random crop gives the original size again; 0 leaves the image where it is.
        flip: mirror half of the images, left to right.

    Raises:
        DataError: an image without a label.

    Example:
        >>> plain = [(torch.rand(3, 8, 8), 1)] * 10
        >>> images = TrainingImages(plain, padding=2)
        >>> image, label = images[3]
        >>> torch.equal(image, images[3][0]), torch.equal(image, images[10 + 3][0])  # the next epoch crops elsewhere
        (True, False)
    """

    def __init__(self, images: Any, *, seed: int = 0, padding: int = 0, flip: bool = False) -> None:
        self.images, self.seed, self.padding, self.flip = images, seed, padding, flip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int) -> tuple[Tensor, int]:
        epoch, index = divmod(key, len(self))
        image, label = self.images[index]
        if label < 0:
            raise DataError(f"image {index} has no label; training needs one for each image")
        draw = np.random.default_rng((self.seed, epoch, index))
        if self.padding:
            top, left = draw.integers(0, 2 * self.padding + 1, size=2)
            height, width = image.shape[1:]
            image = F.pad(image, [self.padding] * 4)[:, top : top + height, left : left + width]
        if self.flip and draw.random() < 0.5:
            image = image.flip(2)
        return image, int(label)


class EpochOrder(Sampler[int]):
    """A permutation for each epoch, as keys of `TrainingImages`. Set `.epoch` before each pass.

    accelerate counts epochs by itself, from 0 also after a restart, and would tell a `set_epoch` method; hence the attribute.

    Example:
        >>> order = EpochOrder(4, seed=0)
        >>> order.epoch = 2
        >>> sorted(order)
        [8, 9, 10, 11]
    """

    def __init__(self, count: int, *, seed: int = 0) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        yield from (self.epoch * self.count + order).tolist()


def training_loader(
    images: Any, *, batch_size: int, seed: int = 0, padding: int = 0, flip: bool = False, workers: int = 0, pin_memory: bool = False
) -> DataLoader[tuple[Tensor, int]]:
    """A loader of whole, shuffled, augmented batches; `loader.sampler.epoch` says which epoch.

    Args:
        images: map-style dataset of (float image (C, H, W), integer label), as that of `image_loader`.
        batch_size: images a batch; what is left over at the end of an epoch waits for the next order.
        seed: of order and augmentation.
        padding: pixels on each side, of which a random crop gives the original size again.
        flip: mirror half of the images, left to right.
        workers: processes that read; they live as long as the loader.
        pin_memory: faster copies to a GPU.

    Raises:
        OptionError: an option without meaning.
        DataError: fewer images than one batch.

    Example:
        >>> loader = training_loader([(torch.rand(3, 8, 8), 1)] * 10, batch_size=4)
        >>> loader.sampler.epoch = 1
        >>> [len(labels) for images, labels in loader]
        [4, 4]
    """
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("padding", padding, 0), ("workers", workers, 0)):
        if value < least:
            raise OptionError(f"{name} must be at least {least}, got {value}")
    if len(images) < batch_size:
        raise DataError(f"{len(images):,} training images do not fill one batch of {batch_size:,}; make the batch smaller")
    return DataLoader(
        TrainingImages(images, seed=seed, padding=padding, flip=flip),
        batch_size=batch_size,
        sampler=EpochOrder(len(images), seed=seed),
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
    )


def labelled_images(
    dataset: str, train_split: str | None, val_split: str | None, *, classes: int | None = None, **options: Any
) -> tuple[Any, Any, int]:
    """Two splits of any dataset that timm reads, to train and to test on, and their number of classes.

    Args:
        dataset: as for `image_loader`.
        train_split: name of the split to train on.
        val_split: name of the split to test on.
        classes: where the dataset does not say.
        **options: as for `image_loader`.

    Returns:
        Map-style datasets of (float image (3, H, W) in [0, 1], label), and the number of classes.

    Raises:
        DataError: a split that cannot be read, or splits with different classes.
        OptionError: unknown number of classes.
    """
    train, val = (image_loader(dataset, split=split, **options).dataset for split in (train_split, val_split))
    known = _class_indices(train)
    if known != _class_indices(val):
        raise DataError(f"splits {train_split!r} and {val_split!r} of {dataset!r} have different classes; their labels would not agree")
    if not (classes or known):
        raise OptionError(f"{dataset!r} does not say how many classes it has; pass classes= (--classes)")
    return train, val, classes or len(known)


def _class_indices(images: Any) -> dict[str, int]:
    """Classes of a dataset with their labels; empty where it does not say."""
    inner = getattr(images, "dataset", images)
    known = getattr(getattr(inner, "reader", inner), "class_to_idx", None)
    return {str(name): int(label) for name, label in (known or {}).items()}
