"""What a network expects of its images, as a module in front of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.errors import InputTypeError, OptionError, ShapeError

INTERPOLATIONS = ("bicubic", "bilinear")


class InputTransform(nn.Module):
    """Resizes and normalises float images in [0, 1].

    The image is scaled until it covers `size`, then cropped at the centre: one factor for both sides, so nothing is distorted.

    Args:
        size: (height, width); None keeps that of the image.
        mean, std: per channel.
        interpolation: "bicubic" or "bilinear", antialiased.

    Raises:
        OptionError: another interpolation.

    Example:
        >>> transform = InputTransform((4, 4), mean=(0.5,), std=(0.5,))
        >>> transform(torch.full((1, 1, 8, 6), 0.75)).shape, round(transform(torch.full((1, 1, 8, 6), 0.75)).mean().item(), 4)
        (torch.Size([1, 1, 4, 4]), 0.5)
    """

    mean: Tensor
    std: Tensor

    def __init__(self, size: tuple[int, int] | None, mean: Sequence[float], std: Sequence[float], interpolation: str = "bicubic") -> None:
        super().__init__()
        if interpolation not in INTERPOLATIONS:
            raise OptionError(f"interpolation must be one of {INTERPOLATIONS} (those that can be antialiased on tensors), got {interpolation!r}")
        self.size, self.interpolation = size, interpolation
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] → what the network expects.

        Raises:
            InputTypeError: not floating, or outside [0, 1].
            ShapeError: another number of channels or axes.
        """
        if not images.is_floating_point():
            raise InputTypeError(f"expected float images in [0, 1], got {images.dtype}; divide bytes by 255")
        if images.ndim != 4 or images.shape[1] != self.mean.shape[1]:
            raise ShapeError(f"expected images (N, {self.mean.shape[1]}, H, W), got shape {tuple(images.shape)}")
        low, high = (float(bound) for bound in images.aminmax())
        if low < -1e-3 or high > 1 + 1e-3:
            raise InputTypeError(f"expected images in [0, 1], got values from {low:.3g} to {high:.3g}; they must not be normalised before")
        return self.applied(images)

    def applied(self, images: Tensor) -> Tensor:
        """As `forward`, without looking at the values: no wait for a GPU."""
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            images = self._resized(images, self.size)
        return (images - self.mean.to(images)) / self.std.to(images)

    def extra_repr(self) -> str:
        """Size, interpolation and normalisation."""
        return f"size={self.size}, interpolation={self.interpolation!r}, mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"

    def _resized(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = images.shape[2:]
        scale = max(size[0] / height, size[1] / width)
        covering = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
        images = F.interpolate(images, covering, mode=self.interpolation, antialias=True, align_corners=False).clamp(0, 1)  # bicubic overshoots
        top, left = (covering[0] - size[0]) // 2, (covering[1] - size[1]) // 2
        return images[:, :, top : top + size[0], left : left + size[1]]


class InputBridge(nn.Module):
    """Turns what one network sees into what another expects: undoes the one's normalisation, then applies the other's transform.

    For the teacher of a distillation: the student's inputs are at hand, the teacher wants another normalisation or resolution. It sees what the
    student saw, resized where it wants another size; what the student's resolution lost does not come back.

    Args:
        given: transform that made the images.
        wanted: transform of the network that is to see them.

    Raises:
        ShapeError: transforms for different numbers of channels.

    Example:
        >>> student, teacher = InputTransform(None, (0.5,), (0.5,)), InputTransform((8, 8), (0.2,), (0.3,))
        >>> images = torch.rand(2, 1, 4, 4)
        >>> torch.allclose(InputBridge(student, teacher)(student(images)), teacher(images), atol=1e-5)
        True
    """

    def __init__(self, given: InputTransform, wanted: InputTransform) -> None:
        super().__init__()
        if given.mean.shape != wanted.mean.shape:
            raise ShapeError(f"one network takes {given.mean.shape[1]} channels, the other {wanted.mean.shape[1]}; a bridge needs equal numbers")
        self.given, self.wanted = given, wanted
        self.alike = all(torch.equal(a.cpu(), b.cpu()) for a, b in ((given.mean, wanted.mean), (given.std, wanted.std)))

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) as `given` returned it → as `wanted` returns it; the same tensor where both agree."""
        if self.alike and self.wanted.size in (None, tuple(images.shape[2:])):
            return images
        plain = images * self.given.std.to(images) + self.given.mean.to(images)
        return self.wanted.applied(plain.clamp(0, 1))  # rounding may leave the range by a little
