"""Energy of what a linear map leaves over, without ever holding the residual."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

from knowiso_train.errors import ShapeError

CHUNK_BYTES = 4 * 2**20  # of residual that is alive at once


def residual_energy(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None, channel_weight: Tensor | None = None) -> Tensor:
    """`Σ w_c (y - conv(x, weight) - bias)²` over images, channels and positions.

    The residual is made in chunks, and the gradients with it in the forward pass, so what is kept for backward is as large as x (and weight, bias),
    not as the residual. Halves are summed in float32. No gradient goes to y and to the channel weights.

    Args:
        x: source, (N, C, H, W).
        y: target, (N, D, H, W).
        weight: (D, C, k, k), k odd; zero padding keeps the grid.
        bias: (D,) or None.
        channel_weight: w, (D,); None is 1.

    Returns:
        A scalar, float32 or float64.

    Raises:
        ShapeError: shapes that do not fit each other, or no images.

    Example:
        >>> x = torch.zeros(1, 2, 3, 3, requires_grad=True)
        >>> residual_energy(x, torch.ones(1, 1, 3, 3), torch.ones(1, 2, 1, 1)).backward()
        >>> x.grad.unique()
        tensor([-2.])
    """
    if (
        x.ndim != 4
        or y.ndim != 4
        or not x.numel()
        or (len(y), *y.shape[2:]) != (len(x), *x.shape[2:])
        or weight.shape[:2] != (y.shape[1], x.shape[1])
        or weight.shape[2] % 2 == 0
    ):
        raise ShapeError(
            f"expected x (N, C, H, W), y (N, D, H, W) and weight (D, C, k, k) with N, H, W > 0 and k odd; "
            f"got {tuple(x.shape)}, {tuple(y.shape)} and {tuple(weight.shape)}"
        )
    result: Tensor = _ResidualEnergy.apply(x, y, weight, bias, channel_weight)
    return result


class _ResidualEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, channel_weight: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return _ResidualEnergy.summed(ctx, x, y, weight, bias, channel_weight)

    @staticmethod
    def summed(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, channel_weight: Tensor | None) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        kernel, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
        total = torch.zeros((), dtype=dtype, device=x.device)
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(kernel) if ctx.needs_input_grad[2] else None
        of_bias = torch.zeros_like(shift) if shift is not None and ctx.needs_input_grad[3] else None
        pad = weight.shape[-1] // 2
        step = max(1, CHUNK_BYTES // (y[0].numel() * dtype.itemsize))
        for part in (slice(start, start + step) for start in range(0, len(x), step)):
            source = x[part].to(dtype)
            residual = F.conv2d(source, kernel, shift, padding=pad).sub_(y[part])
            pulled = residual if channel_weight is None else residual * channel_weight.to(dtype).view(-1, 1, 1)
            total += (residual * pulled).sum()
            if of_x is not None:
                of_x[part] = conv2d_input(source.shape, kernel, pulled, padding=pad).mul_(2)  # type: ignore[no-untyped-call]
            if of_weight is not None:
                of_weight += conv2d_weight(source, kernel.shape, pulled, padding=pad)  # type: ignore[no-untyped-call]
            if of_bias is not None:
                of_bias += pulled.sum((0, 2, 3))
        ctx.save_for_backward(
            of_x,
            None if of_weight is None else (2 * of_weight).to(weight.dtype),
            None if of_bias is None or bias is None else (2 * of_bias).to(bias.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        of_x, of_weight, of_bias = (None if kept is None else kept * upstream.to(kept.dtype) for kept in ctx.saved_tensors)
        return of_x, None, of_weight, of_bias, None
