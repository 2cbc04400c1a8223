"""Energy of what a fixed 1x1 map leaves over, from its Gram matrix: one product with the wide target where the residual needs two."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from knowiso_train.errors import ShapeError
from knowiso_train.ops import kernels
from knowiso_train.ops.chunks import chunks
from knowiso_train.ops.precision import full_precision
from knowiso_train.ops.residual_energy import residual_energy
from knowiso_train.ops.upstream import kept_dtype, scaled

CHUNK_BYTES = 2**20  # of centred target that is alive at once on a CPU, but four times the map, which is read for each


def fixed_map_energy(x: Tensor, y: Tensor, weight: Tensor, gram: Tensor | None, mean_x: Tensor, mean_y: Tensor) -> Tensor:
    """`Σ (y - mean_y - W (x - mean_x))²` over images, channels and positions, for a map that stays the same for many batches.

    With centred x, y: `Σ y² + Σ x · (Gx - 2 Wᵀy)` and its gradient `2 (Gx - Wᵀy)`, G = WᵀW. Forward and backward cost C (C + D) products a position
    instead of 2 C D, and nothing as wide as the target is held. The differences cost digits where almost all is explained, so the caller gives
    means that are near those of the features. Without G, and where a kernel needs no more for the residual itself, that is summed. Gradient to x
    only.

    Args:
        x: source, (N, C, H, W).
        y: target, (N, D, H, W).
        weight: W, (D, C).
        gram: WᵀW, (C, C); None where D is so small that it saves nothing.
        mean_x: (C,).
        mean_y: (D,).

    Returns:
        A scalar, float32 or float64.

    Raises:
        ShapeError: shapes that do not fit each other, or no images.

    Example:
        >>> x, y, weight = torch.randn(2, 3, 4, 4), torch.randn(2, 8, 4, 4), torch.randn(8, 3)
        >>> energy = fixed_map_energy(x, y, weight, weight.T @ weight, torch.zeros(3), torch.zeros(8))
        >>> torch.allclose(energy, (y - torch.einsum("dc,nchw->ndhw", weight, x)).square().sum(), rtol=1e-4)
        True
    """
    channels, wide = weight.shape[::-1] if weight.ndim == 2 else (0, 0)
    if (
        x.ndim != 4
        or y.ndim != 4
        or not x.numel()
        or (len(y), *y.shape[1:]) != (len(x), wide, *x.shape[2:])
        or x.shape[1] != channels
        or (mean_x.shape, mean_y.shape) != ((channels,), (wide,))
        or (gram is not None and gram.shape != (channels, channels))
    ):
        shapes = ", ".join("None" if tensor is None else str(tuple(tensor.shape)) for tensor in (x, y, weight, gram, mean_x, mean_y))
        raise ShapeError(f"expected x (N, C, H, W), y (N, D, H, W), weight (D, C), gram (C, C), means (C,) and (D,) with N, H, W > 0; got {shapes}")
    narrow = kernels.fits_residual_energy(x, y, weight[:, :, None, None])
    if narrow or gram is None or not (x.requires_grad and torch.is_grad_enabled()):
        map_ = weight.to(x.dtype).to(weight.dtype) if narrow else weight  # what the kernel multiplies by, so that it leaves no mean over
        return residual_energy(x, y, map_[:, :, None, None], torch.addmv(mean_y, map_, mean_x, alpha=-1))
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    total: Tensor = _parts(x if dense else x.contiguous(), y, weight, gram, mean_x, mean_y)[0]
    return total


@library.custom_op("knowiso::fixed_map_energy", mutates_args=())
def _parts(x: Tensor, y: Tensor, weight: Tensor, gram: Tensor, mean_x: Tensor, mean_y: Tensor) -> tuple[Tensor, Tensor]:
    """The energy, and the gradient of x."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with full_precision(x.device):
        map_, square = (matrix.to(dtype)[:, :, None, None] for matrix in (weight, gram))
        middle_x, middle_y = (mean.to(dtype).view(-1, 1, 1) for mean in (mean_x, mean_y))
        total = torch.zeros((), dtype=dtype, device=x.device)
        of_x = torch.empty_like(x, dtype=kept_dtype(x.dtype))
        for part in chunks(x, y[0].numel() * dtype.itemsize, max(CHUNK_BYTES, 4 * map_.nbytes)):
            source, target = x[part] - middle_x, y[part] - middle_y
            pulled, known = F.conv_transpose2d(target, map_), F.conv2d(source, square)
            total += _inner(target, target)
            total += _inner(source, known.sub_(pulled)) - _inner(source, pulled)
            torch.mul(known, 2, out=of_x[part])
    return total, of_x


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products; a CPU's `torch.dot` adds one after the other, which costs digits, a GPU's need not write the products."""
    if a.device.type == "cpu":
        return (a * b).sum()
    order = (0, 1, 2, 3) if a.is_contiguous() else (0, 2, 3, 1)
    return torch.dot(a.permute(order).flatten(), b.permute(order).flatten())


@_parts.register_fake
def _(x: Tensor, y: Tensor, weight: Tensor, gram: Tensor, mean_x: Tensor, mean_y: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.new_empty((), dtype=dtype), torch.empty_like(x, dtype=kept_dtype(x.dtype))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


def _pull(ctx: Any, upstream: Tensor, _: Any) -> tuple[Any, ...]:
    (of_x,) = ctx.saved_tensors
    return (scaled(of_x, upstream).to(ctx.dtype), *[None] * 5)


_parts.register_autograd(_pull, setup_context=_keep)
