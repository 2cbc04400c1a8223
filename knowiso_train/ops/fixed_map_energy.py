"""Energy of what a fixed 1x1 map leaves over, from its Gram matrix: one product with the wide target where the residual needs two."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from knowiso_train.errors import ShapeError

CHUNK_BYTES = 4 * 2**20  # of centred target that is alive at once


def fixed_map_energy(x: Tensor, y: Tensor, weight: Tensor, gram: Tensor, mean_x: Tensor, mean_y: Tensor) -> Tensor:
    """`Σ (y - mean_y - W (x - mean_x))²` over images, channels and positions, for a map that stays the same for many batches.

    With centred x, y: `Σ y² + Σ x · (Gx - 2 Wᵀy)` and its gradient `2 (Gx - Wᵀy)`, G = WᵀW. Forward and backward cost C (C + D) products a position
    instead of 2 C D, and nothing as wide as the target is held. The differences cost digits where almost all is explained, so the caller gives
    means that are near those of the features. Gradient to x only.

    Args:
        x: source, (N, C, H, W).
        y: target, (N, D, H, W).
        weight: W, (D, C).
        gram: WᵀW, (C, C).
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
        or (gram.shape, mean_x.shape, mean_y.shape) != ((channels, channels), (channels,), (wide,))
    ):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, y, weight, gram, mean_x, mean_y))
        raise ShapeError(f"expected x (N, C, H, W), y (N, D, H, W), weight (D, C), gram (C, C), means (C,) and (D,) with N, H, W > 0; got {shapes}")
    result: Tensor = _FixedMapEnergy.apply(x, y, weight, gram, mean_x, mean_y)
    return result


class _FixedMapEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, gram: Tensor, mean_x: Tensor, mean_y: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if x.is_cuda else nullcontext()  # differences of large sums
        with torch.autocast(x.device.type, enabled=False), exact:
            map_, square = (matrix.to(dtype)[:, :, None, None] for matrix in (weight, gram))
            middle_x, middle_y = (mean.to(dtype).view(-1, 1, 1) for mean in (mean_x, mean_y))
            total = torch.zeros((), dtype=dtype, device=x.device)
            of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
            step = max(1, CHUNK_BYTES // (y[0].numel() * dtype.itemsize))
            for part in (slice(start, start + step) for start in range(0, len(x), step)):
                source, target = x[part].to(dtype) - middle_x, y[part].to(dtype) - middle_y
                pulled, known = F.conv_transpose2d(target, map_), F.conv2d(source, square)
                total += target.square_().sum() + (source * (known - 2 * pulled)).sum()
                if of_x is not None:
                    of_x[part] = known.sub_(pulled).mul_(2)
        ctx.save_for_backward(of_x)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (of_x,) = ctx.saved_tensors
        return (None if of_x is None else of_x * upstream.to(of_x.dtype), None, None, None, None, None)
