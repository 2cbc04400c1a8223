"""Closed-form maps of every order, and their readouts from second moments."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.errors import ShapeError
from knowiso_train.ops.im2col import conv_weight
from knowiso_train.regression.moments import Moments, StreamingMoments
from knowiso_train.regression.ridge import Ridge, solve_ridge
from knowiso_train.regression.sampling import Sample

MAX_BATCH_POSITIONS = 16_384


class ClosedFormMaps(nn.Module):
    """`x^(0) = W x + b`; `a_0` = x standardized, `a_k = ReLU(M_k a_{k-1} + c_k)`; `x^(k) = Σ_{j≤k} V_{k,j} a_j + b_k` for k ≥ 1.

    M_k is fitted to what the orders below leave over and frozen before the next order, so every order costs one more
    layer. The readouts of the
    earlier regressors x, a_1 … a_{k-1} take out of a_k what they explain linearly (`x^(k) = V_k ã_k`).

    Args:
        source_channels: C_A.
        target_channels: C_B.
        order: K.
        kernel_size: of every map; zero padding keeps the grid.
        hidden: channels of every a_k.
        projection: (p, C_A) fixed orthonormal rows that the source is first projected on, or None.

    Shape:
        (N, C_A, H, W) → (N, C_B, H, W).
    """

    center: Tensor
    scale: Tensor
    projection: Tensor | None

    def __init__(
        self,
        source_channels: int,
        target_channels: int,
        order: int,
        kernel_size: int,
        hidden: int,
        projection: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.source_channels, self.target_channels = source_channels, target_channels
        self.order, self.kernel_size, self.hidden = order, kernel_size, hidden
        self.register_buffer("projection", projection)
        inner = source_channels if projection is None else len(projection)
        self.register_buffer("center", torch.zeros(inner, 1, 1))
        self.register_buffer("scale", torch.ones(inner, 1, 1))

        def conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=bias)

        self.linear = conv(inner, target_channels)
        self.layers = nn.ModuleList(conv(inner if k == 0 else hidden, hidden) for k in range(order))
        self.readouts = nn.ModuleList(
            nn.ModuleList(conv(inner if j == 0 else hidden, target_channels, bias=j == 0) for j in range(k + 1))
            for k in range(1, order + 1)
        )
        self.requires_grad_(False)

    def project(self, x: Tensor) -> Tensor:
        """The source as the maps see it."""
        if x.ndim != 4 or x.shape[1] != self.source_channels:
            raise ShapeError(f"expected a source of shape (N, {self.source_channels}, H, W), got {tuple(x.shape)}")
        return x if self.projection is None else torch.einsum("pc,nchw->nphw", self.projection, x)

    def regressors(self, x: Tensor, order: int, inside: Tensor | None = None) -> list[Tensor]:
        """x, a_1, …, a_order of a projected source; `inside` is 1 within the image and 0 in the padding, where x is a crop with a margin."""
        a, found = (x - self.center) / self.scale, [x]
        if inside is not None:
            a = a * inside
        for layer in self.layers[:order]:
            a = torch.relu(layer(a))
            if inside is not None:
                a = a * inside
            found.append(a)
        return found

    def readout(self, order: int, regressors: list[Tensor]) -> Tensor:
        """x^(order), of order ≥ 1, from x, a_1, …, a_order."""
        outputs = [readout(a) for readout, a in zip(self.readouts_of(order), regressors, strict=True)]
        return torch.stack(outputs).sum(0)

    def readouts_of(self, order: int) -> list[nn.Conv2d]:
        """Convolutions of x, a_1, …, a_order."""
        return list(cast(nn.ModuleList, self.readouts[order - 1]))  # type: ignore[arg-type]

    def components(self, x: Tensor) -> list[Tensor]:
        """x^(0) … x^(K), each (N, C_B, H, W)."""
        x = self.project(x)
        found = self.regressors(x, self.order)
        return [self.linear(x), *(self.readout(k, found[: k + 1]) for k in range(1, self.order + 1))]

    def forward(self, x: Tensor) -> Tensor:
        """g(x), the sum of the components."""
        return torch.stack(self.components(x)).sum(0)


def batches(sample: Sample) -> list[Tensor]:
    """Indices of the sample in batches of a bounded number of positions."""
    per_image = sample.y.shape[2] * sample.y.shape[3]
    return list(
        torch.split(torch.arange(len(sample), device=sample.x.device), max(1, MAX_BATCH_POSITIONS // per_image))
    )


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
def solve_readout(maps: ClosedFormMaps, order: int, fit: Sample, select: Sample | None, ridge: Ridge) -> float:
    """Set the readouts of an order ≥ 1 to `V_k ã_k` with V_k at its optimum for `fit.y`, what is left over.

    ã_k is a_k with all that x, a_1, …, a_{k-1} explain linearly taken out, so that at ridge 0 the component is
    orthogonal to all below.

    Returns:
        The relative ridge used.
    """
    widths = [conv.in_channels for conv in maps.readouts_of(order)]
    blocks = _blocks(widths, maps.kernel_size).to(fit.x.device)
    columns = sum(widths[:-1]) * maps.kernel_size**2
    m = _ordered(order_moments(maps, order, fit), blocks)
    below = Moments(
        m.count,
        m.mean_x[:columns],
        m.mean_x[columns:],
        m.xx[:columns, :columns],
        m.xx[:columns, columns:],
        m.xx.diagonal()[columns:],
    )
    take_out = torch.cat(
        [-solve_ridge(below, 0.0).weight, torch.eye(len(m.mean_x) - columns, dtype=m.xx.dtype, device=m.xx.device)]
    )
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
