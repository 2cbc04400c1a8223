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
from knowiso_train.utils.hashing import hash_unit

SMALLEST_CROP = 8  # below this side the margin that hidden layers need costs more than it brings


@dataclass(frozen=True)
class Sample:
    """Paired features, held in memory.

    Attributes:
        x: source, (M, C_A, h + 2·halo, w + 2·halo).
        y: target, (M, C_B, h, w).
        inside: (M, 1, h + 2·halo, w + 2·halo), 1 where the image is and 0 in the padding; None for whole images, whose
            halo is 0.
        halo: margin that the source has around the target.
    """

    x: Tensor
    y: Tensor
    inside: Tensor | None
    halo: int

    def __len__(self) -> int:
        return len(self.x)

    @property
    def rows(self) -> int:
        """Positions in the sample."""
        return len(self.y) * self.y.shape[2] * self.y.shape[3]

    def batch(self, index: Tensor) -> Sample:
        """Some of the images."""
        return Sample(self.x[index], self.y[index], None if self.inside is None else self.inside[index], self.halo)

    def with_target(self, y: Tensor) -> Sample:
        """The same sources against another target."""
        return Sample(self.x, y, self.inside, self.halo)


def sample_positions(index: NDArray[np.int64], cells: int, count: int, seed: int) -> Tensor:
    """(N, count) distinct positions of each image's grid of `cells`, by a seeded hash of the dataset index.

    Example:
        >>> sample_positions(np.arange(2), cells=49, count=5, seed=0).shape
        torch.Size([2, 5])
    """
    order = hash_unit(index[:, None] * cells + np.arange(cells)[None, :], seed, stream=2)
    chosen = (
        np.argpartition(order, count - 1, axis=1)[:, :count]
        if count < cells
        else np.broadcast_to(np.arange(cells), order.shape)
    )
    return torch.from_numpy(np.sort(chosen, axis=1).astype(np.int64))


class FeatureSample:
    """Keeps at most `max_rows` positions, from as many images as possible; which ones depends on dataset index and seed only.

    Whole images are kept where all expected ones fit or the grid is small; else one random crop of each (k > 1) or
    scattered positions (k = 1).

    Args:
        max_rows: most positions to keep.
        expected_images: how many images will come, as far as is known.
        kernel_size: of the maps to be fitted.
        halo: margin that a crop's source needs: (order + 1) · (k // 2).
        seed: of the choice.
        whole: keep whole images whatever the grid.
    """

    def __init__(
        self, max_rows: int, expected_images: int, kernel_size: int, halo: int, seed: int = 0, *, whole: bool = False
    ) -> None:
        self.max_rows, self.expected, self.kernel_size, self.halo, self.seed, self.whole = (
            max_rows,
            expected_images,
            kernel_size,
            halo,
            seed,
            whole,
        )
        self.parts: list[dict[str, Tensor]] = []
        self.grid: tuple[int, int] | None = None

    def add(self, x: Tensor, y: Tensor, index: NDArray[np.int64]) -> None:
        """Offer images: x (N, C_A, H, W), y (N, C_B, H, W) and the dataset index of each (N,)."""
        self.grid = (y.shape[2], y.shape[3])
        part = {"order": torch.from_numpy(hash_unit(index, self.seed, stream=1)), "index": torch.from_numpy(index)}
        keep = self._room()
        if keep < self.expected:  # do not copy what cannot stay
            chosen = part["order"] <= self._threshold(keep)
            part = {name: tensor[chosen] for name, tensor in part.items()}
            x, y, index = x[chosen.to(x.device)], y[chosen.to(y.device)], index[chosen.numpy()]
        if len(index):
            self.parts.append(part | self._cut(x, y, index))
        if sum(len(p["order"]) for p in self.parts) > 1.25 * keep + 64:
            self._prune(keep)

    def result(self, group: ProcessGroup | None = None) -> Sample | None:
        """The sample of all processes, ordered by dataset index; None if nothing was offered."""
        group = group or ProcessGroup()
        if self.parts:
            self._prune(self._room())
        held = self.parts
        if group.size > 1:
            held = [part for part in group.gather(_on_cpu(self.parts[0]) if self.parts else None) if part is not None]
        if not held:
            return None
        device = self.parts[0]["x"].device if self.parts else group.device
        merged = {
            name: torch.cat([p[name].to(device) if name in ("x", "y", "inside") else p[name] for p in held])
            for name in held[0]
        }
        self.parts, self.grid = [merged], self.grid or (merged["y"].shape[2], merged["y"].shape[3])
        self._prune(self._room())
        kept = self.parts[0]
        return Sample(kept["x"], kept["y"], kept.get("inside"), self.halo if "inside" in kept else 0)

    def _side(self) -> tuple[int, int]:
        """Height and width of what is kept of an image; for k = 1 scattered positions, (P, 1)."""
        height, width = self.grid or (1, 1)
        share = self.max_rows // max(self.expected, 1)
        if self.whole or height * width <= max(share, SMALLEST_CROP**2):
            return height, width
        if self.kernel_size == 1:
            return max(share, 16), 1
        side = max(SMALLEST_CROP, math.isqrt(share))
        return min(side, height), min(side, width)

    def _room(self) -> int:
        height, width = self._side()
        return max(1, self.max_rows // (height * width))

    def _threshold(self, keep: int) -> float:
        held = [p["order"] for p in self.parts]
        orders = torch.cat(held) if held else torch.empty(0)
        return float("inf") if len(orders) < keep else float(orders.kthvalue(keep).values)

    def _prune(self, keep: int) -> None:
        merged = {name: torch.cat([p[name] for p in self.parts]) for name in self.parts[0]}
        best = merged["order"].argsort()[:keep]
        best = best[merged["index"][best].argsort()]
        self.parts = [{name: tensor[best.to(tensor.device)] for name, tensor in merged.items()}]

    def _cut(self, x: Tensor, y: Tensor, index: NDArray[np.int64]) -> dict[str, Tensor]:
        grid, side = (y.shape[2], y.shape[3]), self._side()
        if side == grid:
            return {"x": x.detach().clone(), "y": y.detach().clone()}
        if self.kernel_size == 1:
            where = sample_positions(index, grid[0] * grid[1], side[0], self.seed).to(x.device).unsqueeze(1)
            return {
                name: t.detach().flatten(2).gather(2, where.expand(-1, t.shape[1], -1)).unsqueeze(3)
                for name, t in (("x", x), ("y", y))
            }
        margin = self.halo
        padded = F.pad(x.detach(), (margin,) * 4)
        inside = F.pad(torch.ones_like(x[:, :1]), (margin,) * 4)
        corners = [
            (hash_unit(index, self.seed, stream=stream) * (full - kept + 1)).astype(np.int64)
            for stream, full, kept in ((4, grid[0], side[0]), (5, grid[1], side[1]))
        ]
        cuts: dict[str, list[Tensor]] = {"x": [], "y": [], "inside": []}
        for i, (top, left) in enumerate(zip(*corners, strict=True)):
            wide = (slice(None), slice(top, top + side[0] + 2 * margin), slice(left, left + side[1] + 2 * margin))
            cuts["x"].append(padded[i][wide])
            cuts["inside"].append(inside[i][wide])
            cuts["y"].append(y[i, :, top : top + side[0], left : left + side[1]].detach())
        return {name: torch.stack(tensors) for name, tensors in cuts.items()}


def _on_cpu(part: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in part.items()}
