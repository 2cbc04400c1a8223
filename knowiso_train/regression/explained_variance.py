"""Explained and unexplained variance with bootstrap intervals over images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knowiso_train.regression.moments import MIN_RELATIVE_STD
from knowiso_train.utils.distributed import ProcessGroup
from knowiso_train.utils.hashing import Stream, hash_unit

INTERVAL_QUANTILES = (0.025, 0.975)
# P(X ≤ n) of Poisson(1) for n = 0 … 8; larger counts have probability 1e-6
_POISSON_CDF = np.cumsum([np.exp(-1.0) / np.prod(np.arange(1, n + 1, dtype=float)) for n in range(9)])


@dataclass(frozen=True)
class ShareEstimate:
    """Shares of one layer pair on the report images, with 95 % intervals.

    Attributes:
        shares: Share of each order, U_{k-1} - U_k with U_{-1} = 1.
        unexplained: U_k, the share that orders 0 … k leave unexplained (the fraction of variance unexplained, 1 - R²).
        component_variances: Variance of each component, relative to the target's.
        share_intervals: Interval of each share.
        component_intervals: Interval of each component's variance.
        interval: Interval of the last U_k.
    """

    shares: tuple[float, ...]
    unexplained: tuple[float, ...]
    component_variances: tuple[float, ...]
    share_intervals: tuple[tuple[float, float], ...]
    component_intervals: tuple[tuple[float, float], ...]
    interval: tuple[float, float]


class ResidualStatistics:
    """Energies of the target, of every residual and of every component, summed over images.

    The intervals are those of a Poisson bootstrap. Image i enters replicate b with a weight drawn from Poisson(1) by a
    seeded hash of (i, b). Replicates are therefore sums: no image is stored, and neither the order of the images nor
    the number of processes matters.

    Args:
        num_components: K + 1.
        center: Mean of the target on the fitting images, (C,); energies are taken about it.
        bootstrap: Number of replicates; 0 for no intervals.
        seed: Seed of the weights.
    """

    def __init__(self, num_components: int, center: Tensor, bootstrap: int = 500, seed: int = 0) -> None:
        self.num_components, self.bootstrap, self.seed = num_components, bootstrap, seed
        self.center = center.double()
        # Rows: the target, the residual after each order, each component
        num_rows = 1 + 2 * num_components
        self.images = torch.zeros((), dtype=torch.float64, device=center.device)
        self.rows = torch.zeros_like(self.images)
        self.sums = torch.zeros(num_rows, len(center), dtype=torch.float64, device=center.device)
        self.energy = torch.zeros(num_rows, dtype=torch.float64, device=center.device)
        # Energies of each replicate, and in the last column the sum of the images' weights
        self.replicates = torch.zeros(bootstrap, num_rows + 1, dtype=torch.float64, device=center.device)

    @torch.no_grad()
    def update(self, target: Tensor, components: list[Tensor], index: NDArray[np.int64]) -> None:
        """Add a batch of images.

        Args:
            target: (N, C, H, W).
            components: K + 1 tensors of that shape.
            index: Dataset index of each image, (N,). Equal indices, such as of positions given as images of their own,
                are resampled together.
        """
        target = target.double()
        center = self.center.view(1, -1, 1, 1)
        features, residual = [target - center], target
        for component in components:
            residual = residual - component.double()
            features.append(residual)
        # The components sum to about the target, so each is centered by an equal part of its mean
        features.extend(component.double() - center / len(components) for component in components)
        per_image = torch.stack([feature.square().sum((1, 2, 3)) for feature in features], 1)  # (N, num_rows)
        self.images += len(target)
        self.rows += len(target) * target.shape[2] * target.shape[3]
        self.sums += torch.stack([feature.sum((0, 2, 3)) for feature in features])
        self.energy += per_image.sum(0)
        if self.bootstrap:
            images, inverse = np.unique(index, return_inverse=True)
            weights = torch.from_numpy(poisson_weights(images, self.bootstrap, self.seed)[:, inverse]).to(per_image)
            self.replicates += weights @ torch.cat([per_image, torch.ones_like(per_image[:, :1])], 1)

    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        """Sum over all processes."""
        group = group or ProcessGroup()
        if group.size > 1:
            tensors = [t.to(group.device) for t in (self.images, self.rows, self.sums, self.energy, self.replicates)]
            group.sum_(*tensors)
            device = self.images.device
            self.images, self.rows, self.sums, self.energy, self.replicates = (t.to(device) for t in tensors)

    def estimate(self) -> ShareEstimate:
        """Return shares and intervals; a target without variance has a share of order 0 of 1."""
        # Σ (v - mean)² = Σ v² - (Σ v)² / n, per row and channel
        mean_energy = self.sums.square().sum(1) / self.rows.clamp(min=1)
        # The difference of a constant target is rounding; without it every share is that of order 0
        energy = (self.energy - mean_energy).clamp(min=0)
        constant = energy[0] <= MIN_RELATIVE_STD**2 * self.energy[0]
        energy = torch.where(constant, torch.zeros_like(energy), energy)
        shares, unexplained, variances = self._split(energy[None])
        replicates = None
        if self.bootstrap and self.images > 1:
            # A replicate's mean energy is that of all images times its total weight: the mean is not resampled
            weight = self.replicates[:, -1:]
            energies = (self.replicates[:, :-1] - mean_energy * weight / self.images.clamp(min=1)).clamp(min=0)
            energies = torch.where(constant, torch.zeros_like(energies), energies)
            replicates = self._split(energies[weight[:, 0] > 0])
        share_samples, unexplained_samples, variance_samples = replicates or (None, None, None)
        return ShareEstimate(
            shares=tuple(shares[0].tolist()),
            unexplained=tuple(unexplained[0].tolist()),
            component_variances=tuple(variances[0].tolist()),
            share_intervals=_intervals(share_samples, shares[0]),
            component_intervals=_intervals(variance_samples, variances[0]),
            interval=_intervals(unexplained_samples, unexplained[0])[-1],
        )

    def _split(self, energies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return shares, unexplained shares and component variances (R, K + 1) of energies (R, num_rows)."""
        ratios = _relative_to_target(energies)
        unexplained, variances = ratios[:, 1 : 1 + self.num_components], ratios[:, 1 + self.num_components :]
        # U_{-1} = 1
        before = torch.cat([torch.ones_like(unexplained[:, :1]), unexplained[:, :-1]], 1)
        return before - unexplained, unexplained, variances


