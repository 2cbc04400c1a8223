"""Energy of a residual under a linear map: products of the map, or its Gram matrix where the map is fixed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.nn.grad import conv2d_input, conv2d_weight

from knowiso_train.errors import OptionError, ShapeError
from knowiso_train.ops.linalg import chunk_slices, full_precision
from knowiso_train.ops.triton import dispatch as kernels

# Of residual that is alive at once on a CPU, so that it stays in the cache, but four times the map, which is read for
# each
ENERGY_CHUNK_BYTES = 2**20
Parts = tuple[Tensor, Tensor, Tensor, Tensor]

# Of centered target that is alive at once on a CPU, but four times the map, which is read for each
GRAM_CHUNK_BYTES = 2**20


def residual_energy(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None, channel_weight: Tensor | None = None
) -> Tensor:
    """`Σ w_c (y - conv(x, weight) - bias)²` over images, channels and positions.

    The residual is made in chunks, and the gradients with it in the forward pass, so what is kept for backward is as
    large as x (and weight, bias),
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
    total: Tensor = _energy_terms(x if dense else x.contiguous(), y, weight, bias, channel_weight, *learned)[0]
    return total


@library.custom_op("knowiso::residual_energy", mutates_args=())
def _energy_terms(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channel_weight: Tensor | None,
    of_x: bool,
    of_weight: bool,
    of_bias: bool,
) -> Parts:
    """The energy, and the gradients that are wanted; the others are empty."""
    if not (of_weight or of_bias) and (found := kernels.residual_energy_kernel(x, y, weight)) is not None:
        energy, pulled_x = found.energy_and_gradient(x, y, weight, bias, channel_weight, of_x)
        of_bias_dtype = torch.float32 if bias is None else gradient_dtype(bias.dtype)
        return (
            energy,
            pulled_x,
            weight.new_empty(0, dtype=gradient_dtype(weight.dtype)),
            weight.new_empty(0, dtype=of_bias_dtype),
        )
    with torch.autocast(x.device.type, enabled=False):
        return _chunked(x, y, weight, bias, channel_weight, of_x, of_weight, of_bias)


def _chunked(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channel_weight: Tensor | None,
    of_x: bool,
    of_weight: bool,
    of_bias: bool,
) -> Parts:
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    kernel, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
    total = torch.zeros((), dtype=dtype, device=x.device)
    by_x = torch.empty_like(x, dtype=gradient_dtype(x.dtype)) if of_x else x.new_empty(0, dtype=gradient_dtype(x.dtype))
    by_weight = torch.zeros_like(kernel, memory_format=torch.contiguous_format) if of_weight else kernel.new_empty(0)
    by_bias = torch.zeros(len(kernel) if of_bias else 0, dtype=dtype, device=x.device)
    pad = weight.shape[-1] // 2
    for part in chunk_slices(x, y[0].numel() * dtype.itemsize, max(ENERGY_CHUNK_BYTES, 4 * kernel.nbytes)):
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
    return (
        total,
        by_x,
        by_weight.mul_(2).to(gradient_dtype(weight.dtype)),
        by_bias.mul_(2).to(dtype if bias is None else gradient_dtype(bias.dtype)),
    )


@_energy_terms.register_fake
def _(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channel_weight: Tensor | None,
    of_x: bool,
    of_weight: bool,
    of_bias: bool,
) -> Parts:
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return (
        x.new_empty((), dtype=dtype),
        torch.empty_like(x, dtype=gradient_dtype(x.dtype)) if of_x else x.new_empty(0, dtype=gradient_dtype(x.dtype)),
        weight.new_empty(weight.shape if of_weight else 0, dtype=gradient_dtype(weight.dtype)),
        x.new_empty(len(weight) if of_bias else 0, dtype=dtype if bias is None else gradient_dtype(bias.dtype)),
    )


def _save_context(ctx: Any, inputs: tuple[Any, ...], output: Parts) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.wanted = inputs[5:]
    ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in (inputs[0], inputs[2], inputs[3]))


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    of_x, of_weight, of_bias = (
        scale_saved_gradient(kept, upstream).to(dtype) if wanted else None
        for kept, wanted, dtype in zip(ctx.saved_tensors, ctx.wanted, ctx.dtypes, strict=True)
    )
    return of_x, None, of_weight, of_bias, None, None, None, None


