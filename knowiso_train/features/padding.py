"""Padded positions of batches, which losses and measurements leave out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knowiso_train.errors import CaptureError

# Masks of padded positions by keyword argument or key of a batch, and the value of a valid position
PADDING_MASKS = {
    "attention_mask": True,
    "pixel_mask": True,
    "key_padding_mask": False,
    "src_key_padding_mask": False,
    "padding_mask": False,
}


@dataclass(frozen=True)
class ValidPositions:
    """Positions of a batch that are not padding.

    Attributes:
        origin: Argument or key that held the mask, for error messages.
        mask: True for valid positions, (N, L).
    """

    origin: str
    mask: Tensor

    @property
    def complete(self) -> bool:
        """True without padding."""
        return bool(self.mask.all())

    @property
    def counts(self) -> Tensor:
        """Number of valid positions of each image, (N,)."""
        return self.mask.sum(1)

    def fits(self, grid: tuple[int, int], *source_grids: tuple[int, int], kernel_size: int) -> bool:
        """Return True if features of these grids have one position for each of the mask, without neighborhoods.

        Args:
            grid: (height, width) of the target.
            source_grids: Grids that are aligned with the target's; a single position is the same for all.
            kernel_size: Side of the neighborhoods.
        """
        positions = grid[0] * grid[1]
        aligned = all(other in (grid, (1, 1)) for other in source_grids)
        return kernel_size == 1 and self.mask.shape[1] == positions and aligned

    def misfit_error(self, layers: Mapping[str, tuple[int, int]]) -> CaptureError:
        """Return the error for padded positions that cannot be left out.

        Args:
            layers: Grid of each layer by its name.
        """
        sizes = " and ".join(f"{layer!r} has {height * width}" for layer, (height, width) in layers.items())
        return CaptureError(
            f"{self.origin} marks padded positions, which can be left out for kernel_size=1 and features with one "
            f"position for each of its {self.mask.shape[1]}; {sizes}. Pair other layers, or give batches "
            "without padding"
        )

    def rows(self, feature: Tensor) -> Tensor:
        """Return the valid positions (P, C) of a feature (N, C, H, W), image by image.

        Examples:
            >>> feature = torch.arange(4.0).view(2, 1, 1, 2)
            >>> ValidPositions("mask", torch.tensor([[True, False], [True, True]])).rows(feature).flatten().tolist()
            [0.0, 2.0, 3.0]
        """
        return feature.flatten(2).movedim(1, 2).flatten(0, 1)[self.mask.to(feature.device).flatten()]

    def repeated(self, feature: Tensor) -> Tensor:
        """Return a feature (N, C, 1, L) with each image's valid positions first, and again in place of its padding.

        Examples:
            >>> valid = ValidPositions("mask", torch.tensor([[False, True, True]]))
            >>> valid.repeated(torch.tensor([[[[5.0, 6.0, 7.0]]]])).flatten().tolist()
            [6.0, 7.0, 6.0]
        """
        mask = self.mask.to(feature.device)
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
        cycle = torch.arange(mask.shape[1], device=mask.device) % mask.sum(1, keepdim=True).clamp(min=1)
        positions = order.gather(1, cycle)[:, None].expand(-1, feature.shape[1], -1)
        return feature.flatten(2).gather(2, positions)[:, :, None]

    def mean(self, feature: Tensor) -> Tensor:
        """Return the means (N, C, 1, 1) of a feature (N, C, H, W) over the valid positions of each image."""
        mask = self.mask.to(feature.device)[:, None]
        total = torch.where(mask, feature.flatten(2), 0).sum(2)
        return (total / mask.sum(2).clamp(min=1))[:, :, None, None]

    def leading(self) -> ValidPositions:
        """Return the mask of a feature from `repeated`: the first positions of each image."""
        positions = torch.arange(self.mask.shape[1], device=self.mask.device)
        return ValidPositions(self.origin, positions < self.counts[:, None])


def find_padding(values: Mapping[str, Any], num_images: int) -> ValidPositions | None:
    """Return the valid positions that arguments or a batch state under a name of `PADDING_MASKS`; None without a mask.

    Args:
        values: Keyword arguments of a forward, or a batch.
        num_images: Length of the mask; others are ignored.

    Examples:
        >>> find_padding({"padding_mask": torch.tensor([[0, 1]])}, 1).mask.tolist()
        [[True, False]]
    """
    for name, value_of_valid in PADDING_MASKS.items():
        mask = values.get(name)
        if isinstance(mask, Tensor) and mask.ndim in (2, 3) and len(mask) == num_images:
            return ValidPositions(f"{name}=", (mask.flatten(1) != 0) == value_of_valid)
    return None
