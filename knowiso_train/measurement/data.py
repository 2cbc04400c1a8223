"""Images of a measurement: split by index, replayed and permuted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from knowiso_train.errors import DataError, InputTypeError, OptionError
from knowiso_train.utils.batch import batch_size, check_loader, get_inputs
from knowiso_train.utils.distributed import ProcessGroup
from knowiso_train.utils.hashing import hash_unit

SPLIT_NAMES = ("fit", "select", "report")


@dataclass(frozen=True)
class IndexedBatch:
    """One batch and, for each of its images, its dataset index and its role."""

    batch: Any
    index: NDArray[np.int64]
    role: NDArray[np.int64]

    def of(self, role: str) -> NDArray[np.bool_]:
        """Mask of the images that serve this role."""
        return np.asarray(self.role == SPLIT_NAMES.index(role))


class SplitImageLoader:
    """Reads a loader in two passes, each image once: `fitting()` gives the images to fit and select on, `reporting()` those to report on.

    A `DataLoader` over a map-style dataset is read by index: in a seeded random order, batches dealt to the processes
    in turn, nothing padded,
    so every image counts once whatever the number of processes. Its own sampler decides only *which* images belong.
    Anything else is read as it comes, twice, and must give the same images both times (checked); several processes are
    taken to read different parts.

    Args:
        loader: DataLoader or any iterable of batches that can be read more than once.
        split: fractions for fit, select, report.
        seed: of the order and of the split, which is a hash of the dataset index.
        max_images: read no more than this many (over all processes).

    Raises:
        InputTypeError: an iterator, which can be read only once, or no iterable at all.
        OptionError: fractions that are negative or do not sum to 1.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        split: Sequence[float] = (0.6, 0.2, 0.2),
        seed: int = 0,
        max_images: int | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        if len(split) != 3 or min(split) < 0 or abs(sum(split) - 1) > 1e-6 or split[0] <= 0 or split[2] <= 0:
            raise OptionError(
                f"split must be three fractions (fit, select, report) that sum to 1, with fit and report above 0; got {tuple(split)}"
            )
        if max_images is not None and max_images < 1:
            raise OptionError(f"max_images must be positive or None, got {max_images}")
        check_loader(loader)
        self.loader, self.split, self.seed, self.max_images = loader, tuple(split), seed, max_images
        self.group = group or ProcessGroup()
        self._seen: dict[int, bytes] = {}
        self._count = 0
        self._batches = self._plan(loader)

    @property
    def expected(self) -> int | None:
        """Number of images over all processes, where it is known beforehand."""
        return sum(map(len, self._batches)) if self._batches is not None else self.max_images

    def fitting(self) -> Iterator[IndexedBatch]:
        """Batches with images to fit or select on."""
        return self._read(report=False)

    def reporting(self) -> Iterator[IndexedBatch]:
        """Batches with images to report on."""
        return self._read(report=True)

    def batches(self, *, report: bool) -> int | None:
        """Batches that one pass gives this process, where known."""
        return None if self._batches is None else len(self._mine(report))

    def roles(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """0 fit, 1 select, 2 report, by a seeded hash of the dataset index."""
        return np.searchsorted(np.cumsum(self.split)[:2], hash_unit(index, self.seed), side="right").astype(np.int64)

    def _plan(self, given: Iterable[Any]) -> list[list[int]] | None:
        loader: Any = getattr(given, "base_dataloader", given)  # accelerate wraps
        if not _is_plain_loader(loader) or isinstance(loader.dataset, IterableDataset):
            return None
        index = np.asarray(_members(loader), dtype=np.int64)
        if len(index) == 0:
            raise DataError("the loader's dataset is empty")
        index = index[np.argsort(hash_unit(index, self.seed, stream=6), kind="stable")][: self.max_images]
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 64
        passes: list[list[int]] = []
        for part in (index[self.roles(index) < 2], index[self.roles(index) == 2]):
            passes += [part[i : i + size].tolist() for i in range(0, len(part), size)]
        self._first_report = -(-int((self.roles(index) < 2).sum()) // size)
        return passes

    def _mine(self, report: bool) -> list[list[int]]:
        batches = self._batches or []
        chosen = batches[self._first_report :] if report else batches[: self._first_report]
        return chosen[self.group.rank :: self.group.size]

    def _read(self, report: bool) -> Iterator[IndexedBatch]:
        if self._batches is not None:
            yield from self._read_indexed(report)
        else:
            yield from self._read_stream(report)

    def _read_indexed(self, report: bool) -> Iterator[IndexedBatch]:
        base: Any = getattr(self.loader, "base_dataloader", self.loader)
        mine = self._mine(report)
        loader: DataLoader[Any] = DataLoader(
            base.dataset,
            batch_sampler=mine,
            num_workers=base.num_workers,
            collate_fn=base.collate_fn,
            pin_memory=base.pin_memory,
            worker_init_fn=base.worker_init_fn,
            multiprocessing_context=base.multiprocessing_context,
            generator=torch.Generator().manual_seed(self.seed),
        )
        for members, batch in zip(mine, loader, strict=True):
            index = np.asarray(members, dtype=np.int64)
            yield IndexedBatch(batch, index, self.roles(index))

    def _read_stream(self, report: bool) -> Iterator[IndexedBatch]:
        limit = None if self.max_images is None else -(-self.max_images // self.group.size)
        count = 0
        for batch in self.loader:
            if limit is not None and count >= limit:
                break
            n = batch_size(batch)
            index = (np.arange(count, count + n) * self.group.size + self.group.rank).astype(np.int64)
            role = self.roles(index)
            if limit is not None and count + n > limit:
                role[limit - count :] = -1  # beyond max_images: serves nothing
            count += n
            self._check_same(batch, index, role, report)
            if ((role == 2) if report else (role >= 0) & (role < 2)).any():
                yield IndexedBatch(batch, index, role)
        if not report:
            self._count = count
        elif count != self._count:
            raise DataError(
                f"the loader gave {self._count} images at first and {count} when it was read again; pass a DataLoader or a list of batches"
            )

    def _check_same(self, batch: Any, index: NDArray[np.int64], role: NDArray[np.int64], report: bool) -> None:
        images = _first_tensor(batch)
        if images is None:
            return
        for i in np.flatnonzero(role == 2):
            key, print_ = int(index[i]), _fingerprint(images[int(i)])
            if not report:
                self._seen[key] = print_
            elif self._seen.get(key) != print_:
                raise DataError(
                    f"the loader gave another image {key} when it was read a second time (it shuffles or augments), so images to "
                    "report on would mix with those fitted. Pass a torch DataLoader over a map-style dataset (read by index), or one "
                    "that gives the same images in the same order each time."
                )


def _is_plain_loader(loader: Any) -> bool:
    """Whether the loader can be read by index: batches are made from single items (`batch_size=None` takes what the dataset gives)."""
    own = isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
    return own and loader.batch_sampler is not None and hasattr(loader.dataset, "__len__")


def _members(loader: DataLoader[Any]) -> Iterable[int]:
    """Dataset indices that the loader's sampler would give, each once."""
    sampler: Any = loader.sampler
    batch_sampler: Any = loader.batch_sampler
    while hasattr(batch_sampler, "batch_sampler"):  # accelerate's BatchSamplerShard wraps the whole one
        batch_sampler = batch_sampler.batch_sampler
        sampler = getattr(batch_sampler, "sampler", sampler)
    size = len(loader.dataset)  # type: ignore[arg-type]
    if isinstance(sampler, SequentialSampler | DistributedSampler) or (
        isinstance(sampler, RandomSampler) and sampler.num_samples >= size
    ):
        own_batches = batch_sampler is not None and type(batch_sampler) is not torch.utils.data.BatchSampler
        if not own_batches:
            return range(size)
    drawn = (
        sampler
        if batch_sampler is None or type(batch_sampler) is torch.utils.data.BatchSampler
        else (i for batch in batch_sampler for i in batch)
    )
    return sorted({int(i) for i in drawn})


def _first_tensor(batch: Any) -> Tensor | None:
    try:
        return get_inputs(batch)
    except InputTypeError:
        values = batch.values() if hasattr(batch, "values") else batch
        return next((value for value in values if isinstance(value, Tensor)), None)


def _fingerprint(image: Tensor) -> bytes:
    flat = image.detach().cpu().contiguous()
    return hashlib.blake2b(
        flat.view(torch.uint8).numpy().tobytes() if flat.ndim else repr(flat.item()).encode(), digest_size=8
    ).digest()


class PermutedTargets:
    """Pairs every image with the target of another one of the same role: the next in its batch, so that the pairing does not depend on processes.

    An image that is alone in its batch takes the target that was seen last; only a role with a single image at all
    keeps its own.

    Example:
        >>> y = torch.arange(4.0).view(4, 1, 1, 1)
        >>> PermutedTargets()(y, torch.tensor([0, 1, 0, 0])).flatten().tolist()
        [2.0, 1.0, 3.0, 0.0]
    """

    def __init__(self) -> None:
        self._last: dict[int, Tensor] = {}

    def __call__(self, y: Tensor, role: Tensor) -> Tensor:
        """(N, C, H, W) targets and (N,) roles → targets of other images."""
        result = y.clone()
        for value in sorted(set(role.tolist())):
            members = (role == value).nonzero().flatten().to(y.device)
            if len(members) > 1:
                result[members] = y[members.roll(-1)]
            elif value in self._last:
                result[members] = self._last[value].to(y)
            self._last[value] = y[members[-1:]].clone()
        return result
