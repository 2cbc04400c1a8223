"""Calibration images of pruning, and the function that runs a model on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from numbers import Integral
from typing import Any

import torch

from knowiso_train.errors import DataError, OptionError
from knowiso_train.features.calls import call_model
from knowiso_train.features.state import preserve_random_state
from knowiso_train.pruning._tracing import Forward
from knowiso_train.utils.batch import batch_size, check_loader, concatenate_batches, get_inputs, index_batch, to_device
from knowiso_train.utils.validation import checked_value


def check_counts(least: int = 1, **counts: Any) -> None:
    """Check that options are integers of at least `least`.

    Raises:
        OptionError: Another value.

    Examples:
        >>> check_counts(rows=20, max_images=64)
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
            raise OptionError(f"{name} must be an integer >= {least}, got {value!r}")


class Calibration:
    """First images of a loader, held in memory, and the function that runs a model on them. Labels are never read.

    Args:
        loader: Batches of images, see `knowiso_train.features.inputs_of`.
        max_images: Maximum number of images.
        device: Device to move the images to. Default: no move.
        forward: `forward(model, batch)` for models that need more than images.

    Attributes:
        count: Number of images.
        forward: Function that runs a model on a batch.

    Raises:
        DataError: A loader without images.
        InputTypeError: An object that is no loader.
        OptionError: A `max_images` below 1, or a call in inference mode.

    Examples:
        >>> images = Calibration([torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)], max_images=5)
        >>> images.count, [len(batch) for batch in images]
        (5, [3, 2])
    """

    def __init__(
        self, loader: Iterable[Any], max_images: int = 1024, device: Any = None, forward: Forward | None = None
    ) -> None:
        check_counts(max_images=max_images)
        if torch.is_inference_mode_enabled():
            raise OptionError(
                "torch.inference_mode() is on, and tensors made in it can be neither traced nor trained; "
                "call this outside of it"
            )
        check_loader(loader, again=False)
        checked_value("forward", forward, Forward | None)
        self.forward: Forward = call_model if forward is None else forward
        self._batches: list[Any] = []
        self.count = 0
        # Samplers and augmentations draw from the global generators
        with preserve_random_state():
            for batch in loader:
                batch = get_inputs(batch) if forward is None else batch
                size = min(batch_size(batch), max_images - self.count)
                batch = batch if size == batch_size(batch) else index_batch(batch, torch.arange(size))
                self._batches.append(batch if device is None else to_device(batch, device))
                self.count += size
                if self.count >= max_images:
                    break
        if not self.count:
            raise DataError("the loader returned no images; give some hundred images, labels are not needed")

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def first(self, count: int) -> Any:
        """Return the first images, at most `count`, as one batch."""
        return self.slice(0, count).concatenate()

    def split(self, fraction: float, maximum: int) -> tuple[Calibration, Calibration]:
        """Split off the last images: a fraction of all, at most `maximum`. Without enough images return all twice.

        Examples:
            >>> images = Calibration([torch.zeros(6, 1), torch.zeros(4, 1)])
            >>> [[part.count for part in images.split(fraction, 3)] for fraction in (0.25, 0.5, 0.05)]
            [[8, 2], [7, 3], [10, 10]]
        """
        last = min(maximum, int(fraction * self.count))
        if not last:
            return self, self
        return self.slice(0, self.count - last), self.slice(self.count - last, self.count)

    def slice(self, start: int, stop: int) -> Calibration:
        """Return the images from number `start` up to number `stop`."""
        batches: list[Any] = []
        offset = 0
        for batch in self._batches:
            size = batch_size(batch)
            first, last = max(0, start - offset), min(size, stop - offset)
            if first < last:
                batches.append(batch if last - first == size else index_batch(batch, torch.arange(first, last)))
            offset += size
        return Calibration(batches, stop - start, None, self.forward)

    def batches(self, size: int) -> Iterator[Any]:
        """Yield all images in batches of at most `size`.

        Examples:
            >>> [len(batch) for batch in Calibration([torch.zeros(3, 1), torch.zeros(4, 1)]).batches(5)]
            [5, 2]
        """
        for start in range(0, self.count, size):
            yield self.slice(start, min(start + size, self.count)).concatenate()

    def concatenate(self) -> Any:
        """Return all images as one batch."""
        return concatenate_batches(self._batches)
