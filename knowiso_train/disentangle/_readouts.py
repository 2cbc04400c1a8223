"""Closed-form readouts of the orders above 0."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from knowiso_train.disentangle._closed_form import ClosedFormMaps, split_indices
from knowiso_train.ops.im2col import write_weight
from knowiso_train.regression.moments import Moments, StreamingMoments
from knowiso_train.regression.ridge import Ridge, dampening, solve_dampened, solve_ridge
from knowiso_train.regression.sampling import Sample, trim


class ReadoutSolver:
    """Least-squares readouts of the orders ≥ 1 of one target.

    Second moments of [x, a_1, …] are kept from order to order. With 1×1 maps each order adds those of its own hidden
    channels only; wider patches are multiplied anew.

    Args:
        maps: Maps whose readouts are solved.
        fit: Moments of x and of the residual of order 0 on the fitting sample. None: computed from the sample.
        select: The same of the selection sample.
        ridge: Relative ridge, or "search".
    """

    def __init__(self, maps: ClosedFormMaps, fit: Moments | None, select: Moments | None, ridge: Ridge) -> None:
        self.maps, self.ridge = maps, ridge
        self.moments = [fit, select]
        self.known_order = 0  # highest order whose hidden channels are part of the moments

    @torch.no_grad()
    def solve(self, order: int, fit: Sample, select: Sample | None) -> float:
        """Set the readouts of an order to `V_k ã_k` with the optimal V_k for the residual `fit.y` of the lower orders.

        At ridge 0 the component is orthogonal to all lower orders.

        Returns:
            The relative ridge used.
        """
        # z = [x, a_1, …, a_{k-1}] are the earlier features. The regression of a_k on z has the coefficients
        # R = S_zz⁻¹ S_za, so ã_k = a_k - Rᵀ z = Tᵀ [z; a_k] with T = [-R; I]. Moments of ã_k follow from those of
        # [z; a_k]: S_ãã = Tᵀ S T and S_ãy = Tᵀ S_y. Its readout V is a readout of [z; a_k] with the weights T V.
        maps = self.maps
        m = self._extended(self.moments[0], order, fit)
        select_moments = None if select is None else self._extended(self.moments[1], order, select)
        widths = [conv.in_channels * maps.kernel_size**2 for conv in maps.readouts_of(order)]
        split = sum(widths[:-1])
        earlier = m.xx[:split, :split]
        penalty = dampening(earlier.diagonal().mean(), 0.0).expand(split)
        regression = solve_dampened(earlier, m.xx[:split, split:], penalty)
        transform = torch.cat([-regression, torch.eye(widths[-1], dtype=m.xx.dtype, device=m.xx.device)])
        readout = solve_ridge(
            _transform(m, transform),
            self.ridge,
            None if select_moments is None else _transform(select_moments, transform),
        )
        weight = transform @ readout.weight
        for conv, part in zip(maps.readouts_of(order), torch.split(weight, widths), strict=True):
            write_weight(conv, part, readout.bias)
        # The residual of this order is y - weightᵀ [z; a_k]
        self.moments = [None if v is None else replace(v, xy=v.xy - v.xx @ weight) for v in (m, select_moments)]
        self.known_order = order
        return readout.ridge

    def _extended(self, m: Moments | None, order: int, sample: Sample) -> Moments:
        """Return the moments of [x, a_1, …, a_order] with the residual, sorted by feature."""
        maps, first = self.maps, self.known_order + 1
        if m is None or maps.kernel_size > 1:
            return order_moments(maps, order, sample)
        known = len(m.mean_x)
        # Moments of the new features with the known ones and the residual
        stream = StreamingMoments((order - self.known_order) * maps.hidden, known + sample.y.shape[1], 1, m.xx.device)
        for index in split_indices(sample):
            part = sample.batch(index)
            features = maps.features(part.x, order, part.inside)
            stream.update(torch.cat(features[first:], 1), torch.cat([*features[:first], part.y], 1))
        new = stream.value
        cross = new.xy[:, :known]
        return Moments(
            m.count,
            torch.cat([m.mean_x, new.mean_x]),
            new.mean_y[known:],
            torch.cat([torch.cat([m.xx, cross.T], 1), torch.cat([cross, new.xx], 1)]),
            torch.cat([m.xy, new.xy[:, known:]]),
            new.yy[known:],
        )


def order_moments(maps: ClosedFormMaps, order: int, sample: Sample) -> Moments:
    """Compute the moments of the patches of [x, a_1, …, a_order] with `sample.y`, sorted by feature."""
    # A crop's features keep a margin of k // 2, so that the patches at its border are complete. Targets are padded to
    # that size, and only the positions in the interior are used.
    margin = maps.kernel_size // 2 if sample.halo else 0
    sample = sample.with_margin((order + 1) * margin)
    height, width = (side + 2 * margin for side in sample.y.shape[2:])
    grid = torch.arange(height * width, device=sample.x.device).view(1, 1, height, width)
    positions = trim(grid, margin).flatten()[None] if margin else None
    channels = maps.linear.in_channels + order * maps.hidden
    moments = StreamingMoments(channels, sample.y.shape[1], maps.kernel_size, sample.x.device)
    for index in split_indices(sample):
        part = sample.batch(index)
        x = torch.cat(maps.features(part.x, order, part.inside), 1)
        moments.update(x, F.pad(part.y, (margin,) * 4), None if positions is None else positions.expand(len(x), -1))
    widths = [maps.linear.in_channels, *[maps.hidden] * order]
    return _select_columns(moments.value, columns_by_feature(widths, maps.kernel_size).to(sample.x.device))


def columns_by_feature(widths: list[int], kernel_size: int) -> Tensor:
    """Return the permutation that sorts the columns of `patch_rows` of concatenated features by feature."""
    columns = torch.arange(kernel_size**2 * sum(widths)).view(kernel_size**2, -1)
    return torch.cat([block.flatten() for block in torch.split(columns, widths, dim=1)])


def _select_columns(m: Moments, columns: Tensor) -> Moments:
    return Moments(m.count, m.mean_x[columns], m.mean_y, m.xx[columns][:, columns], m.xy[columns], m.yy)


def _transform(m: Moments, transform: Tensor) -> Moments:
    """Return the moments of `transformᵀ x`."""
    return Moments(m.count, transform.T @ m.mean_x, m.mean_y, transform.T @ m.xx @ transform, transform.T @ m.xy, m.yy)
