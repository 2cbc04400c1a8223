"""Energy of what a linear map leaves over: `Σ w_c (y - W x - b)²`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def residual_energy(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None, channel_weight: Tensor | None = None) -> Tensor:
    """`Σ w_c (y - conv(x, weight) - bias)²` over images, channels and positions; differentiable in everything.

    Args:
        x: source, (N, C, H, W).
        y: target, (N, D, H, W).
        weight: (D, C, k, k), k odd; zero padding keeps the grid.
        bias: (D,) or None.
        channel_weight: w, (D,); None is 1.

    Returns:
        A scalar.

    Example:
        >>> residual_energy(torch.zeros(1, 2, 3, 3), torch.ones(1, 1, 3, 3), torch.ones(1, 2, 1, 1)).item()
        9.0
    """
    residual = (y - F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)).square()
    return residual.sum() if channel_weight is None else (residual.sum((0, 2, 3)) * channel_weight).sum()
