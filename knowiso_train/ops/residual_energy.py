"""Energy of what a linear map leaves over, without ever holding the residual."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.nn.grad import conv2d_input, conv2d_weight

from knowiso_train.errors import ShapeError
from knowiso_train.ops import kernels
from knowiso_train.ops.chunks import chunks
from knowiso_train.ops.upstream import kept_dtype, scaled

CHUNK_BYTES = 2**20  # of residual that is alive at once on a CPU, so that it stays in the cache, but four times the map, which is read for each
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


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
    learned = [tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in (x, weight, bias)]
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    total: Tensor = _parts(x if dense else x.contiguous(), y, weight, bias, channel_weight, *learned)[0]
    return total


@library.custom_op("knowiso::residual_energy", mutates_args=())
def _parts(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, channel_weight: Tensor | None, of_x: bool, of_weight: bool, of_bias: bool
) -> Parts:
    """The energy, and the gradients that are wanted; the others are empty."""
    if not (of_weight or of_bias) and (found := kernels.residual_energy_for(x, y, weight)) is not None:
        energy, pulled_x = found.energy_and_gradient(x, y, weight, bias, channel_weight, of_x)
        of_bias_dtype = torch.float32 if bias is None else kept_dtype(bias.dtype)
        return energy, pulled_x, weight.new_empty(0, dtype=kept_dtype(weight.dtype)), weight.new_empty(0, dtype=of_bias_dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _chunked(x, y, weight, bias, channel_weight, of_x, of_weight, of_bias)


def _chunked(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, channel_weight: Tensor | None, of_x: bool, of_weight: bool, of_bias: bool
) -> Parts:
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    kernel, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
    total = torch.zeros((), dtype=dtype, device=x.device)
    by_x = torch.empty_like(x, dtype=kept_dtype(x.dtype)) if of_x else x.new_empty(0, dtype=kept_dtype(x.dtype))
    by_weight = torch.zeros_like(kernel, memory_format=torch.contiguous_format) if of_weight else kernel.new_empty(0)
    by_bias = torch.zeros(len(kernel) if of_bias else 0, dtype=dtype, device=x.device)
    pad = weight.shape[-1] // 2
    for part in chunks(x, y[0].numel() * dtype.itemsize, max(CHUNK_BYTES, 4 * kernel.nbytes)):
        source = x[part].to(dtype)
        residual = F.conv2d(source, kernel, shift, padding=pad).sub_(y[part])
        pulled = residual if channel_weight is None else residual * channel_weight.to(dtype).view(-1, 1, 1)
        total += torch.dot(residual.flatten(), pulled.flatten())
        if of_x:
            by_x[part] = conv2d_input(source.shape, kernel, pulled, padding=pad).mul_(2)  # type: ignore[no-untyped-call]
        if of_weight:
            by_weight += conv2d_weight(source, kernel.shape, pulled, padding=pad)  # type: ignore[no-untyped-call]
        if of_bias:
            by_bias += pulled.sum((0, 2, 3))
    return total, by_x, by_weight.mul_(2).to(kept_dtype(weight.dtype)), by_bias.mul_(2).to(dtype if bias is None else kept_dtype(bias.dtype))


@_parts.register_fake
def _(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, channel_weight: Tensor | None, of_x: bool, of_weight: bool, of_bias: bool) -> Parts:
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return (
        x.new_empty((), dtype=dtype),
        torch.empty_like(x, dtype=kept_dtype(x.dtype)) if of_x else x.new_empty(0, dtype=kept_dtype(x.dtype)),
        weight.new_empty(weight.shape if of_weight else 0, dtype=kept_dtype(weight.dtype)),
        x.new_empty(len(weight) if of_bias else 0, dtype=dtype if bias is None else kept_dtype(bias.dtype)),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Parts) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.wanted = inputs[5:]
    ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in (inputs[0], inputs[2], inputs[3]))


def _pull(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    of_x, of_weight, of_bias = (
        scaled(kept, upstream).to(dtype) if wanted else None for kept, wanted, dtype in zip(ctx.saved_tensors, ctx.wanted, ctx.dtypes, strict=True)
    )
    return of_x, None, of_weight, of_bias, None, None, None, None


_parts.register_autograd(_pull, setup_context=_keep)
