"""Explained and unexplained variance with bootstrap intervals over images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knowiso_train.utils.distributed import ProcessGroup
from knowiso_train.utils.hashing import hash_unit

_POISSON_CDF = np.cumsum([np.exp(-1.0) / np.prod(np.arange(1, n + 1, dtype=float)) for n in range(9)])


@dataclass(frozen=True)
class ShareEstimate:
    """Shares of one layer pair on the report images; `unexplained[k]` is U_k, after orders 0…k."""

    shares: tuple[float, ...]
    unexplained: tuple[float, ...]
    component_variances: tuple[float, ...]
    share_intervals: tuple[tuple[float, float], ...]
    component_intervals: tuple[tuple[float, float], ...]
    interval: tuple[float, float]


class ResidualStatistics:
    """Accumulates, per image, the energy of the target, of every component and of what is left after every order.

    The bootstrap is Poisson's: image i enters replicate b with a weight drawn from Poisson(1) by a seeded hash of (i,
    b), so that
    replicates are sums, independent of order and of the number of processes, and no image is stored.

    Args:
        orders: number of components, K + 1.
        center: (C,) mean of the target on the fitting images, about which energies are summed.
        bootstrap: number of replicates; 0 for none.
        seed: of the weights.
    """

    def __init__(self, orders: int, center: Tensor, bootstrap: int = 500, seed: int = 0) -> None:
        channels, device = len(center), center.device
        self.orders, self.bootstrap, self.seed = orders, bootstrap, seed
        self.center = center.double()
        lines = 1 + 2 * orders  # target, residual after each order, each component
        self.images = torch.zeros((), dtype=torch.float64, device=device)
        self.rows = torch.zeros((), dtype=torch.float64, device=device)
        self.sums = torch.zeros(lines, channels, dtype=torch.float64, device=device)
        self.energy = torch.zeros(lines, dtype=torch.float64, device=device)
        # Last column: weight of the images
        self.replicates = torch.zeros(bootstrap, lines + 1, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, target: Tensor, components: list[Tensor], index: NDArray[np.int64]) -> None:
        """Add images: target (N, C, H, W), K + 1 components of that shape, and the dataset index of each image (N,)."""
        target = target.double()
        center = self.center.view(1, -1, 1, 1)
        lines, residual = [target - center], target
        for component in components:
            residual = residual - component.double()
            lines.append(residual)
        lines.extend(component.double() - center / len(components) for component in components)
        per_image = torch.stack([line.square().sum((1, 2, 3)) for line in lines], 1)  # (N, lines)
        self.images += len(target)
        self.rows += len(target) * target.shape[2] * target.shape[3]
        self.sums += torch.stack([line.sum((0, 2, 3)) for line in lines])
        self.energy += per_image.sum(0)
        if self.bootstrap:
            weights = torch.from_numpy(poisson_weights(index, self.bootstrap, self.seed)).to(per_image)
            self.replicates += weights @ torch.cat([per_image, torch.ones_like(per_image[:, :1])], 1)

    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        """Sum over the processes."""
        group = group or ProcessGroup()
        if group.size > 1:
            tensors = [t.to(group.device) for t in (self.images, self.rows, self.sums, self.energy, self.replicates)]
            group.sum_(*tensors)
            device = self.images.device
            self.images, self.rows, self.sums, self.energy, self.replicates = (t.to(device) for t in tensors)

    def estimate(self) -> ShareEstimate:
        """Shares and 95 % intervals; a target without variance is explained by its mean: share of order 0 is 1."""
        rows, images = self.rows.clamp(min=1), self.images.clamp(min=1)
        mean_energy = self.sums.square().sum(1) / rows  # what the lines' own means contribute
        variances = (self.energy - mean_energy).clamp(min=0)
        ratios, spread = _ratios(variances), None
        if self.bootstrap and self.images > 1:
            weight = self.replicates[:, -1:]
            spread = _ratios((self.replicates[:, :-1] - mean_energy * weight / images).clamp(min=0))[weight[:, 0] > 0]
        after = ratios[1 : 1 + self.orders]
        before = torch.cat([torch.ones_like(after[:1]), after[:-1]])

        def interval(of: Tensor | None, point: Tensor) -> tuple[float, float]:
            if of is None:
                return (float("nan"), float("nan"))
            low, high = torch.quantile(of, torch.tensor([0.025, 0.975], dtype=of.dtype, device=of.device)).tolist()
            return (min(low, float(point)), max(high, float(point)))

        share_spread = None
        if spread is not None:
            left = spread[:, 1 : 1 + self.orders]
            share_spread = torch.cat([torch.ones_like(left[:, :1]), left[:, :-1]], 1) - left
        shares = before - after
        components = ratios[1 + self.orders :]
        return ShareEstimate(
            shares=tuple(shares.tolist()),
            unexplained=tuple(after.tolist()),
            component_variances=tuple(components.tolist()),
            share_intervals=tuple(
                interval(None if share_spread is None else share_spread[:, k], shares[k]) for k in range(self.orders)
            ),
            component_intervals=tuple(
                interval(None if spread is None else spread[:, 1 + self.orders + k], components[k])
                for k in range(self.orders)
            ),
            interval=interval(None if spread is None else spread[:, self.orders], after[-1]),
        )


def poisson_weights(index: NDArray[np.int64], replicates: int, seed: int) -> NDArray[np.float64]:
    """(replicates, N) weights from Poisson(1), a function of dataset index, replicate and seed alone."""
    pairs = index[None, :] * replicates + np.arange(replicates)[:, None]
    return np.searchsorted(_POISSON_CDF, hash_unit(pairs, seed, stream=3)).astype(np.float64)


def _ratios(energy: Tensor) -> Tensor:
    """Energies (…, lines) relative to the target's; 0 where the target has none."""
    total = energy[..., :1]
    return torch.where(total > 0, energy / total.clamp(min=torch.finfo(total.dtype).tiny), torch.zeros_like(energy))
