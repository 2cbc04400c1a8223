"""Augmentation of calibration images."""

from __future__ import annotations

import torch
from torch import Tensor

from knowiso_train.errors import ShapeError
from knowiso_train.utils.validation import UnitFloat, validate_arguments


@validate_arguments
def cutmix(images: Tensor, *, flip: bool = False, patch_fraction: UnitFloat = 0.5) -> Tensor:
    """Paste into each image a patch of another image of the batch, at the same position.

    No labels are mixed, in contrast to CutMix for classification (Yun et al., 2019). Statistics within patches stay
    those of real images. Random numbers come from the global generator of torch.

    Args:
        images: (N, C, H, W) batch.
        flip: Mirror a random half of the images before, left to right.
        patch_fraction: Fraction of each side that the patch covers.

    Returns:
        Images of the same shape.

    Raises:
        ShapeError: Not a batch of images.
        OptionError: `patch_fraction` outside [0, 1].

    Examples:
        >>> mixed = cutmix(torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 4, 4))
        >>> mixed.shape, mixed.mean().item() * 2  # both images keep their patch, or they swap a quarter of their pixels
        (torch.Size([2, 1, 4, 4]), 1.0)
    """
    if images.ndim != 4:
        raise ShapeError(
            f"expected images (N, C, H, W), got shape {tuple(images.shape)}. Use another transform for other inputs"
        )
    num_images, _, *sides = images.shape
    # Random numbers are drawn on the CPU, so that all devices have equal results
    if flip:
        images = torch.where(torch.rand(num_images, 1, 1, 1).to(images.device) < 0.5, images.flip(3), images)
    rows, columns = (_random_intervals(num_images, side, patch_fraction) for side in sides)
    mask = (rows[:, :, None] & columns[:, None, :])[:, None].to(images.device)
    return torch.where(mask, images[torch.randperm(num_images).to(images.device)], images)


def _random_intervals(count: int, size: int, fraction: float) -> Tensor:
    """Return masks (count, size), each True on a random interval of a fraction of the size."""
    length = max(1, min(size, round(fraction * size)))
    start = torch.randint(0, size - length + 1, (count, 1))
    positions = torch.arange(size)
    return (positions >= start) & (positions < start + length)
