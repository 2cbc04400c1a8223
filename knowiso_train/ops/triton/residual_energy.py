"""Triton kernel of the residual energy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from knowiso_train.ops.residual_energy import gradient_dtype
from knowiso_train.ops.triton.autotune import autotuned
from knowiso_train.ops.triton.dispatch import interpreted

RESIDUAL_ENERGY_CONFIGS = [
    {"BLOCK_P": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2},
    {"BLOCK_P": 64, "BLOCK_D": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_P": 128, "BLOCK_D": 32, "num_warps": 8, "num_stages": 2},
    {"BLOCK_P": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 1},
]


@autotuned(RESIDUAL_ENERGY_CONFIGS, ["C", "D", "WANTED"])
@triton.jit
def _kernel(
    x_ptr, y_ptr, w_ptr, bias_ptr, channel_ptr, of_x_ptr, energy_ptr, total, positions, C, D,
    xn, xc, xp, yn, yc, yp, gn, gc, gp,
    HAS_BIAS: tl.constexpr, HAS_CHANNEL: tl.constexpr, WANTED: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n, cell = (at // positions).to(tl.int64), (at % positions).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = (at < total)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + (n * xn + cell * xp)[:, None] + (c * xc)[None, :], inside, other=0.0).to(FACTOR)
    energy = tl.zeros([BLOCK_P], tl.float32)
    of_x = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        w = (
            tl.load(w_ptr + (d * C)[:, None] + c[None, :], (d < D)[:, None] & (c < C)[None, :], other=0.0)
            .to(tl.bfloat16)
            .to(FACTOR)
        )
        mask = (at < total)[:, None] & (d < D)[None, :]
        residual = tl.dot(x, tl.trans(w))
        if HAS_BIAS:
            residual += tl.load(bias_ptr + d, d < D, other=0.0).to(tl.float32)[None, :]
        y = tl.load(y_ptr + (n * yn + cell * yp)[:, None] + (d * yc)[None, :], mask, other=0.0).to(tl.float32)
        residual = tl.where(mask, residual - y, 0.0)
        pulled = residual
        if HAS_CHANNEL:
            pulled = residual * tl.load(channel_ptr + d, d < D, other=0.0).to(tl.float32)[None, :]
        energy += tl.sum(residual * pulled, 1)
        if WANTED:
            of_x += tl.dot(pulled.to(tl.bfloat16).to(FACTOR), w)
    tl.store(energy_ptr + at, energy, at < total)
    if WANTED:
        tl.store(
            of_x_ptr + (n * gn + cell * gp)[:, None] + (c * gc)[None, :],
            (2 * of_x).to(of_x_ptr.dtype.element_ty),
            inside,
        )


def energy_and_gradient(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, channel_weight: Tensor | None, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return `Σ w_c (y - W x - b)²`, and its gradient with respect to x if `needs_grad`, else an empty tensor."""
    channels, width = weight.shape[1], weight.shape[0]
    source, target = x.flatten(2), y.flatten(2)
    positions = source.shape[2]
    total = len(x) * positions
    of_x = (
        torch.empty_like(x, dtype=gradient_dtype(x.dtype))
        if needs_grad
        else x.new_empty(0, dtype=gradient_dtype(x.dtype))
    )
    into = of_x.flatten(2) if needs_grad else source
    energy = torch.empty(total, dtype=torch.float32, device=x.device)
    map_ = weight.reshape(width, channels).contiguous()
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _kernel[lambda meta: (triton.cdiv(total, meta["BLOCK_P"]),)](
            source, target, map_,
            map_ if bias is None else bias, map_ if channel_weight is None else channel_weight, into, energy,
            total, positions, channels, width, *source.stride(), *target.stride(), *into.stride(),
            HAS_BIAS=bias is not None, HAS_CHANNEL=channel_weight is not None, WANTED=needs_grad,
            # The interpreter multiplies bfloat16 wrongly
            FACTOR=tl.float32 if interpreted() else tl.bfloat16,
            BLOCK_C=max(16, triton.next_power_of_2(channels)),
        )  # fmt: skip
    return energy.sum(), of_x
