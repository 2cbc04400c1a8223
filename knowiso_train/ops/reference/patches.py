"""k×k neighbourhoods as the rows of a regression."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_rows(x: Tensor, kernel_size: int, positions: Tensor | None = None) -> Tensor:
    """Rows of k×k patches with zero padding; columns go by row of the patch, column of the patch, channel.

    That order lets every patch be copied in runs of C values. `conv_weight` brings a solution back to a convolution's order.

    Args:
        x: (N, C, H, W).
        kernel_size: odd k.
        positions: (N, P) indices into the H·W grid; all positions when None.

    Returns:
        (N · P, k² · C), P = H · W when `positions` is None; rows of one image are consecutive.

    Example:
        >>> patch_rows(torch.zeros(2, 3, 4, 5), 3).shape
        torch.Size([40, 27])
    """
    _, _, height, width = x.shape
    rows = x.permute(0, 2, 3, 1)
    if kernel_size > 1:
        margin = kernel_size // 2
        rows = F.pad(rows, (0, 0, margin, margin, margin, margin)).contiguous()
        rows = torch.cat([rows[:, i : i + height, j : j + width] for i in range(kernel_size) for j in range(kernel_size)], dim=-1)
    rows = rows.flatten(1, 2)
    if positions is not None:
        rows = rows.gather(1, positions.unsqueeze(2).expand(-1, -1, rows.shape[2]))
    return rows.reshape(-1, rows.shape[2])


def conv_weight(weight: Tensor, kernel_size: int) -> Tensor:
    """(k² · C, C_out) regression weights in the order of `patch_rows` → a convolution's (C_out, C, k, k).

    Example:
        >>> conv_weight(torch.zeros(27, 5), 3).shape
        torch.Size([5, 3, 3, 3])
    """
    return weight.T.reshape(weight.shape[1], kernel_size, kernel_size, -1).permute(0, 3, 1, 2)
