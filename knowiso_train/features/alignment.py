"""The source's grid brought to the target's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from knowiso_train.errors import ShapeError


def align(source: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample a source feature to the target's grid.

    Only the source is ever resampled: the shares are shares of the target's variance, which resampling would change. Along an axis where the source
    is finer it is average-pooled (adaptive); where it is coarser it is interpolated linearly (`align_corners=False`). Where both occur, pooling comes
    first. A single position is broadcast.

    Args:
        source: (N, C, H, W).
        grid: (height, width) of the target.

    Returns:
        (N, C, height, width), differentiable, in the source's dtype; the source itself where the grids are equal, a view of a single position.

    Raises:
        ShapeError: a source without four axes or without positions, or a grid that is not two positive sizes.

    Example:
        >>> align(torch.randn(2, 8, 16, 4), (8, 8)).shape
        torch.Size([2, 8, 8, 8])
    """
    if source.ndim != 4 or 0 in source.shape[2:]:
        raise ShapeError(f"expected a source feature of shape (N, C, H, W) with at least one position, got {tuple(source.shape)}; see to_nchw")
    if len(grid) != 2 or min(grid) < 1:
        raise ShapeError(f"expected a grid of two positive sizes (height, width), got {tuple(grid)}")
    height, width = source.shape[2:]
    if (height, width) == tuple(grid):
        return source
    if height == width == 1:
        return source.expand(-1, -1, *grid)
    pooled = min(height, grid[0]), min(width, grid[1])
    if pooled != (height, width):
        source = F.adaptive_avg_pool2d(source, pooled)
    if pooled != tuple(grid):
        source = F.interpolate(source, size=tuple(grid), mode="bilinear", align_corners=False)
    return source
