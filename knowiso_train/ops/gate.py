"""Gate of the paper's recursion (arXiv 1908.01581, section 3), and its variant for all orders side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from knowiso_train.errors import ShapeError
from knowiso_train.ops.reference import EPS, channel_scale
from knowiso_train.ops.triton import dispatch as kernels

GATE_CHUNK_BYTES = 2**19  # of signal, which is read several times while it is in the cache


def gate(x: Tensor | None, h: Tensor, p: Tensor) -> Tensor:
    """Return `x + p · ReLU(h / σ(h))`, with σ per image and channel and without gradient.

    Only h and σ are kept for the backward pass, which recomputes the rest.

    Args:
        x: Addend, (N, C, H, W); None for the gated signal alone.
        h: Output of the previous linear map, (N, C, H, W).
        p: Scalar in (0, 1).

    Returns:
        (N, C, H, W), the dtype of `h`.

    Raises:
        ShapeError: Shapes that do not fit each other, or empty tensors.

    Examples:
        >>> gate(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 4.0), torch.tensor(0.5)).item()
        2.0
    """
    if h.ndim != 4 or not h.numel() or (x is not None and x.shape != h.shape) or p.ndim:
        x_shape = None if x is None else tuple(x.shape)
        raise ShapeError(
            "expected x and h (N, C, H, W) of one shape, not empty, and a scalar p; "
            f"got {x_shape}, {tuple(h.shape)} and {tuple(p.shape)}"
        )
    if x is not None and x.dtype != h.dtype:
        x = x.to(h.dtype)
    dense = h.is_contiguous() or h.is_contiguous(memory_format=torch.channels_last)
    out: Tensor = _gate(x, h if dense else h.contiguous(), p)[0]
    return out


def gate_orders(orders: Tensor, p: Tensor) -> Tensor:
    """Return `D · x^(j)` for every component, with the gate `D = p · 1[h > 0] / σ(h)` of their sum h held constant.

    Args:
        orders: Components that sum to h, (J, N, C, H, W).
        p: Scalar in (0, 1).

    Returns:
        (J, N, C, H, W).

    Raises:
        ShapeError: Another number of axes, or empty tensors.

    Examples:
        >>> parts = torch.stack([torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 1.0)])
        >>> gate_orders(parts, torch.tensor(0.5)).flatten().tolist()
        [1.5, 0.5]
    """
    if orders.ndim != 5 or not orders.numel() or p.ndim:
        raise ShapeError(
            "expected orders (J, N, C, H, W), not empty, and a scalar p; "
            f"got {tuple(orders.shape)} and {tuple(p.shape)}"
        )
    out: Tensor = _gate_orders(orders.contiguous(), p)[0]
    return out


def _chunks(images: int, size: int) -> list[slice]:
    """Return slices of images of `size` bytes each."""
    step = max(1, GATE_CHUNK_BYTES // max(size, 1))
    return [slice(start, start + step) for start in range(0, images, step)]


def _scale(h: Tensor) -> Tensor:
    """Return σ of `reference.channel_scale` in float32 or better, (N, C, 1, 1).

    Two passes over data in the cache are twice as fast as Welford's single pass.
    """
    dtype, positions = torch.promote_types(h.dtype, torch.float32), h.shape[2] * h.shape[3]
    if positions == 1 or h.dtype != dtype:
        return channel_scale(h.to(dtype))
    flat = h.flatten(2)
    centered = flat - flat.mean(2, keepdim=True)
    scale: Tensor = torch.linalg.vecdot(centered, centered).div_(positions - 1).sqrt_().add_(EPS)
    return scale[:, :, None, None]


@library.custom_op("knowiso::gate", mutates_args=())
def _gate(x: Tensor | None, h: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    if (triton_kernels := kernels.gate_kernels(h)) is not None:
        result: tuple[Tensor, Tensor] = triton_kernels.forward(x, h, p)
        return result
    out, scales = torch.empty_like(h), []
    for part in _chunks(len(h), h[0].nbytes):
        scale = _scale(h[part])
        # p ReLU(h / σ) = (p / σ) ReLU(h), as σ > 0. Half precision has no room for 1 / σ of a constant map
        gated = h[part].clamp(min=0).to(scale.dtype).mul_(p.to(scale.dtype) / scale)
        out[part] = gated if x is None else gated.add_(x[part])
        scales.append(scale.flatten(1))
    return out, torch.cat(scales)


@_gate.register_fake
def _(x: Tensor | None, h: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), h.new_empty(h.shape[:2], dtype=torch.promote_types(h.dtype, torch.float32))


@library.custom_op("knowiso::gate_backward", mutates_args=())
def _gate_backward(upstream: Tensor, h: Tensor, scale: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    if (triton_kernels := kernels.gate_kernels(h)) is not None:
        result: tuple[Tensor, Tensor] = triton_kernels.backward(upstream, h, scale, p)
        return result
    # With the upstream gradient u: ∂/∂h = (p / σ) u 1[h > 0], ∂/∂p = Σ u 1[h > 0] h / σ
    masked = torch.ops.aten.threshold_backward(upstream, h, 0).to(scale.dtype)
    products = torch.linalg.vecdot(masked.flatten(2), h.to(scale.dtype).flatten(2))
    grad_p = (products / scale).sum().to(p.dtype)
    return masked.mul_((p.to(scale.dtype) / scale)[:, :, None, None]).to(h.dtype), grad_p


@_gate_backward.register_fake
def _(upstream: Tensor, h: Tensor, scale: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), torch.empty_like(p)


def _save_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *_, h, p = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(h, output[1], p)


def _gate_autograd(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
    grad_h, grad_p = _gate_backward(upstream, *ctx.saved_tensors)
    return (upstream if ctx.needs_input_grad[0] else None), grad_h, grad_p


_gate.register_autograd(_gate_autograd, setup_context=_save_context)


@library.custom_op("knowiso::gate_orders", mutates_args=())
def _gate_orders(orders: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    if (triton_kernels := kernels.gate_kernels(orders)) is not None:
        result: tuple[Tensor, Tensor] = triton_kernels.orders_forward(orders, p)
        return result
    out, scales = torch.empty_like(orders), []
    for part in _chunks(orders.shape[1], orders[0, 0].nbytes):
        h = orders[:, part].sum(0)
        scale = _scale(h)
        factor = (h > 0).to(scale.dtype).mul_(p.to(scale.dtype) / scale)
        torch.mul(orders[:, part], factor, out=out[:, part])
        scales.append(scale.flatten(1))
    return out, torch.cat(scales)


@_gate_orders.register_fake
def _(orders: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(orders), orders.new_empty(
        orders.shape[1:3], dtype=torch.promote_types(orders.dtype, torch.float32)
    )


@library.custom_op("knowiso::gate_orders_backward", mutates_args=())
def _gate_orders_backward(upstream: Tensor, orders: Tensor, scale: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    if (triton_kernels := kernels.gate_kernels(orders)) is not None:
        result: tuple[Tensor, Tensor] = triton_kernels.orders_backward(upstream, orders, scale, p)
        return result
    # With the upstream gradients u_j: ∂/∂x_j = D u_j, ∂/∂p = Σ_j u_j 1[h > 0] x_j / σ
    grad_orders, grad_p = torch.empty_like(orders), torch.zeros((), dtype=scale.dtype, device=p.device)
    for part in _chunks(orders.shape[1], orders[0, 0].nbytes):
        mask = (orders[:, part].sum(0) > 0).to(scale.dtype)
        masked = upstream[:, part] * mask
        products = torch.linalg.vecdot(masked.flatten(3), orders[:, part].to(scale.dtype).flatten(3))
        grad_p += (products / scale[part]).sum()
        factor = (p.to(scale.dtype) / scale[part])[:, :, None, None]
        torch.mul(masked, factor, out=grad_orders[:, part])
    return grad_orders, grad_p.to(p.dtype)


@_gate_orders_backward.register_fake
def _(upstream: Tensor, orders: Tensor, scale: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(orders), torch.empty_like(p)


def _gate_orders_autograd(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _gate_orders_backward(upstream, *ctx.saved_tensors)
    return result


_gate_orders.register_autograd(_gate_orders_autograd, setup_context=_save_context)
