"""The images that pruning looks at: unlabelled, few, held in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import DataError, OptionError, ShapeError
from knowiso_train.features import batch_size, check_loader, inputs_of, select, to_device

Forward = Callable[[nn.Module, Any], Any]


def check_counts(least: int = 1, **counts: Any) -> None:
    """Raises:
    OptionError: something that is no integer of at least that much.

    Example:
        >>> check_counts(rows=20, max_images=64)
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
            raise OptionError(f"{name} must be an integer >= {least}, got {value!r}")


class Calibration:
    """The first images of a loader, and how a network is called on them. Labels may be there; they are never read.

    Args:
        loader: batches of images, see `knowiso_train.features.inputs_of`.
        max_images: to take.
        device: for the images; None leaves them.
        forward: `forward(model, batch)` for networks that need more than images.

    Raises:
        DataError: a loader without images.
        InputTypeError: no loader.
        OptionError: fewer than one image.

    Example:
        >>> images = Calibration([torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)], max_images=5)
        >>> images.count, [len(batch) for batch in images]
        (5, [3, 2])
    """

    def __init__(self, loader: Iterable[Any], max_images: int = 1024, device: Any = None, forward: Forward | None = None) -> None:
        check_counts(max_images=max_images)
        if torch.is_inference_mode_enabled():
            raise OptionError("torch.inference_mode() is on, and what is made in it can be neither traced nor trained; call this outside of it")
        check_loader(loader, again=False)
        self.forward = forward
        self.batches: list[Any] = []
        self.count = 0
        for batch in loader:
            batch = inputs_of(batch) if forward is None else batch
            size = min(batch_size(batch), max_images - self.count)
            batch = batch if size == batch_size(batch) else select(batch, torch.arange(size))
            self.batches.append(batch if device is None else to_device(batch, device))
            self.count += size
            if self.count >= max_images:
                break
        if not self.count:
            raise DataError("the loader gave no images; some hundred are needed, labels are not")

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def run(self, model: nn.Module, batch: Any) -> Any:
        """Call a network on a batch."""
        return self.forward(model, batch) if self.forward is not None else model(inputs_of(batch))

    def some(self, images: int) -> Any:
        """The first images, as one batch."""
        return _joined(self._between(0, images).batches)

    def parted(self, share: float, most: int) -> tuple[Calibration, Calibration]:
        """The first images, and the last ones: at most this share of them and so many; all of them twice where they are too few to be parted.

        Example:
            >>> images = Calibration([torch.zeros(6, 1), torch.zeros(4, 1)])
            >>> [[part.count for part in images.parted(share, 3)] for share in (0.25, 0.5, 0.05)]
            [[8, 2], [7, 3], [10, 10]]
        """
        last = min(most, int(share * self.count))
        if not last:
            return self, self
        return self._between(0, self.count - last), self._between(self.count - last, self.count)

    def _between(self, start: int, stop: int) -> Calibration:
        batches, seen = [], 0
        for batch in self.batches:
            size = batch_size(batch)
            first, last = max(0, start - seen), min(size, stop - seen)
            if first < last:
                batches.append(batch if last - first == size else select(batch, torch.arange(first, last)))
            seen += size
        return Calibration(batches, stop - start, None, self.forward)

    def pieces(self, size: int) -> Iterator[Any]:
        """Every image, in batches of at most this size.

        Example:
            >>> [len(batch) for batch in Calibration([torch.zeros(3, 1), torch.zeros(4, 1)]).pieces(5)]
            [5, 2]
        """
        for start in range(0, self.count, size):
            yield _joined(self._between(start, min(start + size, self.count)).batches)

    def all(self) -> Any:
        """Every image, as one batch."""
        return _joined(self.batches)


def _joined(batches: list[Any]) -> Any:
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Tensor):
        if not first.ndim:
            return first
        sizes = sorted({tuple(batch.shape[1:]) for batch in batches})
        if len(sizes) > 1:
            raise ShapeError(f"expected images of one size, got {' and '.join(map(str, sizes))}; resize or crop them in the loader")
        return torch.cat(batches)
    if isinstance(first, Mapping):
        return {key: _joined([batch[key] for batch in batches]) for key in first}
    if isinstance(first, (tuple, list)):
        return [_joined(list(items)) for items in zip(*batches, strict=True)]
    return first
