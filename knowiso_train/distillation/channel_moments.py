"""First and second moments of images, by channel."""

from __future__ import annotations

import torch
from torch import Tensor

# Images of each side below which two distributions are not compared
MIN_IMAGES = 16
# Difference of means in standard deviations, and ratio of standard deviations, of images in another normalization;
# augmentation changes them less
MAX_MEAN_DIFFERENCE, MAX_STD_RATIO = 0.5, 1.5


class ChannelMoments:
    """Mean and standard deviation of each channel over all images that were added.

    Examples:
        >>> moments, normalized = ChannelMoments(), ChannelMoments()
        >>> images = torch.rand(20, 3, 8, 8)
        >>> moments.add(images)
        >>> normalized.add((images - 0.5) / 0.25)
        >>> moments.differ(moments), moments.differ(normalized)
        (False, True)
    """

    def __init__(self) -> None:
        self.num_images = 0
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, images: Tensor) -> None:
        """Add a batch (N, C, ...) of floating images; other inputs, and other channels than before, are left out."""
        if not images.is_floating_point() or images.ndim < 2 or not images.numel():
            return
        values = images.detach().float()
        axes = [axis for axis in range(values.ndim) if axis != 1]
        sums = len(values) * torch.stack([values.mean(axes), values.square().mean(axes)])
        if self._sums is None:
            self._sums = sums
        elif self._sums.shape == sums.shape:
            self._sums = self._sums.to(sums.device) + sums
        else:
            return
        self.num_images += len(values)

    @property
    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C,) of the channels, on the CPU."""
        sums = torch.zeros(2, 0) if self._sums is None else self._sums
        mean, square = (sums.double() if sums.device.type != "mps" else sums).cpu() / max(self.num_images, 1)
        return mean, (square - mean.square()).clamp(min=0).sqrt()

    def differ(self, other: ChannelMoments) -> bool:
        """Return whether both hold enough images of as many channels, in another normalization."""
        if min(self.num_images, other.num_images) < MIN_IMAGES:
            return False
        (mean, std), (other_mean, other_std) = self.mean_and_std, other.mean_and_std
        if mean.shape != other_mean.shape:
            return False
        smallest = torch.finfo(torch.float32).tiny
        mean_difference = (mean - other_mean).abs() / torch.maximum(std, other_std).clamp(min=smallest)
        std_ratio = torch.maximum(std, other_std) / torch.minimum(std, other_std).clamp(min=smallest)
        # Single channels may be constant on one side; the median channel tells the normalization
        return bool(mean_difference.median() > MAX_MEAN_DIFFERENCE) or bool(std_ratio.median() > MAX_STD_RATIO)

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.3g}" for value in values[:4].tolist()) for values in self.mean_and_std)
        return f"mean ({mean}), standard deviation ({std})"
