"""Images of a measurement: split by index, read in two passes, and permuted targets."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from knowiso_train.errors import DataError, InputTypeError, ShapeError
from knowiso_train.features.padding import ValidPositions, find_padding
from knowiso_train.features.state import preserve_random_state
from knowiso_train.measurement.config import Mask
from knowiso_train.utils.batch import batch_size, check_loader, get_inputs
from knowiso_train.utils.distributed import ProcessGroup
from knowiso_train.utils.hashing import Stream, hash_unit, split_by_hash

SPLIT_NAMES = ("fit", "select", "report")
REPORT = SPLIT_NAMES.index("report")
UNUSED = -1  # part of images beyond max_images
DEFAULT_BATCH_SIZE = 64  # if the loader's batch sampler has no batch_size


@dataclass(frozen=True)
class IndexedBatch:
    """One batch with the dataset index and the part of the split of each image.

    Attributes:
        batch: Batch of the loader.
        index: (N,) dataset indices.
        part: (N,) positions in `SPLIT_NAMES`, or `UNUSED`.
        valid: Positions that are not padding. None: all.
    """

    batch: Any
    index: NDArray[np.int64]
    part: NDArray[np.int64]
    valid: ValidPositions | None = None

    def with_mask(self, mask: Mask | None) -> IndexedBatch:
        """Return the batch with its valid positions; images without any are not used.

        Args:
            mask: Option of `measure`.

        Raises:
            InputTypeError: A function that does not return a boolean (N, L) or (N, H, W).
        """
        valid = _valid_positions(self.batch, mask, len(self.index))
        if valid is None:
            return self
        return replace(self, valid=valid, part=np.where(valid.mask.any(1).cpu().numpy(), self.part, UNUSED))

    def mask(self, name: str) -> NDArray[np.bool_]:
        """Return the (N,) mask of the images of a part."""
        return np.asarray(self.part == SPLIT_NAMES.index(name))


class SplitImageLoader:
    """Two passes over the images of a loader: `fit_batches()` to fit and select on, `report_batches()` to report on.

    A `DataLoader` over a map-style dataset is read by index in a seeded random order. Its batches are dealt to the
    processes in turn without padding, so that each image counts once. Its sampler determines only the set of images.
    A sampler that draws is read with the seed. Any other iterable is read twice in its own order. It must yield the
    same images in both passes, and other images in each process; both are checked.

    Args:
        loader: DataLoader or re-iterable of batches.
        split: Fractions for fit, select and report; checked by `MeasureConfig`.
        seed: Seed of the reading order and of the split, which hashes the dataset index.
        max_images: Maximum number of images over all processes. None: all.
        group: Processes that share the images. None: the default group.

    Raises:
        InputTypeError: The loader is an iterator, which can be read only once, or not iterable.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        split: Sequence[float] = (0.6, 0.2, 0.2),
        seed: int = 0,
        max_images: int | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        check_loader(loader)
        self.loader, self.split, self.seed, self.max_images = loader, tuple(split), seed, max_images
        self.group = group or ProcessGroup()
        self._fingerprints: dict[int, bytes] = {}
        self._first_images: list[bytes] = []
        self._first_pass_images = 0
        # Index batches of the fitting and of the report pass; None for a stream
        with preserve_random_state():  # a sampler may draw random numbers
            _seed_augmentation((self.seed % 2**64,))
            self._index_batches = self._plan(loader)

    @property
    def expected(self) -> int | None:
        """Number of images over all processes. None: unknown."""
        if self._index_batches is None:
            return self.max_images
        return sum(len(batch) for batches in self._index_batches for batch in batches)

    def fit_batches(self) -> Iterator[IndexedBatch]:
        """Yield the batches with images to fit or select on."""
        return self._read(report=False)

    def report_batches(self) -> Iterator[IndexedBatch]:
        """Yield the batches with images to report on."""
        return self._read(report=True)

    def num_batches(self, *, report: bool) -> int | None:
        """Return the number of batches of one pass in this process, or None if it is unknown."""
        return None if self._index_batches is None else len(self._own_batches(report))

    def check_distinct(self) -> None:
        """Check after the first pass that the processes read other images of a stream; all of them call this.

        Raises:
            DataError: Half of the first batch of a process was also the first batch of another one.
        """
        if self._index_batches is not None or self.group.size == 1:
            return
        first_images = enumerate(map(set, self.group.gather(self._first_images)))
        for (other, others), (rank, images) in combinations(first_images, 2):
            if images & others and 2 * len(images & others) >= len(images):
                raise DataError(
                    f"processes {other} and {rank} read the same images, so that images of the report would be among "
                    "the fitted ones. Divide the stream over the processes, or pass a DataLoader over a map-style "
                    "dataset, which is divided here"
                )

    def parts(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the part of each dataset index: 0 fit, 1 select, 2 report."""
        return split_by_hash(index, self.split, self.seed)

    def _plan(self, iterable: Iterable[Any]) -> tuple[list[list[int]], list[list[int]]] | None:
        loader = _base_loader(iterable)
        if not _reads_single_items(loader) or isinstance(loader.dataset, IterableDataset):
            return None
        index = np.asarray(_dataset_indices(loader), dtype=np.int64)
        if len(index) == 0:
            raise DataError("the loader's dataset is empty")
        order = np.argsort(hash_unit(index, self.seed, Stream.SUBSET), kind="stable")
        index = index[order][: self.max_images]
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or DEFAULT_BATCH_SIZE
        report = self.parts(index) == REPORT
        return _chunks(index[~report], size), _chunks(index[report], size)

    def _own_batches(self, report: bool) -> list[list[int]]:
        batches = self._index_batches or ([], [])
        return batches[report][self.group.rank :: self.group.size]

    def _read(self, report: bool) -> Iterator[IndexedBatch]:
        return self._read_stream(report) if self._index_batches is None else self._read_indexed(report)

    def _read_indexed(self, report: bool) -> Iterator[IndexedBatch]:
        base = _base_loader(self.loader)
        batches = self._own_batches(report)
        loader: DataLoader[Any] = DataLoader(
            base.dataset,
            batch_sampler=batches,
            num_workers=base.num_workers,
            collate_fn=base.collate_fn,
            pin_memory=base.pin_memory,
            worker_init_fn=base.worker_init_fn,
            multiprocessing_context=base.multiprocessing_context,
            generator=torch.Generator().manual_seed(self.seed),
        )
        iterator = iter(loader)
        for number, indices in enumerate(batches):
            # Augmentation in this process gives equal images in every pass, whatever is drawn between the batches
            with preserve_random_state():
                _seed_augmentation((self.seed % 2**64, report, number, self.group.rank))
                batch = next(iterator)
            index = np.asarray(indices, dtype=np.int64)
            yield IndexedBatch(batch, index, self.parts(index))

    def _read_stream(self, report: bool) -> Iterator[IndexedBatch]:
        limit = None if self.max_images is None else -(-self.max_images // self.group.size)
        count = 0
        for batch in self.loader:
            if limit is not None and count >= limit:
                break
            size = batch_size(batch)
            # Process r of P counts its images r, r + P, r + 2P, …: distinct over the processes
            index = (np.arange(count, count + size) * self.group.size + self.group.rank).astype(np.int64)
            part = self.parts(index)
            if limit is not None:
                part[limit - count :] = UNUSED
            if count == 0 and not report and self.group.size > 1 and (images := _first_tensor(batch)) is not None:
                self._first_images = [_fingerprint(image) for image in images]
            count += size
            self._check_repeatable(batch, index, part, report)
            if ((part == REPORT) if report else (part >= 0) & (part < REPORT)).any():
                yield IndexedBatch(batch, index, part)
        if not report:
            self._first_pass_images = count
        elif count != self._first_pass_images:
            raise DataError(
                f"the loader gave {self._first_pass_images} images at first and {count} when it was read again; "
                "pass a DataLoader or a list of batches"
            )

    def _check_repeatable(self, batch: Any, index: NDArray[np.int64], part: NDArray[np.int64], report: bool) -> None:
        """Check by fingerprints that the report images of a stream are the same in both passes."""
        images = _first_tensor(batch)
        if images is None:
            return
        for i in np.flatnonzero(part == REPORT):
            key, fingerprint = int(index[i]), _fingerprint(images[int(i)])
            if not report:
                self._fingerprints[key] = fingerprint
            elif self._fingerprints.get(key) != fingerprint:
                raise DataError(
                    f"the loader gave another image {key} when it was read a second time (it shuffles or augments), so "
                    "report images would be among the fitted ones. Pass a DataLoader over a map-style dataset, or "
                    "an iterable with the same images in the same order each time."
                )


def _valid_positions(batch: Any, mask: Mask | None, num_images: int) -> ValidPositions | None:
    if mask is None or mask == "auto":
        values = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        return find_padding(values, num_images) if mask and isinstance(values, Mapping) else None
    valid = mask(batch)
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool or valid.ndim not in (2, 3):
        content = f"{valid.dtype} of shape {tuple(valid.shape)}" if isinstance(valid, Tensor) else type(valid).__name__
        raise InputTypeError(f"mask= must return a boolean tensor (N, L) or (N, H, W), True where valid; got {content}")
    if len(valid) != num_images:
        raise ShapeError(f"mask= must return a row for each of the {num_images} images, got {tuple(valid.shape)}")
    return ValidPositions("mask=", valid.flatten(1))


def _base_loader(loader: Any) -> Any:
    """Return the DataLoader inside accelerate's wrapper."""
    return getattr(loader, "base_dataloader", loader)


def _reads_single_items(loader: Any) -> TypeGuard[DataLoader[Any]]:
    """Return whether a loader makes its batches from single items of a sized dataset (not with `batch_size=None`)."""
    standard = isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
    return standard and loader.batch_sampler is not None and hasattr(loader.dataset, "__len__")


def _dataset_indices(loader: DataLoader[Any]) -> Iterable[int]:
    """Return the dataset indices of the loader's sampler, each once; its own generator is read from a fixed seed."""
    sampler: Any = loader.sampler
    batch_sampler: Any = loader.batch_sampler
    while hasattr(batch_sampler, "batch_sampler"):  # accelerate's BatchSamplerShard
        batch_sampler = batch_sampler.batch_sampler
        sampler = getattr(batch_sampler, "sampler", sampler)
    size = len(loader.dataset)  # type: ignore[arg-type]
    standard_batches = batch_sampler is None or type(batch_sampler) is BatchSampler
    covers_dataset = isinstance(sampler, SequentialSampler | DistributedSampler) or (
        isinstance(sampler, RandomSampler) and sampler.num_samples >= size
    )
    if covers_dataset and standard_batches:
        return range(size)
    parts = [getattr(part, "generator", None) for part in (sampler, batch_sampler)]
    generators = [generator for generator in parts if isinstance(generator, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(0)
        indices = sampler if standard_batches else (i for batch in batch_sampler for i in batch)
        return sorted({int(i) for i in indices})
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _chunks(index: NDArray[np.int64], size: int) -> list[list[int]]:
    return [index[start : start + size].tolist() for start in range(0, len(index), size)]


def _first_tensor(batch: Any) -> Tensor | None:
    try:
        return get_inputs(batch)
    except InputTypeError:
        values = batch.values() if hasattr(batch, "values") else batch
        return next((value for value in values if isinstance(value, Tensor)), None)


def _fingerprint(image: Tensor) -> bytes:
    if image.is_meta:
        raise InputTypeError("the loader yields images on the meta device, which have no data")
    flat = image.detach().cpu().contiguous()
    content = flat.view(torch.uint8).numpy().tobytes() if flat.ndim else repr(flat.item()).encode()
    return hashlib.blake2b(content, digest_size=8).digest()


class PermutedTargets:
    """Permutation of targets between the images of one part, for the noise floor.

    Each image is paired with the target of the next image of its part in the batch, so that the pairing is independent
    of the processes. An image that is alone in its batch is paired with the last target of its part in earlier batches.
    The very first image, if alone, keeps its own target.

    Examples:
        >>> y = torch.arange(4.0).view(4, 1, 1, 1)
        >>> PermutedTargets()(y, torch.tensor([0, 1, 0, 0])).flatten().tolist()
        [2.0, 1.0, 3.0, 0.0]
    """

    def __init__(self) -> None:
        self._last_target: dict[int, Tensor] = {}

    def __call__(self, y: Tensor, part: Tensor) -> Tensor:
        """Return the targets (N, C, H, W) permuted within the parts (N,)."""
        permuted = y.clone()
        for value in sorted(set(part.tolist())):
            images = (part == value).nonzero().flatten().to(y.device)
            if len(images) > 1:
                permuted[images] = y[images.roll(-1)]
            elif value in self._last_target:
                permuted[images] = self._last_target[value].to(y)
            self._last_target[value] = y[images[-1:]].clone()
        return permuted


def _seed_augmentation(key: tuple[int, ...]) -> None:
    """Seed the generators of Python, NumPy and torch on the CPU."""
    first, second, third = map(int, np.random.SeedSequence(key).generate_state(3))
    random.seed(first)
    np.random.seed(second)  # noqa: NPY002
    torch.default_generator.manual_seed(third)