def poisson_weights(index: NDArray[np.int64], replicates: int, seed: int) -> NDArray[np.float64]:
    """Return weights from Poisson(1), (replicates, N), a function of dataset index, replicate and seed alone."""
    pairs = index[None, :] * replicates + np.arange(replicates)[:, None]
    # Inverse transform sampling
    return np.searchsorted(_POISSON_CDF, hash_unit(pairs, seed, Stream.BOOTSTRAP)).astype(np.float64)


def _relative_to_target(energies: Tensor) -> Tensor:
    """Divide energies (…, num_rows) by the target's in the first column; a target without energy gives 0."""
    total = energies[..., :1]
    return torch.where(total > 0, energies / total.clamp(min=torch.finfo(total.dtype).tiny), torch.zeros_like(energies))


def _intervals(samples: Tensor | None, points: Tensor) -> tuple[tuple[float, float], ...]:
    """Return percentile intervals of the columns of samples (R, K + 1), widened to contain the points (K + 1,)."""
    if samples is None:
        return ((float("nan"), float("nan")),) * len(points)
    quantiles = torch.tensor(INTERVAL_QUANTILES, dtype=samples.dtype, device=samples.device)
    low, high = torch.quantile(samples, quantiles, dim=0)
    return tuple(zip(torch.minimum(low, points).tolist(), torch.maximum(high, points).tolist(), strict=True))
