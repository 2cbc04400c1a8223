"""Images with the largest energies, and their thumbnails."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from knowiso_train.diagnosis.report import HeatMap, RankedImage, Thumbnail
from knowiso_train.errors import InputTypeError, ShapeError
from knowiso_train.features.padding import ValidPositions
from knowiso_train.pages import thumbnail
from knowiso_train.utils.batch import get_inputs
from knowiso_train.utils.distributed import ProcessGroup

MAX_HEAT_MAP_SIZE = 14
MAX_PICTURE_PIXELS = 96  # longer side
SIGNIFICANT_DIGITS = 4  # of saved maps


@dataclass(frozen=True)
class BatchImages:
    """Report images of one batch.

    Attributes:
        index: (N,) dataset indices.
        labels: (N,) classes on the CPU. None: no labels.
        pictures: (N, 1 or 3, H, W) 8-bit thumbnails on the CPU. None: the inputs are no images.
        valid: Valid positions. None: all.
    """

    index: NDArray[np.int64]
    labels: Tensor | None
    pictures: Tensor | None
    valid: ValidPositions | None


@dataclass(frozen=True)
class _Entry:
    energy: float
    index: int
    label: int | None
    value: float | None
    peak: tuple[int, int]
    heat_map: Tensor
    picture: Tensor | None


class TopImages:
    """Images with the largest energies of a stream of batches.

    Args:
        count: Number of images to keep.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.total = 0.0
        self._entries: list[_Entry] = []

    def update(self, energies: Tensor, images: BatchImages, values: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            energies: (N, H, W), energy of each position.
            images: The images.
            values: (N, H, W), projections on a direction. None: no direction.
        """
        per_image = energies.sum((1, 2), dtype=torch.float64).cpu()
        self.total += float(per_image.sum())
        if not self.count:
            return
        least = self._entries[-1].energy if len(self._entries) == self.count else -math.inf
        self._entries += [
            _entry(i, float(per_image[i]), energies[i], images, None if values is None else values[i])
            for i in per_image.argsort(descending=True, stable=True)[: self.count].tolist()
            if per_image[i] >= least
        ]
        self._cut()

    def merge(self, group: ProcessGroup) -> None:
        """Keep the largest energies of all processes."""
        if group.size > 1:
            gathered = group.gather((self.total, self._entries))
            self.total = sum(total for total, _ in gathered)
            self._entries = [entry for _, entries in gathered for entry in entries]
            self._cut()

    def ranked(self, mean_energy: float, deviation: float | None = None) -> tuple[RankedImage, ...]:
        """Return the images by decreasing energy.

        Args:
            mean_energy: Mean energy of the target's positions, the unit of the heat maps.
            deviation: Standard deviation of the feature along the direction, the unit of the values.
        """
        scale = mean_energy or 1.0
        return tuple(
            RankedImage(
                index=entry.index,
                label=entry.label,
                share=entry.energy / self.total if self.total else 0.0,
                value=None if entry.value is None else entry.value / (deviation or 1.0),
                peak=entry.peak,
                heat_map=heat_map(entry.heat_map / scale),
            )
            for entry in self._entries
        )

    def pictures(self) -> dict[int, Tensor]:
        """Return the thumbnail of each image by its index."""
        return {entry.index: entry.picture for entry in self._entries if entry.picture is not None}

    def _cut(self) -> None:
        # Ties by index, so that the order of batches and processes does not matter
        self._entries = sorted(self._entries, key=lambda entry: (-entry.energy, entry.index))[: self.count]


def _entry(i: int, energy: float, energies: Tensor, images: BatchImages, values: Tensor | None) -> _Entry:
    peak = int(energies.abs().flatten().argmax())
    size = (min(energies.shape[0], MAX_HEAT_MAP_SIZE), min(energies.shape[1], MAX_HEAT_MAP_SIZE))
    return _Entry(
        energy=energy,
        index=int(images.index[i]),
        label=None if images.labels is None else int(images.labels[i]),
        value=None if values is None else float(values.flatten()[peak]),
        peak=divmod(peak, energies.shape[1]),
        heat_map=F.adaptive_avg_pool2d(energies[None, None], size)[0, 0].double().cpu(),
        picture=None if images.pictures is None else images.pictures[i],
    )


def heat_map(energies: Tensor) -> HeatMap:
    """Return a map (H, W) as rows of numbers with a few significant digits."""
    return tuple(tuple(float(f"{value:.{SIGNIFICANT_DIGITS}g}") for value in row) for row in energies.tolist())


def make_pictures(batch: Any, to_image: Callable[[Any], Tensor] | None) -> Tensor | None:
    """Return 8-bit thumbnails (N, 1 or 3, H, W) of a batch's images, or None if its inputs are no images.

    Args:
        batch: Batch of the loader.
        to_image: Function of the inputs that returns images with values in [0, 1]. None: each image is scaled from its
            least to its greatest value.

    Raises:
        ShapeError: `to_image` returns no images.
    """
    try:
        inputs = get_inputs(batch)
    except InputTypeError:
        return None
    images = inputs if to_image is None else to_image(inputs)
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        if to_image is None:
            return None
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ShapeError(f"expected images (N, 1 or 3, H, W) of to_image=, got {got}")
    scaled = images.detach().float()
    if images.dtype == torch.uint8:
        scaled = scaled / 255
    elif to_image is None:
        low, high = scaled.amin((1, 2, 3), keepdim=True), scaled.amax((1, 2, 3), keepdim=True)
        scaled = (scaled - low) / (high - low).clamp(min=torch.finfo(scaled.dtype).tiny)
    longer = max(scaled.shape[2:])
    if longer > MAX_PICTURE_PIXELS:
        size = [max(1, side * MAX_PICTURE_PIXELS // longer) for side in scaled.shape[2:]]
        scaled = F.interpolate(scaled, size=size, mode="bilinear", antialias=True)
    return (255 * scaled.nan_to_num().clamp(0, 1)).round().to(torch.uint8).cpu()


def thumbnails_of(tops: Iterable[TopImages], count: int) -> tuple[Thumbnail, ...]:
    """Return the thumbnails of the first `count` different images, by rank."""
    pictures: dict[int, Tensor] = {}
    # The first image of each ranking comes before the second of any
    for rank in zip_longest(*(top.pictures().items() for top in tops)):
        pictures |= {index: picture for index, picture in filter(None, rank) if index not in pictures}
    return tuple(Thumbnail(index, thumbnail(picture)) for index, picture in list(pictures.items())[:count])
