"""Energy of the residual of a linear map, from the residual itself or, for a fixed map, from its Gram matrix."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.nn.grad import conv2d_input, conv2d_weight

from knowiso_train.errors import OptionError, ShapeError
from knowiso_train.ops.linalg import chunk_slices, full_precision
from knowiso_train.ops.triton import dispatch as kernels

# Bytes of residual, or of centered target, in memory at once on a CPU, to stay in the cache. At least four times the
# map is used, as every chunk reads the map.
ENERGY_CHUNK_BYTES = 2**20
GRAM_CHUNK_BYTES = 2**20

EnergyTerms = tuple[Tensor, Tensor, Tensor, Tensor]


def residual_energy(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None, channel_weight: Tensor | None = None
) -> Tensor:
    """Return `Σ w_c (y - conv(x, weight) - bias)²` over images, channels and positions.

    The residual is computed in chunks, and the gradients with it in the forward pass. The tensors kept for the backward
    pass are therefore as large as x, weight and bias, not as the residual. Half precision is summed in float32. A
    bfloat16 source is multiplied in bfloat16 by a map over neighbors without gradient. y and the channel weights get no
    gradient.

    Args:
        x: Source, (N, C, H, W).
        y: Target, (N, D, H, W).
        weight: (D, C, k, k), k odd; zero padding keeps the grid.
        bias: (D,). Default: 0.
        channel_weight: w, (D,). Default: 1.

    Returns:
        A scalar, float32 or float64.

    Raises:
        ShapeError: Shapes that do not fit each other, or no images.

    Examples:
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
    needs_grad = [
        tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in (x, weight, bias)
    ]
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    total: Tensor = _energy_terms(x if dense else x.contiguous(), y, weight, bias, channel_weight, *needs_grad)[0]
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
) -> EnergyTerms:
    """Return the energy and the requested gradients; the others are empty."""
    if not (of_weight or of_bias) and (kernel := kernels.residual_energy_kernel(x, y, weight)) is not None:
        energy, grad_x = kernel.energy_and_gradient(x, y, weight, bias, channel_weight, of_x)
        bias_dtype = torch.float32 if bias is None else gradient_dtype(bias.dtype)
        return (
            energy,
            grad_x,
            weight.new_empty(0, dtype=gradient_dtype(weight.dtype)),
            weight.new_empty(0, dtype=bias_dtype),
        )
    with torch.autocast(x.device.type, enabled=False):
        return _energy_in_chunks(x, y, weight, bias, channel_weight, of_x, of_weight, of_bias)


def _energy_in_chunks(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channel_weight: Tensor | None,
    of_x: bool,
    of_weight: bool,
    of_bias: bool,
) -> EnergyTerms:
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    # If a map over neighbors needs no gradient, it is rounded to bfloat16 as the source is. Products are then two to
    # three times as fast on a CPU with bfloat16 units. The additional error is of the size of that from rounding the
    # source. Maps of one position are not rounded, since their bias belongs to the exact map
    rounded = x.dtype == torch.bfloat16 and dtype == torch.float32 and not (of_weight or of_bias)
    rounded = rounded and weight.shape[-1] > 1
    product_dtype = torch.bfloat16 if rounded else dtype
    kernel, shift = weight.to(product_dtype), None if bias is None else bias.to(product_dtype)
    total = torch.zeros((), dtype=dtype, device=x.device)
    # With the residual r = conv(x, W) + b - y: E = Σ w r²,
    # ∂E/∂x = 2 convᵀ(w r, W), ∂E/∂W = 2 Σ x ⋆ (w r), ∂E/∂b = 2 Σ w r
    grad_x = (
        torch.empty_like(x, dtype=gradient_dtype(x.dtype)) if of_x else x.new_empty(0, dtype=gradient_dtype(x.dtype))
    )
    grad_weight = torch.zeros_like(kernel, memory_format=torch.contiguous_format) if of_weight else kernel.new_empty(0)
    grad_bias = torch.zeros(len(kernel) if of_bias else 0, dtype=dtype, device=x.device)
    pad = weight.shape[-1] // 2
    for part in chunk_slices(x, y[0].numel() * dtype.itemsize, max(ENERGY_CHUNK_BYTES, 4 * kernel.nbytes)):
        source = x[part].to(product_dtype)
        residual = F.conv2d(source, kernel, shift, padding=pad).to(dtype).sub_(y[part])
        weighted = residual if channel_weight is None else residual * channel_weight.to(dtype).view(-1, 1, 1)
        total += torch.dot(residual.flatten(), weighted.flatten())
        if of_x:
            grad = conv2d_input(source.shape, kernel, weighted.to(product_dtype), padding=pad)  # type: ignore[no-untyped-call]
            grad_x[part] = grad.mul_(2)
        if of_weight:
            grad_weight += conv2d_weight(source, kernel.shape, weighted, padding=pad)  # type: ignore[no-untyped-call]
        if of_bias:
            grad_bias += weighted.sum((0, 2, 3))
    return (
        total,
        grad_x,
        grad_weight.mul_(2).to(gradient_dtype(weight.dtype)),
        grad_bias.mul_(2).to(dtype if bias is None else gradient_dtype(bias.dtype)),
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
) -> EnergyTerms:
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return (
        x.new_empty((), dtype=dtype),
        torch.empty_like(x, dtype=gradient_dtype(x.dtype)) if of_x else x.new_empty(0, dtype=gradient_dtype(x.dtype)),
        weight.new_empty(weight.shape if of_weight else 0, dtype=gradient_dtype(weight.dtype)),
        x.new_empty(len(weight) if of_bias else 0, dtype=dtype if bias is None else gradient_dtype(bias.dtype)),
    )


