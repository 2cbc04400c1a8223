"""Image augmentation shared by the benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor


def random_crops_and_flips(padded: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Cut a random square from each image and mirror half of the images.

    Args:
        padded: Images with a margin, (N, C, H, W).
        side: Height and width of the crops in pixels.
        generator: Source of randomness.

    Returns:
        Crops, (N, C, side, side).
    """
    return crops_and_flips(padded, side, *draw_crops_and_flips(len(padded), padded.shape[-1] - side, generator))


def draw_crops_and_flips(count: int, margin: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the corners of crops, (count, 2) in 0..margin, and which of them to mirror, (count,)."""
    corners = torch.randint(margin + 1, (count, 2), generator=generator)
    return corners, torch.rand(count, generator=generator) < 0.5


def crops_and_flips(padded: Tensor, side: int, corners: Tensor, flips: Tensor) -> Tensor:
    """Cut the square at a corner from each image, (N, C, side, side), and mirror those of `flips`."""
    crops = [x[:, i : i + side, j : j + side] for x, (i, j) in zip(padded, corners.tolist(), strict=True)]
    return torch.stack([crop.flip(-1) if flip else crop for crop, flip in zip(crops, flips.tolist(), strict=True)])