_energy_terms.register_autograd(_backward, setup_context=_save_context)


def gram_residual_energy(
    x: Tensor, y: Tensor, weight: Tensor, gram: Tensor | None, mean_x: Tensor, mean_y: Tensor
) -> Tensor:
    """`Σ (y - mean_y - W (x - mean_x))²` over images, channels and positions, for a map that stays the same for many batches.

    With centered x, y: `Σ y² + Σ x · (Gx - 2 Wᵀy)` and its gradient `2 (Gx - Wᵀy)`, G = WᵀW. Forward and backward cost C
        (C + D) products a position
    instead of 2 C D, and nothing as wide as the target is held. The differences cost digits where almost all is
    explained, so the caller gives
    means that are near those of the features. Without G, and where a kernel needs no more for the residual itself, that
    is summed. Gradient to x
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
        >>> energy = gram_residual_energy(x, y, weight, weight.T @ weight, torch.zeros(3), torch.zeros(8))
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
        shapes = ", ".join(
            "None" if tensor is None else str(tuple(tensor.shape)) for tensor in (x, y, weight, gram, mean_x, mean_y)
        )
        raise ShapeError(
            f"expected x (N, C, H, W), y (N, D, H, W), weight (D, C), gram (C, C), means (C,) and (D,) with N, H, W > 0; got {shapes}"
        )
    narrow = kernels.supports_residual_energy(x, y, weight[:, :, None, None])
    if narrow or gram is None or not (x.requires_grad and torch.is_grad_enabled()):
        # What the kernel multiplies by, so that it leaves no mean over
        map_ = weight.to(x.dtype).to(weight.dtype) if narrow else weight
        return residual_energy(x, y, map_[:, :, None, None], torch.addmv(mean_y, map_, mean_x, alpha=-1))
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    total: Tensor = _gram_energy(x if dense else x.contiguous(), y, weight, gram, mean_x, mean_y)[0]
    return total


@library.custom_op("knowiso::fixed_map_energy", mutates_args=())
def _gram_energy(
    x: Tensor, y: Tensor, weight: Tensor, gram: Tensor, mean_x: Tensor, mean_y: Tensor
) -> tuple[Tensor, Tensor]:
    """The energy, and the gradient of x."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with full_precision(x.device):
        map_, square = (matrix.to(dtype)[:, :, None, None] for matrix in (weight, gram))
        middle_x, middle_y = (mean.to(dtype).view(-1, 1, 1) for mean in (mean_x, mean_y))
        total = torch.zeros((), dtype=dtype, device=x.device)
        of_x = torch.empty_like(x, dtype=gradient_dtype(x.dtype))
        for part in chunk_slices(x, y[0].numel() * dtype.itemsize, max(GRAM_CHUNK_BYTES, 4 * map_.nbytes)):
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


@_gram_energy.register_fake
def _(x: Tensor, y: Tensor, weight: Tensor, gram: Tensor, mean_x: Tensor, mean_y: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.new_empty((), dtype=dtype), torch.empty_like(x, dtype=gradient_dtype(x.dtype))


def _save_gram_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


def _gram_backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Any, ...]:
    (of_x,) = ctx.saved_tensors
    return (scale_saved_gradient(of_x, upstream).to(ctx.dtype), *[None] * 5)


_gram_energy.register_autograd(_gram_backward, setup_context=_save_gram_context)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a gradient waits for its factor: before the mean is taken, float16 would overflow, and a factor of 1 / n would vanish in it."""
    return torch.float32 if dtype == torch.float16 else dtype


def scale_saved_gradient(kept: Tensor, upstream: Tensor) -> Tensor:
    """A gradient from the forward pass times what arrives at its scalar: in place where the graph goes with this backward, else a copy.

    A copy is as large as the feature, and the only large thing that such a backward would make.
    """
    if type(kept) is Tensor and torch.is_grad_enabled():
        raise OptionError(
            "a gradient of a gradient through this operation is not made: create_graph=True, as gradient penalties and Hessians need it. Leave the "
            "isomorphism loss out of what is differentiated twice"
        )
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    factor = upstream.to(kept.dtype)
    if type(kept) is not Tensor or keeps_graph is None or keeps_graph():  # another type: being traced
        return kept * factor
    return kept.mul_(factor)
