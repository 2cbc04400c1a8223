"""Triton kernels of the gate."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from knowiso_train.ops.reference import EPS
from knowiso_train.ops.triton.autotune import autotuned

MAX_HELD_POSITIONS = 4096  # of a row held in registers; longer rows are read once more in each pass
MAX_VECTOR_WIDTH = 8  # values of one load
GATE_CONFIGS = [{"ROWS": r, "num_warps": w} for r, w in ((4, 4), (1, 4), (1, 8), (4, 2), (8, 2), (8, 4))]


@triton.jit
def _sum(ptr, at, step, mask, ORDERS: tl.constexpr):
    total = tl.load(ptr + at, mask, other=0.0).to(tl.float32)
    for j in tl.static_range(1, ORDERS):
        total += tl.load(ptr + j * step + at, mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _write(
    x_ptr, h_ptr, out_ptr, h, factor, of_x, of_h, of_out, hj, oj, mask, ORDERS: tl.constexpr, HAS_X: tl.constexpr
):
    for j in tl.static_range(ORDERS):
        part = h if ORDERS == 1 else tl.load(h_ptr + j * hj + of_h, mask, other=0.0).to(tl.float32)
        out = tl.where(h > 0, part, 0.0) * factor
        if HAS_X:
            out += tl.load(x_ptr + of_x, mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + j * oj + of_out, out.to(out_ptr.dtype.element_ty), mask)


@autotuned(GATE_CONFIGS, ["parts", "ALIGNED"])
@triton.jit
def _forward(
    x_ptr, h_ptr, out_ptr, scale_ptr, p_ptr, rows, parts, channels,
    xn, xc, xp, hn, hc, hp, hj, on, oc, op, oj,
    eps, ORDERS: tl.constexpr, HAS_X: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n, c = (row // channels).to(tl.int64), (row % channels).to(tl.int64)
    here = tl.arange(0, BLOCK)[None, :]
    positions, hj, oj = parts * ALIGNED, tl.cast(hj, tl.int64) * ALIGNED, tl.cast(oj, tl.int64) * ALIGNED
    of_h = tl.multiple_of(n * hn + c * hc, ALIGNED)[:, None] + here * hp
    of_x = tl.multiple_of(n * xn + c * xc, ALIGNED)[:, None] + here * xp
    of_out = tl.multiple_of(n * on + c * oc, ALIGNED)[:, None] + here * op
    live = (row < rows)[:, None]
    p = tl.load(p_ptr).to(tl.float32)

    if WHOLE:
        mask = live & (here < positions)
        h = _sum(h_ptr, of_h, hj, mask, ORDERS)
        apart = tl.where(mask, h - (tl.sum(h, 1) / positions)[:, None], 0.0)
        square = tl.sum(apart * apart, 1)
    else:
        mean = tl.zeros([ROWS], tl.float32)
        for start in range(0, positions, BLOCK):
            mean += tl.sum(_sum(h_ptr, of_h + start * hp, hj, live & (start + here < positions), ORDERS), 1)
        mean = mean / positions
        square = tl.zeros([ROWS], tl.float32)
        for start in range(0, positions, BLOCK):
            mask = live & (start + here < positions)
            apart = tl.where(mask, _sum(h_ptr, of_h + start * hp, hj, mask, ORDERS) - mean[:, None], 0.0)
            square += tl.sum(apart * apart, 1)
    scale = tl.where(positions == 1, 1.0, tl.sqrt(square / tl.maximum(positions - 1, 1)) + eps)
    tl.store(scale_ptr + row, scale, row < rows)

    factor = (p / scale)[:, None]
    if WHOLE:
        _write(x_ptr, h_ptr, out_ptr, h, factor, of_x, of_h, of_out, hj, oj, live & (here < positions), ORDERS, HAS_X)
    else:
        for start in range(0, positions, BLOCK):
            mask = live & (start + here < positions)
            h = _sum(h_ptr, of_h + start * hp, hj, mask, ORDERS)
            _write(
                x_ptr,
                h_ptr,
                out_ptr,
                h,
                factor,
                of_x + start * xp,
                of_h + start * hp,
                of_out + start * op,
                hj,
                oj,
                mask,
                ORDERS,
                HAS_X,
            )


@autotuned(GATE_CONFIGS, ["parts", "ALIGNED"])
@triton.jit
def _backward(
    up_ptr, h_ptr, scale_ptr, p_ptr, out_ptr, of_p_ptr, rows, parts, channels,
    un, uc, up, uj, hn, hc, hp, hj, on, oc, op, oj,
    ORDERS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n, c = (row // channels).to(tl.int64), (row % channels).to(tl.int64)
    here = tl.arange(0, BLOCK)[None, :]
    positions, uj, hj, oj = (
        parts * ALIGNED,
        tl.cast(uj, tl.int64) * ALIGNED,
        tl.cast(hj, tl.int64) * ALIGNED,
        tl.cast(oj, tl.int64) * ALIGNED,
    )
    of_u = tl.multiple_of(n * un + c * uc, ALIGNED)[:, None] + here * up
    of_h = tl.multiple_of(n * hn + c * hc, ALIGNED)[:, None] + here * hp
    of_out = tl.multiple_of(n * on + c * oc, ALIGNED)[:, None] + here * op
    inverse = 1 / tl.load(scale_ptr + row, row < rows, other=1.0)
    factor = (tl.load(p_ptr).to(tl.float32) * inverse)[:, None]
    pulled = tl.zeros([ROWS], tl.float32)
    for start in range(0, positions, BLOCK):
        mask = (row < rows)[:, None] & (start + here < positions)
        h = _sum(h_ptr, of_h + start * hp, hj, mask, ORDERS)
        for j in tl.static_range(ORDERS):
            upstream = tl.load(up_ptr + j * uj + of_u + start * up, mask, other=0.0).to(tl.float32)
            passed = tl.where(h > 0, upstream, 0.0)
            part = h if ORDERS == 1 else tl.load(h_ptr + j * hj + of_h + start * hp, mask, other=0.0).to(tl.float32)
            pulled += tl.sum(passed * part, 1)
            tl.store(out_ptr + j * oj + of_out + start * op, (passed * factor).to(out_ptr.dtype.element_ty), mask)
    tl.store(of_p_ptr + row, pulled * inverse, row < rows)


def _flat(tensor: Tensor) -> Tensor:
    """Reshape (…, H, W) to (…, H · W), without a copy if the strides allow it."""
    return tensor.flatten(-2)


def _launch(h: Tensor, *others: Tensor) -> tuple[tuple[int, ...], dict[str, Any], Any]:
    """Return sizes, constants and grid of a launch.

    All rows begin at a multiple of ALIGNED, the unit of the number of positions and of the strides of the orders. The
    compiler can then use vector loads.
    """
    *_, images, channels, positions = h.shape
    starts = [
        positions,
        *(number for tensor in (h, *others) for number in (tensor.storage_offset(), *tensor.stride()[:-1])),
    ]
    constants = {
        "BLOCK": triton.next_power_of_2(min(positions, MAX_HELD_POSITIONS)),
        "ALIGNED": math.gcd(MAX_VECTOR_WIDTH, *starts),
    }
    rows = images * channels
    return (
        (rows, positions // constants["ALIGNED"], channels),
        constants,
        lambda meta: (triton.cdiv(rows, meta["ROWS"]),),
    )


def _strides(tensor: Tensor, aligned: int) -> tuple[int, ...]:
    """Return the strides of images, channels, positions and orders."""
    orders, *rest = tensor.stride()
    return *rest, orders // aligned


def _run_forward(x: Tensor | None, orders: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(orders)
    scale = torch.empty(orders.shape[1:3], dtype=torch.float32, device=orders.device)
    h, into = _flat(orders), _flat(out)
    added = h[0] if x is None else _flat(x)
    sizes, constants, grid = _launch(h, into, added)
    strides = *added.stride(), *_strides(h, constants["ALIGNED"]), *_strides(into, constants["ALIGNED"])
    more = {"ORDERS": len(orders), "HAS_X": x is not None, "WHOLE": h.shape[-1] <= MAX_HELD_POSITIONS}
    with torch.cuda.device_of(h):  # type: ignore[no-untyped-call]
        _forward[grid](added, h, into, scale, p, *sizes, *strides, EPS, **more, **constants)
    return out, scale


def _run_backward(upstream: Tensor, orders: Tensor, scale: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(orders)
    up, h, into = _flat(upstream), _flat(orders), _flat(out)
    sizes, constants, grid = _launch(h, up, into)
    of_p = torch.empty(sizes[0], dtype=torch.float32, device=orders.device)
    strides = [stride for tensor in (up, h, into) for stride in _strides(tensor, constants["ALIGNED"])]
    with torch.cuda.device_of(h):  # type: ignore[no-untyped-call]
        _backward[grid](up, h, scale, p, into, of_p, *sizes, *strides, ORDERS=len(orders), **constants)
    return out, of_p.sum().to(p.dtype)


def forward(x: Tensor | None, h: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x + p · ReLU(h / σ(h))` and σ (N, C)."""
    out, scale = _run_forward(x, h[None], p)
    return out[0], scale


def backward(upstream: Tensor, h: Tensor, scale: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of h and p."""
    of_h, of_p = _run_backward(upstream[None], h[None], scale, p)
    return of_h[0], of_p


def orders_forward(orders: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Return `D · x^(j)` and σ (N, C) of the sum."""
    return _run_forward(None, orders, p)


def orders_backward(upstream: Tensor, orders: Tensor, scale: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the components and of p."""
    return _run_backward(upstream, orders, scale, p)
