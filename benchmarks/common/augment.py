"""Augmentation that benchmarks share."""

from __future__ import annotations

import torch
from torch import Tensor


def random_crops_and_flips(wide: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """From (N, C, H, W) with a margin a random square of each image, half of them mirrored."""
    corners = torch.randint(wide.shape[-1] - side + 1, (len(wide), 2), generator=generator).tolist()
    flips = (torch.rand(len(wide), generator=generator) < 0.5).tolist()
    crops = [x[:, i : i + side, j : j + side] for x, (i, j) in zip(wide, corners, strict=True)]
    return torch.stack([crop.flip(-1) if flip else crop for crop, flip in zip(crops, flips, strict=True)])
