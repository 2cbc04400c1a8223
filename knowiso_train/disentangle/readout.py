"""Readouts on a sample: what an order predicts there, and its exact optimum for given hidden maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.disentangle.closed_form import ClosedFormMaps
from knowiso_train.disentangle.ridge import solve_ridge
from knowiso_train.ops import conv_weight
from knowiso_train.statistics import Moments, Sample, StreamingMoments

BATCH_ROWS = 16_384


def batches(sample: Sample) -> list[Tensor]:
    """Indices of the sample in batches of a bounded number of positions."""
    per_image = sample.y.shape[2] * sample.y.shape[3]
    return list(torch.split(torch.arange(len(sample), device=sample.x.device), max(1, BATCH_ROWS // per_image)))


def interior(a: Tensor, margin: int) -> Tensor:
    """Without a margin of that many positions on every side."""
    return a if margin == 0 else a[:, :, margin:-margin, margin:-margin]


@torch.no_grad()
def predicted(maps: ClosedFormMaps, order: int, sample: Sample) -> Tensor:
    """x^(order) on the sample's targets."""
    parts = []
    for index in batches(sample):
        part = sample.batch(index)
        out = maps.linear(part.x) if order == 0 else maps.readout(order, maps.regressors(part.x, order, part.inside))
        parts.append(interior(out, sample.halo))
    return torch.cat(parts)


@torch.no_grad()
def solve_readout(maps: ClosedFormMaps, order: int, fit: Sample, select: Sample | None, ridge: float | str) -> float:
    """Set the readouts of an order ≥ 1 to `V_k ã_k` with V_k at its optimum for `fit.y`, what is left over.

    ã_k is a_k with all that x, a_1, …, a_{k-1} explain linearly taken out, so that at ridge 0 the component is orthogonal to all below.

    Returns:
        The relative ridge used.
    """
    widths = [conv.in_channels for conv in maps.readouts_of(order)]
    blocks = _blocks(widths, maps.kernel_size).to(fit.x.device)
    columns = sum(widths[:-1]) * maps.kernel_size**2
    m = _ordered(order_moments(maps, order, fit), blocks)
    below = Moments(m.count, m.mean_x[:columns], m.mean_x[columns:], m.xx[:columns, :columns], m.xx[:columns, columns:], m.xx.diagonal()[columns:])
    take_out = torch.cat([-solve_ridge(below, 0.0).weight, torch.eye(len(m.mean_x) - columns, dtype=m.xx.dtype, device=m.xx.device)])
    held = None if select is None else _image(_ordered(order_moments(maps, order, select), blocks), take_out)
    readout = solve_ridge(_image(m, take_out), ridge, held)
    weight, start = take_out @ readout.weight, 0
    for conv in maps.readouts_of(order):
        stop = start + conv.in_channels * maps.kernel_size**2
        write_conv(conv, weight[start:stop], readout.bias)
        start = stop
    return readout.ridge


def order_moments(maps: ClosedFormMaps, order: int, sample: Sample) -> Moments:
    """Moments of the patches of [x, a_1, …, a_order] against `sample.y`."""
    margin = maps.kernel_size // 2 if sample.halo else 0
    height, width = (side + 2 * margin for side in sample.y.shape[2:])
    cells = torch.arange(height * width, device=sample.x.device).view(1, 1, height, width)
    positions = interior(cells, margin).flatten()[None] if margin else None
    channels = maps.linear.in_channels + order * maps.hidden
    moments = StreamingMoments(channels, sample.y.shape[1], maps.kernel_size, sample.x.device)
    for index in batches(sample):
        part = sample.batch(index)
        x = interior(torch.cat(maps.regressors(part.x, order, part.inside), 1), sample.halo - margin)
        moments.update(x, F.pad(part.y, (margin,) * 4), None if positions is None else positions.expand(len(x), -1))
    return moments.value


def write_conv(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    """Put a (k² · C_in, C_out) matrix, in the order of `patch_rows`, into a convolution, and the bias where it has one."""
    with torch.no_grad():
        conv.weight.copy_(conv_weight(weight, conv.weight.shape[-1]))
        if conv.bias is not None:
            conv.bias.copy_(bias)


def _blocks(widths: list[int], kernel_size: int) -> Tensor:
    """Columns of the patches of concatenated regressors, brought from patch-major order to one block per regressor."""
    columns = torch.arange(kernel_size**2 * sum(widths)).view(kernel_size**2, -1)
    return torch.cat([block.flatten() for block in torch.split(columns, widths, dim=1)])


def _ordered(m: Moments, columns: Tensor) -> Moments:
    return Moments(m.count, m.mean_x[columns], m.mean_y, m.xx[columns][:, columns], m.xy[columns], m.yy)


def _image(m: Moments, transform: Tensor) -> Moments:
    """Moments of `transformᵀ x`."""
    return Moments(m.count, transform.T @ m.mean_x, m.mean_y, transform.T @ m.xx @ transform, transform.T @ m.xy, m.yy)
