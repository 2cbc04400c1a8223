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
    corners = torch.randint(padded.shape[-1] - side + 1, (len(padded), 2), generator=generator).tolist()
    flips = (torch.rand(len(padded), generator=generator) < 0.5).tolist()
    crops = [x[:, i : i + side, j : j + side] for x, (i, j) in zip(padded, corners, strict=True)]
    return torch.stack([crop.flip(-1) if flip else crop for crop, flip in zip(crops, flips, strict=True)])
