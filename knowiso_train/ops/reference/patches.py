"""k×k neighbourhoods as the rows of a regression."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def patch_rows(x: Tensor, kernel_size: int, positions: Tensor | None = None) -> Tensor:
    """Rows of k×k patches with zero padding, in the order of `conv2d`'s flattened weight: channel, then row, then column of the patch.

    Args:
        x: (N, C, H, W).
        kernel_size: odd k.
        positions: (N, P) indices into the H·W grid; all positions when None.

    Returns:
        (N · P, C · k²), P = H · W when `positions` is None; rows of one image are consecutive.

    Example:
        >>> patch_rows(torch.zeros(2, 3, 4, 5), 3).shape
        torch.Size([40, 27])
    """
    rows = x.flatten(2) if kernel_size == 1 else F.unfold(x, kernel_size, padding=kernel_size // 2)
    if positions is not None:
        rows = rows.gather(2, positions.unsqueeze(1).expand(-1, rows.shape[1], -1))
    return rows.transpose(1, 2).reshape(-1, rows.shape[1])
