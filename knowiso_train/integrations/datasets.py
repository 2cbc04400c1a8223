"""Any dataset that timm reads, as a loader of plain images: floats in [0, 1], one size, nothing normalised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from knowiso_train.errors import DataError, KnowisoError, MissingDependencyError, OptionError

STREAMS = ("hfids", "tfds", "wds")
SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"), ("test", "testing"))
DEFAULT_SPLITS = ("validation", "val", "valid", "test", "train")  # held-out images first


class PlainImages(Dataset[tuple[Tensor, int]]):
    """Images of another dataset: short side resized, centre cropped, RGB, float in [0, 1]; with integer labels (-1 where there is none).

    Raises:
        DataError: an image that cannot be read; the message names it. (timm would quietly take the next one.)
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
            raise DataError(f"image {index} ({self._name(index)}) cannot be read: {error}. Remove or repair it.") from error

    def _name(self, index: int) -> str:
        try:
            return str(self.reader.filename(index))  # type: ignore[union-attr]
        except Exception:  # a name is a courtesy of the reader
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
    """A loader over any map-style dataset that timm reads.

    Args:
        dataset: a folder or tar of images, "hfds/NAME" (Hugging Face, or a local folder of parquet files), or "torch/NAME" (torchvision).
        split: name of the split. None takes a folder whole, the first of validation, val, valid, test, train that a Hugging Face dataset has,
            and the evaluation split of a torchvision one. For a folder it is the name of a subfolder (train, validation, …, or a synonym).
        image_size: the short side is resized to this, then the centre is cropped.
        batch_size: images a batch.
        workers: processes that decode images.
        root: folder of "torch/…" datasets, cache folder of "hfds/…".
        download: let torchvision download what is missing.
        pin_memory: faster copies to a GPU.
        **options: passed on to `timm.data.create_dataset` (`input_key=`, `target_key=`, …).

    Returns:
        A loader of (float images (N, 3, image_size, image_size) in [0, 1], integer labels), in the dataset's order.

    Raises:
        DataError: the dataset or split cannot be found or read.
        MissingDependencyError: it needs the extra `data`.
        OptionError: an option without meaning, or a streaming dataset.
    """
    for name, value, least in (("image_size", image_size, 1), ("batch_size", batch_size, 1), ("workers", workers, 0)):
        if value < least:
            raise OptionError(f"{name} must be at least {least}, got {value}")
    found = _create(dataset, split, None if root is None else str(root), download, options)
    if not len(found):
        raise DataError(f"dataset {dataset!r}, split {split!r}, is empty")
    return DataLoader(PlainImages(found, image_size), batch_size=batch_size, num_workers=workers, pin_memory=pin_memory)


def _create(dataset: str, split: str | None, root: str | None, download: bool, options: dict[str, Any]) -> Any:
    kind = dataset.partition("/")[0].lower() if "/" in dataset else ""
    if kind in STREAMS:
        raise OptionError(f"{dataset!r} is a stream and cannot be read by index; use a folder, hfds/NAME or torch/NAME")
    if kind == "hfds":
        _need_datasets()
    from timm.data import create_dataset

    try:
        if kind == "hfds":
            return create_dataset(dataset, root=root, split=split or _first_split(dataset), **options)
        if kind == "torch":
            if root is None:
                raise OptionError(f"{dataset!r} needs root= (--data-dir): the folder where torchvision keeps its datasets")
            return create_dataset(dataset, root=root, split=split or "validation", download=download, **options)
        return create_dataset("", root=str(_folder(dataset, split)), search_split=False, **options)
    except (KnowisoError, TypeError):
        raise
    except Exception as error:  # whatever the readers, torchvision, datasets and the hub raise; some of it by assert
        reason = str(error).strip() or type(error).__name__
        raise DataError(
            f"dataset {dataset!r}, split {split or 'by default'!r}, cannot be read: {reason}. "
            "Expected a folder of images, hfds/NAME or hfds/FOLDER, or torch/NAME; offline, give a local copy and set HF_HUB_OFFLINE=1."
        ) from error


def _need_datasets() -> None:
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError('hfds/… needs the package datasets, which is not installed; pip install "knowiso_train[data]"') from error


def _first_split(dataset: str) -> str:
    from datasets import get_dataset_split_names

    there: list[str] = get_dataset_split_names(dataset.partition("/")[2])
    return next((name for name in DEFAULT_SPLITS if name in there), there[0])


def _folder(dataset: str, split: str | None) -> Path:
    folder = Path(dataset).expanduser()
    if not folder.exists():
        raise DataError(f"no folder {dataset!r}; expected a folder of images, hfds/NAME (Hugging Face) or torch/NAME (torchvision)")
    if split is None or folder.is_file():
        return folder
    names = next((group for group in SYNONYMS if split in group), (split,))
    found: Path | None = next((folder / name for name in (split, *names) if (folder / name).is_dir()), None)
    if found is None:
        there = sorted(path.name for path in folder.iterdir() if path.is_dir())[:12]
        raise DataError(f"{dataset!r} has no split {split!r}: its subfolders are {there or 'none'}. Leave the split out to read all of it.")
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