def _save_context(ctx: Any, inputs: tuple[Any, ...], output: EnergyTerms) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.needs_grad = inputs[5:]
    ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in (inputs[0], inputs[2], inputs[3]))


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    of_x, of_weight, of_bias = (
        scale_saved_gradient(gradient, upstream).to(dtype) if needs_grad else None
        for gradient, needs_grad, dtype in zip(ctx.saved_tensors, ctx.needs_grad, ctx.dtypes, strict=True)
    )
    return of_x, None, of_weight, of_bias, None, None, None, None


_energy_terms.register_autograd(_backward, setup_context=_save_context)


def gram_residual_energy(
    x: Tensor, y: Tensor, weight: Tensor, gram: Tensor | None, mean_x: Tensor, mean_y: Tensor
) -> Tensor:
    """Return `Σ (y - mean_y - W (x - mean_x))²` for a map that is constant over many batches; only x has a gradient.

    With centered x, y and G = WᵀW, this is `Σ y² + Σ x · (Gx - 2 Wᵀy)`, and its gradient is `2 (Gx - Wᵀy)`. Forward and
    backward together cost C (C + D) products a position instead of 2 C D, and no residual as wide as the target is
    stored. The differences cancel digits if nearly all is explained, so the means should be close to those of the
    features. Without G, or with a Triton kernel for the residual, the residual itself is summed.

    Args:
        x: Source, (N, C, H, W).
        y: Target, (N, D, H, W).
        weight: W, (D, C).
        gram: WᵀW, (C, C). None: the map is too narrow for a gain.
        mean_x: (C,).
        mean_y: (D,).

    Returns:
        A scalar, float32 or float64.

    Raises:
        ShapeError: Shapes that do not fit each other, or no images.

    Examples:
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
            "expected x (N, C, H, W), y (N, D, H, W), weight (D, C), gram (C, C), means (C,) and (D,) with "
            f"N, H, W > 0; got {shapes}"
        )
    has_kernel = kernels.supports_residual_energy(x, y, weight[:, :, None, None])
    if has_kernel or gram is None or not (x.requires_grad and torch.is_grad_enabled()):
        # The kernel rounds the map to the source's dtype. The bias mean_y - W mean_x has to use the rounded map.
        map_ = weight.to(x.dtype).to(weight.dtype) if has_kernel else weight
        return residual_energy(x, y, map_[:, :, None, None], torch.addmv(mean_y, map_, mean_x, alpha=-1))
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    total: Tensor = _gram_energy(x if dense else x.contiguous(), y, weight, gram, mean_x, mean_y)[0]
    return total


@library.custom_op("knowiso::fixed_map_energy", mutates_args=())
def _gram_energy(
    x: Tensor, y: Tensor, weight: Tensor, gram: Tensor, mean_x: Tensor, mean_y: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the energy and the gradient of x."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with full_precision(x.device):
        map_, square = (matrix.to(dtype)[:, :, None, None] for matrix in (weight, gram))
        middle_x, middle_y = (mean.to(dtype).view(-1, 1, 1) for mean in (mean_x, mean_y))
        total = torch.zeros((), dtype=dtype, device=x.device)
        of_x = torch.empty_like(x, dtype=gradient_dtype(x.dtype))
        for part in chunk_slices(x, y[0].numel() * dtype.itemsize, max(GRAM_CHUNK_BYTES, 4 * map_.nbytes)):
            source, target = x[part] - middle_x, y[part] - middle_y
            # E = y·y + x·(Gx - Wᵀy) - x·Wᵀy
            back_projection, gradient = F.conv_transpose2d(target, map_), F.conv2d(source, square)
            total += _inner(target, target)
            total += _inner(source, gradient.sub_(back_projection)) - _inner(source, back_projection)
            torch.mul(gradient, 2, out=of_x[part])
    return total, of_x


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of products.

    `torch.dot` adds sequentially on a CPU, which costs digits; on a GPU it avoids a tensor of products.
    """
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
    """Return the dtype of a gradient that is saved before its upstream factor is known.

    In float16 the sum would overflow before a mean is taken, and a factor of 1 / n would underflow.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def scale_saved_gradient(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Return a gradient saved in the forward pass times the upstream gradient of its scalar.

    The product is in place if this backward frees the graph. A copy would be the only large tensor of the backward
    pass.

    Raises:
        OptionError: A second derivative is requested.
    """
    if type(gradient) is Tensor and torch.is_grad_enabled():
        raise OptionError(
            "this operation has no second derivative, which create_graph=True requests (gradient penalties, Hessians); "
            "leave the isomorphism loss out of the term that is differentiated twice"
        )
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    factor = upstream.to(gradient.dtype)
    # A subclass of Tensor means that the operation is being traced
    if type(gradient) is not Tensor or keeps_graph is None or keeps_graph():
        return gradient * factor
    return gradient.mul_(factor)
