"""Image datasets and loaders for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from knowiso_train.errors import DataError, KnowisoError, MissingDependencyError, OptionError
from knowiso_train.utils.memory import check_images_fit

MAX_WORKERS = 1024  # processes; more than any machine uses, and less than stops one
PREFETCHED_BATCHES = 2  # of each worker, the default of torch
STREAMING_SCHEMES = ("hfids", "tfds", "wds")
SPLIT_SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"), ("test", "testing"))
# Held-out images first.
DEFAULT_SPLITS = ("validation", "val", "valid", "test", "train")


class PlainImages(Dataset[tuple[Tensor, int]]):
    """Dataset of resized, center-cropped float RGB images in [0, 1] with integer labels, -1 for missing labels.

    Args:
        dataset: Map-style dataset of PIL images, or one of timm's.
        image_size: Side of the square images.

    Raises:
        DataError: An image that cannot be read; the message names it. timm would silently return the next one.
    """

    def __init__(self, dataset: Any, image_size: int) -> None:
        self.dataset, self.image_size = dataset, image_size
        self.reader = getattr(dataset, "reader", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._opened(index)
        return _to_tensor(_squared(image, self.image_size)), -1 if label is None else int(label)

    def _opened(self, index: int) -> tuple[Image.Image, Any]:
        if self.reader is None:
            image, label = self.dataset[index]
            return image.convert("RGB"), label
        try:
            stream, label, *_ = self.reader[index]
            with stream, Image.open(stream) as image:
                return image.convert("RGB"), label
        except OSError as error:
            raise DataError(
                f"image {index} ({self._name(index)}) cannot be read: {error}. Remove or repair it."
            ) from error

    def _name(self, index: int) -> str:
        try:
            return str(self.reader.filename(index))  # type: ignore[union-attr]
        # Readers need not implement names.
        except Exception:
            return "no name"


def image_loader(
    dataset: str,
    *,
    split: str | None = None,
    image_size: int = 224,
    batch_size: int = 64,
    workers: int = 2,
    root: str | Path | None = None,
    download: bool = False,
    pin_memory: bool = False,
    **options: Any,
) -> DataLoader[tuple[Tensor, int]]:
    """Create a loader for a map-style dataset of images that timm can read.

    Args:
        dataset: Folder or tar of images, "hfds/NAME" (Hugging Face, or a local folder of parquet files), or
            "torch/NAME" (torchvision).
        split: Name of the split; for a folder that of a subfolder (train, validation, …, or a synonym). None: the whole
            folder; the first of validation, val, valid, test, train of a Hugging Face dataset; the evaluation split of
            a torchvision dataset.
        image_size: Side of the images: the short side is resized to it, then the center is cropped.
        batch_size: Images per batch.
        workers: Number of processes that decode images.
        root: Folder of "torch/…" datasets, cache folder of "hfds/…".
        download: Let torchvision download missing files.
        pin_memory: Use pinned memory for faster copies to a GPU.
        **options: Arguments of `timm.data.create_dataset` (`input_key=`, `target_key=`, …).

    Returns:
        Loader of (float images (N, 3, image_size, image_size) in [0, 1], integer labels), in the dataset's order.

    Raises:
        DataError: A dataset or split that cannot be found or read.
        CapacityError: Batches, those that the workers prepare included, that exceed the free memory.
        MissingDependencyError: The extra `data` is needed and not installed.
        OptionError: An invalid option, or a streaming dataset.
    """
    for name, value, least in (("image_size", image_size, 1), ("batch_size", batch_size, 1)):
        if value < least:
            raise OptionError(f"{name} must be at least {least}, got {value}")
    _check_workers(workers)
    found = _create(dataset, split, None if root is None else str(root), download, options)
    if not len(found):
        raise DataError(f"dataset {dataset!r}, split {split!r}, is empty")
    check_images_fit(image_size, min(len(found), batch_size * (1 + PREFETCHED_BATCHES * workers)))
    return DataLoader(PlainImages(found, image_size), batch_size=batch_size, num_workers=workers, pin_memory=pin_memory)


def _check_workers(workers: int) -> None:
    if not 0 <= workers <= MAX_WORKERS:
        raise OptionError(f"workers must be at least 0 and at most {MAX_WORKERS}, got {workers:,}")


def _create(dataset: str, split: str | None, root: str | None, download: bool, options: dict[str, Any]) -> Any:
    kind = dataset.partition("/")[0].lower() if "/" in dataset else ""
    if kind in STREAMING_SCHEMES:
        raise OptionError(f"{dataset!r} is a stream and cannot be read by index; use a folder, hfds/NAME or torch/NAME")
    if kind == "hfds":
        _need_datasets()
    from timm.data import create_dataset

    try:
        if kind == "hfds":
            return create_dataset(dataset, root=root, split=split or _first_split(dataset), **options)
        if kind == "torch":
            if root is None:
                raise OptionError(
                    f"{dataset!r} needs root= (--data-dir): the folder where torchvision keeps its datasets"
                )
            return create_dataset(dataset, root=root, split=split or "validation", download=download, **options)
        return create_dataset("", root=str(_folder(dataset, split)), search_split=False, **options)
    except (KnowisoError, TypeError):
        raise
    # The readers, torchvision, datasets and the hub have no common base error; some use assert.
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise DataError(
            f"dataset {dataset!r}, split {split or 'by default'!r}, cannot be read: {reason}. "
            "Expected a folder of images, hfds/NAME or hfds/FOLDER, or torch/NAME; "
            "offline, give a local copy and set HF_HUB_OFFLINE=1."
        ) from error


def _need_datasets() -> None:
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            'hfds/… needs the package datasets, which is not installed; pip install "knowiso_train[data]"'
        ) from error


def _first_split(dataset: str) -> str:
    from datasets import get_dataset_split_names

    there: list[str] = get_dataset_split_names(dataset.partition("/")[2])
    return next((name for name in DEFAULT_SPLITS if name in there), there[0])


def _folder(dataset: str, split: str | None) -> Path:
    folder = Path(dataset).expanduser()
    if not folder.exists():
        raise DataError(
            f"no folder {dataset!r}; expected a folder of images, hfds/NAME (Hugging Face) or torch/NAME (torchvision)"
        )
    if split is None or folder.is_file():
        return folder
    names = next((group for group in SPLIT_SYNONYMS if split in group), (split,))
    found: Path | None = next((folder / name for name in (split, *names) if (folder / name).is_dir()), None)
    if found is None:
        there = sorted(path.name for path in folder.iterdir() if path.is_dir())[:12]
        raise DataError(
            f"{dataset!r} has no split {split!r}: its subfolders are {there or 'none'}. "
            "Leave the split out to read all of it."
        )
    return found


def _squared(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    scale = size / min(width, height)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    if (wide, high) != (width, height):
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - size) // 2, (high - size) // 2
    return image.crop((left, top, left + size, top + size))


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255


class TrainingImages(Dataset[tuple[Tensor, int]]):
    """Dataset that augments the images of another dataset.

    Keys are `epoch * len + index`, so that the augmentation depends on the epoch without a message to the workers.

    Args:
        images: Map-style dataset of (float image (C, H, W), integer label).
        seed: Seed of the augmentation.
        padding: Pixels of black added to each side before a random crop to the original size.
        flip: Mirror half of the images horizontally.

    Raises:
        DataError: An image without a label.

    Examples:
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
    """Sampler of one permutation per epoch, as keys of `TrainingImages`; set `.epoch` before each pass.

    It is an attribute because accelerate calls a `set_epoch` method with its own count, which restarts from 0 after a
    resumed run.

    Examples:
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
    images: Any,
    *,
    batch_size: int,
    seed: int = 0,
    padding: int = 0,
    flip: bool = False,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[tuple[Tensor, int]]:
    """Create a loader of shuffled, augmented batches for the epoch in `loader.sampler.epoch`.

    Args:
        images: Map-style dataset of (float image (C, H, W), integer label), such as that of `image_loader`.
        batch_size: Images per batch. An incomplete last batch is dropped.
        seed: Seed of order and augmentation.
        padding: Pixels added to each side before a random crop to the original size.
        flip: Mirror half of the images horizontally.
        workers: Number of processes that read images; they live as long as the loader.
        pin_memory: Use pinned memory for faster copies to a GPU.

    Raises:
        OptionError: An invalid option.
        DataError: Fewer images than one batch.

    Examples:
        >>> loader = training_loader([(torch.rand(3, 8, 8), 1)] * 10, batch_size=4)
        >>> loader.sampler.epoch = 1
        >>> [len(labels) for images, labels in loader]
        [4, 4]
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("padding", padding, 0),
    ):
        if value < least:
            raise OptionError(f"{name} must be at least {least}, got {value}")
    _check_workers(workers)
    if len(images) < batch_size:
        raise DataError(
            f"{len(images):,} training images do not fill one batch of {batch_size:,}; make the batch smaller"
        )
    return DataLoader(
        TrainingImages(images, seed=seed, padding=padding, flip=flip),
        batch_size=batch_size,
        sampler=EpochOrder(len(images), seed=seed),
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
    )


