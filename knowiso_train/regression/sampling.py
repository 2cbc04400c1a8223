"""Bounded random samples of positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from knowiso_train.utils.distributed import ProcessGroup
from knowiso_train.utils.hashing import Stream, hash_unit

MIN_CROP_SIDE = 16  # positions; in a smaller crop the halo of the hidden layers outweighs the targets
MIN_SCATTERED_POSITIONS = 16  # of each image
SMALL_GRID_POSITIONS = 64  # 1×1 maps take whole images of grids up to this size
MAX_STORED_RATIO = 1.25  # stored images per image allowed, above which the surplus is dropped
COMPACTION_SLACK_IMAGES = 64


@dataclass(frozen=True)
class Sample:
    """Paired features in memory.

    Attributes:
        x: Source, (M, C_A, h + 2·halo, w + 2·halo).
        y: Target, (M, C_B, h, w).
        inside: (M, 1, h + 2·halo, w + 2·halo), 1 within the image and 0 in its padding; None for whole images, whose
            halo is 0.
        halo: Margin of the source around the target.
    """

    x: Tensor
    y: Tensor
    inside: Tensor | None
    halo: int

    def __len__(self) -> int:
        return len(self.x)

    @property
    def rows(self) -> int:
        """Number of positions in all images."""
        return len(self.y) * self.y.shape[2] * self.y.shape[3]

    def batch(self, index: Tensor) -> Sample:
        """Return the images at `index`."""
        return Sample(self.x[index], self.y[index], None if self.inside is None else self.inside[index], self.halo)

    def slice(self, start: int, count: int) -> Sample:
        """Return `count` images from image `start` on, without a copy; behind the last image follows the first."""
        start %= len(self)
        if start + count > len(self):
            return self.batch(torch.arange(start, start + count, device=self.x.device) % len(self))
        part = slice(start, start + count)
        return Sample(self.x[part], self.y[part], None if self.inside is None else self.inside[part], self.halo)

    def first(self, max_rows: int) -> Sample:
        """Return the first images with at most `max_rows` positions, but at least one image, without a copy."""
        return self.slice(0, min(len(self), max(1, max_rows * len(self) // self.rows)))

    def with_margin(self, halo: int) -> Sample:
        """Return crops with a margin of at most `halo`, without a copy; whole images stay whole."""
        if self.inside is None or self.halo <= halo:
            return self
        return Sample(trim(self.x, self.halo - halo), self.y, trim(self.inside, self.halo - halo), halo)

    def with_target(self, y: Tensor) -> Sample:
        """Return the same sources with another target."""
        return Sample(self.x, y, self.inside, self.halo)


def trim(feature: Tensor, margin: int) -> Tensor:
    """Remove a margin of positions on every side of (N, C, H, W)."""
    return feature if margin == 0 else feature[:, :, margin:-margin, margin:-margin]


def sample_positions(index: NDArray[np.int64], num_positions: int, count: int, seed: int) -> Tensor:
    """Draw `count` distinct positions of each image's grid by a seeded hash of its dataset index, (N, count).

    Examples:
        >>> sample_positions(np.arange(2), num_positions=49, count=5, seed=0).shape
        torch.Size([2, 5])
    """
    order = hash_unit(index[:, None] * num_positions + np.arange(num_positions)[None, :], seed, Stream.POSITIONS)
    if count < num_positions:
        positions = np.argpartition(order, count - 1, axis=1)[:, :count]
    else:
        positions = np.broadcast_to(np.arange(num_positions), order.shape)
    return torch.from_numpy(np.sort(positions, axis=1).astype(np.int64))


class FeatureSample:
    """Bounded sample of positions from as many images as possible, determined by dataset indices and seed alone.

    It keeps whole images where all expected ones fit or the grid is small. Otherwise it keeps one random crop of each
    (k > 1) or scattered positions (k = 1).

    Args:
        max_rows: Maximum number of positions.
        expected_images: Approximate number of images to come.
        kernel_size: Kernel of the maps to be fitted.
        halo: Margin that a crop's source needs, (order + 1) · (k // 2).
        seed: Seed of the choice.
        whole_images: Keep whole images on any grid.
    """

    def __init__(
        self,
        max_rows: int,
        expected_images: int,
        kernel_size: int,
        halo: int,
        seed: int = 0,
        *,
        whole_images: bool = False,
    ) -> None:
        self.max_rows, self.expected_images, self.kernel_size = max_rows, expected_images, kernel_size
        self.halo, self.seed, self.whole_images = halo, seed, whole_images
        self.parts: list[dict[str, Tensor]] = []
        self.grid: tuple[int, int] | None = None

    def add(self, x: Tensor, y: Tensor, index: NDArray[np.int64]) -> None:
        """Offer images: x (N, C_A, H, W), y (N, C_B, H, W) and the dataset index of each (N,)."""
        self.grid = (y.shape[2], y.shape[3])
        # The sample is the `capacity` images with the smallest hash, in whatever order they come
        order = torch.from_numpy(hash_unit(index, self.seed, Stream.SAMPLE_ORDER))
        part = {"order": order, "index": torch.from_numpy(index)}
        capacity = self._capacity()
        if capacity < self.expected_images:
            # Avoid copies of images that cannot stay
            mask = part["order"] <= self._threshold(capacity)
            part = {name: tensor[mask] for name, tensor in part.items()}
            x, y, index = x[mask.to(x.device)], y[mask.to(y.device)], index[mask.numpy()]
        if len(index):
            self.parts.append(part | self._cut(x, y, index))
        if sum(len(p["order"]) for p in self.parts) > MAX_STORED_RATIO * capacity + COMPACTION_SLACK_IMAGES:
            self._compact(capacity)

    def result(self, group: ProcessGroup | None = None, *, shuffled: bool = False) -> Sample | None:
        """Return the sample of all processes; None if nothing was offered.

        Args:
            group: Processes that share the sample.
            shuffled: Order the images by their hash, a random order. Default: by dataset index.
        """
        group = group or ProcessGroup()
        if self.parts:
            self._compact(self._capacity())
        parts = self.parts
        if group.size > 1:
            gathered = group.gather(_on_cpu(self.parts[0]) if self.parts else None)
            parts = [part for part in gathered if part is not None]
        if not parts:
            return None
        device = self.parts[0]["x"].device if self.parts else group.device
        merged = {
            name: torch.cat([p[name].to(device) if name in ("x", "y", "inside") else p[name] for p in parts])
            for name in parts[0]
        }
        self.parts, self.grid = [merged], self.grid or (merged["y"].shape[2], merged["y"].shape[3])
        self._compact(self._capacity(), shuffled=shuffled)
        (total,) = self.parts
        return Sample(total["x"], total["y"], total.get("inside"), self.halo if "inside" in total else 0)

    def _shape(self) -> tuple[int, int]:
        """Return height and width of the part kept of an image; (P, 1) for scattered positions."""
        height, width = self.grid or (1, 1)
        rows_per_image = self.max_rows // max(self.expected_images, 1)
        small_grid = SMALL_GRID_POSITIONS if self.kernel_size == 1 else MIN_CROP_SIDE**2
        if self.whole_images or height * width <= max(rows_per_image, small_grid):
            return height, width
        if self.kernel_size == 1:
            return max(rows_per_image, MIN_SCATTERED_POSITIONS), 1
        side = max(MIN_CROP_SIDE, math.isqrt(rows_per_image))
        return min(side, height), min(side, width)

    def _capacity(self) -> int:
        """Return the maximum number of images."""
        height, width = self._shape()
        return max(1, self.max_rows // (height * width))

    def _threshold(self, capacity: int) -> float:
        """Return the largest hash that can still enter the sample."""
        orders = torch.cat([p["order"] for p in self.parts]) if self.parts else torch.empty(0)
        return float("inf") if len(orders) < capacity else float(orders.kthvalue(capacity).values)

    def _compact(self, capacity: int, *, shuffled: bool = False) -> None:
        """Keep the images with the smallest hashes, ordered by dataset index or by hash."""
        merged = {name: torch.cat([p[name] for p in self.parts]) for name in self.parts[0]}
        rank = merged["order"].argsort()[:capacity]
        if not shuffled:
            rank = rank[merged["index"][rank].argsort()]
        self.parts = [{name: tensor[rank.to(tensor.device)] for name, tensor in merged.items()}]

    def _cut(self, x: Tensor, y: Tensor, index: NDArray[np.int64]) -> dict[str, Tensor]:
        """Copy the part kept of each image."""
        grid, shape = (y.shape[2], y.shape[3]), self._shape()
        if shape == grid:
            return {"x": x.detach().clone(), "y": y.detach().clone()}
        if self.kernel_size == 1:
            positions = sample_positions(index, grid[0] * grid[1], shape[0], self.seed).to(x.device).unsqueeze(1)
            return {
                name: t.detach().flatten(2).gather(2, positions.expand(-1, t.shape[1], -1)).unsqueeze(3)
                for name, t in (("x", x), ("y", y))
            }
        # A crop's source has a halo, so that the crop's targets do not depend on where it was cut. `inside` marks the
        # image in it: hidden layers are zero outside the image, as under the padding of the whole image.
        padded = F.pad(x.detach(), (self.halo,) * 4)
        inside = F.pad(torch.ones_like(x[:, :1]), (self.halo,) * 4)
        tops, lefts = (
            (hash_unit(index, self.seed, stream) * (full - side + 1)).astype(np.int64)
            for stream, full, side in zip((Stream.CROP_TOP, Stream.CROP_LEFT), grid, shape, strict=True)
        )
        crops: dict[str, list[Tensor]] = {"x": [], "y": [], "inside": []}
        for i, (top, left) in enumerate(zip(tops, lefts, strict=True)):
            with_halo = (
                slice(None),
                slice(top, top + shape[0] + 2 * self.halo),
                slice(left, left + shape[1] + 2 * self.halo),
            )
            crops["x"].append(padded[i][with_halo])
            crops["inside"].append(inside[i][with_halo])
            crops["y"].append(y[i, :, top : top + shape[0], left : left + shape[1]].detach())
        return {name: torch.stack(tensors) for name, tensors in crops.items()}


def _on_cpu(part: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in part.items()}
