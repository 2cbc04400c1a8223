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
    """Cut the square at a corner from each image, (N, C, side, side), and mirror those of `flips`, by one index."""
    span = torch.arange(side, device=padded.device)
    rows = corners[:, :1] + span
    columns = corners[:, 1:] + torch.where(flips[:, None], side - 1 - span, span)
    images = torch.arange(len(padded), device=padded.device)
    # Indices before and after the channels put these last: (N, side, side, C)
    crops = padded[images[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return crops.movedim(-1, 1).contiguous()