def labeled_images(
    dataset: str, train_split: str | None, val_split: str | None, *, classes: int | None = None, **options: Any
) -> tuple[Any, Any, int]:
    """Return the training split and the test split of a dataset, and their number of classes.

    Args:
        dataset: Dataset as for `image_loader`.
        train_split: Name of the training split.
        val_split: Name of the test split.
        classes: Number of classes. None: that of the dataset.
        **options: Options of `image_loader`.

    Returns:
        Map-style datasets of (float image (3, H, W) in [0, 1], label), and the number of classes.

    Raises:
        DataError: A split that cannot be read, or splits with different classes.
        OptionError: A dataset without a known number of classes, and no `classes`.
    """
    # Of these loaders only the datasets are used: one image at a time
    options = {"batch_size": 1, "workers": 0} | options
    train, val = (image_loader(dataset, split=split, **options).dataset for split in (train_split, val_split))
    known = _class_indices(train)
    if known != _class_indices(val):
        raise DataError(
            f"splits {train_split!r} and {val_split!r} of {dataset!r} have different classes; "
            "their labels would not agree"
        )
    if not (classes or known):
        raise OptionError(f"{dataset!r} does not say how many classes it has; pass classes= (--classes)")
    return train, val, classes or len(known)


def class_names(dataset: Any) -> tuple[str, ...]:
    """Return the name of each class of a dataset, in the order of the labels; empty if the dataset does not list them.

    Args:
        dataset: Dataset of `image_loader` or `labeled_images`.

    Examples:
        >>> from types import SimpleNamespace
        >>> class_names(SimpleNamespace(class_to_idx={"dog": 1, "cat": 0}))
        ('cat', 'dog')
    """
    indices = _class_indices(dataset)
    names = sorted(indices, key=indices.__getitem__)
    return tuple(names) if [indices[name] for name in names] == list(range(len(names))) else ()


def _class_indices(images: Any) -> dict[str, int]:
    """Return the label of each class; empty if the dataset does not list them."""
    inner = getattr(images, "dataset", images)
    known = getattr(getattr(inner, "reader", inner), "class_to_idx", None)
    return {str(name): int(label) for name, label in (known or {}).items()}
