"""Energy of what a linear map leaves over, with the residual written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def residual_energy(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None, channel_weight: Tensor | None = None) -> Tensor:
    """`Σ w_c (y - conv(x, weight) - bias)²`, in float32 or better; arguments as for `knowiso_train.ops.residual_energy`.

    Example:
        >>> residual_energy(torch.zeros(1, 2, 3, 3), torch.ones(1, 1, 3, 3), torch.ones(1, 2, 1, 1))
        tensor(9.)
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        shift = None if bias is None else bias.to(dtype)
        residual = y.detach().to(dtype) - F.conv2d(x.to(dtype), weight.to(dtype), shift, padding=weight.shape[-1] // 2)
        square = residual.square()
        return (square if channel_weight is None else square * channel_weight.detach().to(dtype).view(-1, 1, 1)).sum()
