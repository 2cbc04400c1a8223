"""First and centred second moments of two features, with every k×k patch written out."""

from __future__ import annotations

import torch
from torch import Tensor

from knowiso_train.ops.reference.patches import patch_rows


def moments(x: Tensor, y: Tensor, kernel_size: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Means of source patches and targets, `Σ (x - mean)(x - mean)ᵀ`, `Σ (x - mean)(y - mean)ᵀ` and the diagonal of the target's own.

    Args:
        x: (N, C, H, W); enters as its zero-padded k×k patches, d = k² · C columns in the order of `patch_rows`.
        y: (N, D, H, W).
        kernel_size: odd k.

    Returns:
        (d,), (D,), (d, d), (d, D), (D,), float32 or float64.

    Example:
        >>> [tuple(part.shape) for part in moments(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4), 3)]
        [(27,), (5,), (27, 27), (27, 5), (5,)]
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    rows_x, rows_y = patch_rows(x.to(dtype), kernel_size), patch_rows(y.to(dtype), 1)
    mean_x, mean_y = rows_x.mean(0), rows_y.mean(0)
    rows_x, rows_y = rows_x - mean_x, rows_y - mean_y
    return mean_x, mean_y, rows_x.T @ rows_x, rows_x.T @ rows_y, rows_y.square().sum(0)
