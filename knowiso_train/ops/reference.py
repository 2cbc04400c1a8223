"""Plain PyTorch references of the fused operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from knowiso_train.ops.im2col import patch_rows

EPS = 1e-5


def channel_scale(h: Tensor) -> Tensor:
    """Return σ(h), the unbiased standard deviation over positions plus 1e-5, per image and channel, without gradient.

    A single position has σ = 1.

    Args:
        h: (N, C, H, W).

    Returns:
        (N, C, 1, 1), the dtype of `h`.

    Examples:
        >>> channel_scale(torch.ones(2, 3, 1, 1)).unique()
        tensor([1.])
    """
    h = h.detach()
    if h.shape[-2] * h.shape[-1] == 1:
        return torch.ones_like(h)
    return h.std(dim=(-2, -1), keepdim=True) + EPS


def gate_factor(h: Tensor, p: Tensor) -> Tensor:
    """Return the frozen gate D = p · 1[h > 0] / σ(h), of the shape of h; `D · h` is the gated signal."""
    return (h > 0).to(h.dtype) * (p / channel_scale(h))


def gate(x: Tensor | None, h: Tensor, p: Tensor) -> Tensor:
    """Return `x + p · ReLU(h / σ(h))`, with gradients to x, h and p and σ held constant.

    Args:
        x: Addend, (N, C, H, W); None for the gated signal alone.
        h: Output of the previous linear map, (N, C, H, W).
        p: Scalar in (0, 1).

    Examples:
        >>> gate(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 4.0), torch.tensor(0.5)).item()
        2.0
    """
    gated = p * torch.relu(h / channel_scale(h))
    return gated if x is None else x + gated


def gate_orders(orders: Tensor, p: Tensor) -> Tensor:
    """Return `D · x^(j)` for every component, with the gate `D = p · 1[h > 0] / σ(h)` of their sum h held constant.

    Args:
        orders: Components that sum to h, (J, N, C, H, W).
        p: Scalar in (0, 1); its gradient goes through D.

    Examples:
        >>> parts = torch.stack([torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 1.0)])
        >>> gate_orders(parts, torch.tensor(0.5)).flatten().tolist()
        [1.5, 0.5]
    """
    return gate_factor(orders.detach().sum(0), p) * orders


def moments(x: Tensor, y: Tensor, kernel_size: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return means and centered second moments of source patches and targets; see `knowiso_train.ops.moments`.

    Args:
        x: Source, (N, C, H, W).
        y: Target, (N, D, H, W).
        kernel_size: Odd k.

    Returns:
        (d,), (D,), (d, d), (d, D), (D,), float32 or float64.

    Examples:
        >>> [tuple(part.shape) for part in moments(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4), 3)]
        [(27,), (5,), (27, 27), (27, 5), (5,)]
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    rows_x, rows_y = patch_rows(x.to(dtype), kernel_size), patch_rows(y.to(dtype), 1)
    mean_x, mean_y = rows_x.mean(0), rows_y.mean(0)
    rows_x, rows_y = rows_x - mean_x, rows_y - mean_y
    return mean_x, mean_y, rows_x.T @ rows_x, rows_x.T @ rows_y, rows_y.square().sum(0)


def residual_energy(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None, channel_weight: Tensor | None = None
) -> Tensor:
    """Return `Σ w_c (y - conv(x, weight) - bias)²` in float32 or better; see `knowiso_train.ops.residual_energy`.

    Examples:
        >>> residual_energy(torch.zeros(1, 2, 3, 3), torch.ones(1, 1, 3, 3), torch.ones(1, 2, 1, 1))
        tensor(9.)
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        shift = None if bias is None else bias.to(dtype)
        residual = y.detach().to(dtype) - F.conv2d(x.to(dtype), weight.to(dtype), shift, padding=weight.shape[-1] // 2)
        square = residual.square()
        return (square if channel_weight is None else square * channel_weight.detach().to(dtype).view(-1, 1, 1)).sum()
