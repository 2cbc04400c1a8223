"""The gate of the recursion (arXiv 1908.01581, eq. 3): `z = p · ReLU(h / σ(h))`, with σ per sample and channel, without gradient."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-5


def channel_scale(h: Tensor) -> Tensor:
    """σ(h): unbiased standard deviation over positions plus 1e-5, per sample and channel; 1 where there is one position. No gradient.

    Args:
        h: (N, C, H, W).

    Returns:
        (N, C, 1, 1), the dtype of `h`.

    Example:
        >>> channel_scale(torch.ones(2, 3, 1, 1)).unique()
        tensor([1.])
    """
    h = h.detach()
    if h.shape[-2] * h.shape[-1] == 1:
        return torch.ones_like(h)
    return h.std(dim=(-2, -1), keepdim=True) + EPS


def gate_factor(h: Tensor, p: Tensor) -> Tensor:
    """D = p · 1[h > 0] / σ(h): the frozen gate as a diagonal, so that `D · h` is the gated signal. Shape of `h`."""
    return (h > 0).to(h.dtype) * (p / channel_scale(h))


def gate(x: Tensor | None, h: Tensor, p: Tensor) -> Tensor:
    """`x + p · ReLU(h / σ(h))`; gradient with respect to x, h and p, σ held constant.

    Args:
        x: (N, C, H, W), what the gated signal is added to; None for the gated signal alone.
        h: (N, C, H, W), output of the linear map below.
        p: scalar in (0, 1).

    Example:
        >>> gate(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 4.0), torch.tensor(0.5)).item()
        2.0
    """
    gated = p * torch.relu(h / channel_scale(h))
    return gated if x is None else x + gated


def gate_orders(orders: Tensor, p: Tensor) -> Tensor:
    """`D · x^(j)` for every order component, side by side, through the gate D of their sum h: `D = p · 1[h > 0] / σ(h)`, held constant.

    Args:
        orders: (J, N, C, H, W), components that sum to h.
        p: scalar in (0, 1); its gradient goes through D.

    Example:
        >>> parts = torch.stack([torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 1.0)])
        >>> gate_orders(parts, torch.tensor(0.5)).flatten().tolist()
        [1.5, 0.5]
    """
    return gate_factor(orders.detach().sum(0), p) * orders
