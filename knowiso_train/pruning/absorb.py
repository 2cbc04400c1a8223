"""Where the mean goes: into a layer's own bias, or into the batch norm that follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.pruning.refit import DualMoments, RowMoments

LEAST = 1e-6  # of the variance that a norm expects: below it a channel is silent, and the norm's statistics stay


def affine_of(norm: nn.Module | None, channels: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """(C,) scale and shift of a batch norm in eval mode, float64; 1 and 0 for None.

    Example:
        >>> norm = nn.BatchNorm2d(2, eps=0.0)
        >>> norm.running_var[1] = 4
        >>> affine_of(norm, 2)[0].tolist()
        [1.0, 0.5]
    """
    if norm is None:
        return torch.ones(channels, dtype=torch.float64, device=device), torch.zeros(channels, dtype=torch.float64, device=device)
    n: Any = norm
    scale = n.weight.detach().double() * (n.running_var.double() + n.eps).rsqrt()
    return scale, n.bias.detach().double() - scale * n.running_mean.double()


@torch.no_grad()
def absorb(layer: nn.Module, norm: nn.Module | None, bias: Tensor, moments: RowMoments | DualMoments, weight: Tensor) -> None:
    """Give a layer whose weight was refitted its intercept.

    With a batch norm behind it, the norm takes the intercept, and its statistics become those of the layer's new output while its scale and shift
    make up for that: the same function in eval mode, and a training step starts from the same one. Otherwise the layer's bias takes it, which is
    added where there is none.

    Args:
        layer: convolution or linear layer.
        norm: the batch norm that alone reads it, or None.
        bias: (C,) float64, the whole intercept.
        moments: of what the layer reads.
        weight: (G, d, o), the new one.
    """
    owner: Any = layer
    if norm is None:
        if owner.bias is None:
            owner.bias = nn.Parameter(bias.to(owner.weight))
        else:
            owner.bias.copy_(bias)
        return
    own = torch.zeros_like(bias) if owner.bias is None else owner.bias.double()
    n: Any = norm
    scale, shift = affine_of(norm, len(bias))
    mean = (weight.mT @ moments.mean_x[..., None])[..., 0].flatten() + own
    variance = moments.variance(weight).flatten()
    loud = variance > LEAST * n.running_var.double()
    new_scale = scale * (variance + n.eps).sqrt()
    offset = shift + scale * (bias - own)  # norm(z) = scale · z + offset
    n.weight.copy_(torch.where(loud, new_scale, n.weight.double()))
    n.bias.copy_(torch.where(loud, offset + scale * mean, n.bias.double()))
    n.running_mean.copy_(torch.where(loud, mean, n.running_mean.double() - (bias - own)))
    n.running_var.copy_(torch.where(loud, variance, n.running_var.double()))
