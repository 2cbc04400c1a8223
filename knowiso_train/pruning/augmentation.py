"""Augmentation of calibration images."""

from __future__ import annotations

import torch
from torch import Tensor

from knowiso_train.errors import ShapeError


def cutmix(images: Tensor, *, flip: bool = False, share: float = 0.5) -> Tensor:
    """Paste into each image a patch of another one of the batch, from the same place; statistics of small neighborhoods stay those of images.

    Draws from torch's random state.

    Args:
        images: (N, C, H, W).
        flip: mirror half of the images before, left to right.
        share: of each side that the patch takes.

    Returns:
        Images of the same shape.

    Raises:
        ShapeError: no images.

    Example:
        >>> mixed = cutmix(torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 4, 4))
        >>> mixed.shape, mixed.mean().item() * 2  # a quarter goes to and fro, or each pasted into itself
        (torch.Size([2, 1, 4, 4]), 1.0)
    """
    if images.ndim != 4:
        raise ShapeError(
            f"expected images (N, C, H, W), got shape {tuple(images.shape)}; write a transform of your own for other inputs"
        )
    count, _, *sides = images.shape
    if flip:
        images = torch.where(torch.rand(count, 1, 1, 1).to(images.device) < 0.5, images.flip(3), images)
    rows, columns = (_within(count, side, share) for side in sides)
    patch = (rows[:, :, None] & columns[:, None, :])[:, None].to(images.device)
    return torch.where(patch, images[torch.randperm(count).to(images.device)], images)


def _within(count: int, side: int, share: float) -> Tensor:
    """(count, side): where along one side each image's patch lies."""
    length = max(1, min(side, round(share * side)))
    first = torch.randint(0, side - length + 1, (count, 1))
    places = torch.arange(side)
    return (places >= first) & (places < first + length)
