"""Fitting of the closed-form maps."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from knowiso_train.disentangle._closed_form import ClosedFormMaps, predict_component
from knowiso_train.disentangle._nonlinear import fit_order
from knowiso_train.disentangle._readouts import ReadoutSolver
from knowiso_train.disentangle.config import DEFAULT_MAX_ROWS, DisentangleConfig, FitSpec, Fitter, MemoryEstimate
from knowiso_train.errors import KnowisoWarning
from knowiso_train.ops.im2col import write_weight
from knowiso_train.regression.moments import MIN_RELATIVE_STD, Moments, StreamingMoments
from knowiso_train.regression.ridge import FIXED_RIDGE, MAX_SEARCH_FEATURES, LinearMap, Ridge, Spectrum, solve_ridge
from knowiso_train.regression.sampling import FeatureSample, Sample, sample_positions

# Default channels of the hidden maps, a multiple of the target's between a minimum and maxima by kernel size
MIN_HIDDEN, HIDDEN_PER_CHANNEL, MAX_POINTWISE_HIDDEN, MAX_PATCH_HIDDEN = 4, 4, 768, 128
MIN_ROWS_PER_FEATURE = 2  # fewer positions per feature are reported with a warning
MIN_TARGET_SCALE = 1e-30
EIGENDECOMPOSITION_PRODUCTS = 25  # d³ products take as long as the eigendecomposition of a matrix (d, d)


class ClosedFormFitter(Fitter):
    """Order 0 from moments of all positions, higher orders from a bounded sample."""

    def __init__(self, spec: FitSpec) -> None:
        super().__init__(spec)
        config = spec.config
        self.config, self.kernel_size = config, config.kernel_size or 1
        self.projection = _projection(spec.source_channels, config)
        inner = spec.source_channels if self.projection is None else len(self.projection)
        num_targets = spec.num_targets * spec.target_channels
        # Rounding of float32 products depends on the number of targets, and training amplifies it: for orders ≥ 1 each
        # target has moments of its own, so that its maps do not depend on the others
        self.target_slices = [self.channels_of(target) for target in range(spec.num_targets)]
        if not config.order:
            self.target_slices = [slice(0, num_targets)]
        # For each of them, one for the fitting and one for the selection images
        self.moments = [
            [StreamingMoments(inner, part.stop - part.start, self.kernel_size, spec.device) for _ in range(2)]
            for part in self.target_slices
        ]
        self.samples = _feature_samples(spec, self.kernel_size) if config.order else []

    @staticmethod
    def estimate_memory(
        config: DisentangleConfig,
        source_channels: int,
        target_channels: int,
        num_targets: int,
        expected_rows: int | None,
    ) -> MemoryEstimate:
        """Estimate the memory, see `Fitter.estimate_memory`."""
        kernel_area = (config.kernel_size or 1) ** 2
        num_features = min(source_channels, config.source_channels or source_channels) * kernel_area
        hidden = (config.hidden or default_hidden(target_channels, config.kernel_size or 1)) * kernel_area
        sample = Fitter.sample_bytes(config, source_channels, target_channels, num_targets, expected_rows)
        # S_xx and S_xy in float64, for the fitting and for the selection images
        num_moments = num_targets if config.order else 1
        moments = 2 * 8 * (num_moments * num_features**2 + num_features * num_targets * target_channels)
        # Order 0: copies of S_xx in the eigendecomposition, or in a Cholesky factorization where no ridge is searched
        solving = 8 * (5 if num_features <= MAX_SEARCH_FEATURES else 2) * num_features**2
        if not config.order:
            return MemoryEstimate(num_features, moments, solving)
        # Orders >= 1: square matrices over the features of all orders together
        solving += 8 * 8 * (num_features + config.order * hidden) ** 2
        return MemoryEstimate(num_features, moments + sample, solving)

    def update(self, x: Tensor, y: Tensor, index: NDArray[np.int64], select: NDArray[np.bool_]) -> None:
        """Add images, see `Fitter.update`."""
        if self.projection is not None:
            x = torch.einsum("pc,nchw->nphw", self.projection.to(x), x)
        for role, mask in enumerate((~select, select)):
            if not mask.any():
                continue
            images = torch.from_numpy(np.flatnonzero(mask)).to(x.device)
            role_x, role_y, role_index = x[images], y[images], index[mask]
            positions = self._positions(role_index, role_y)
            for channels, moments in zip(self.target_slices, self.moments, strict=True):
                moments[role].update(role_x, role_y[:, channels].contiguous(), positions)
            if self.samples:
                self.samples[role].add(role_x, role_y, role_index)

    def _positions(self, index: NDArray[np.int64], y: Tensor) -> Tensor | None:
        """Return the positions (N, P) that enter the moments, or None for all."""
        num_positions, count = y.shape[2] * y.shape[3], self.config.positions
        if count is None or count >= num_positions:
            return None
        return sample_positions(index, num_positions, count, self.config.seed).to(y.device)

    @property
    def work(self) -> float:
        """Approximate multiply-adds, see `Fitter.work`."""
        return self.spec.num_targets * sum(self._order_work(k) for k in range(self.config.order + 1))

    def finish(self, *, bar: tqdm[Any], label: str) -> list[nn.Module]:
        """Fit the maps, see `Fitter.finish`."""
        group = self.spec.group
        for moments in chain.from_iterable(self.moments):
            moments.all_reduce(group)
        fit, select = self._moments_of(0)
        self.rows = int(fit.count)
        if self.rows == 0:
            raise self.empty_fit_error(label)
        ridge = self._available_ridge(fit, select)
        self._collect_warnings(fit, label)
        samples = [sample.result(group, shuffled=True) for sample in self.samples]
        # Several targets share the eigendecomposition of the source
        share_spectrum = self.spec.num_targets > 1 and len(fit.mean_x) <= MAX_SEARCH_FEATURES
        # A single target with a fixed ridge is solved by Cholesky, with other rounding
        share_spectrum = share_spectrum and (ridge == "search" or not self.config.order)
        spectrum = Spectrum.of(fit, select) if share_spectrum else None
        results: list[nn.Module] = []
        for target in range(self.spec.num_targets):
            channels = self.channels_of(target)
            target_fit, target_select = self._moments_of(target)
            linear = solve_ridge(target_fit, ridge, target_select, spectrum)
            maps = self._build_maps()
            write_weight(maps.linear, linear.weight, linear.bias)
            target_samples = [None if s is None else s.with_target(s.y[:, channels]) for s in samples]
            scale = float(target_fit.yy.sum() / (fit.count * self.spec.target_channels)) ** 0.5
            solver = None
            if target_samples:
                # Moments of drawn positions need not be those of the sample
                fit_moments, select_moments = (
                    _residual_moments(m, sample, linear) if self.config.positions is None else None
                    for m, sample in zip((target_fit, target_select), target_samples, strict=True)
                )
                solver = ReadoutSolver(maps, fit_moments, select_moments, ridge)
            scale = max(scale, MIN_TARGET_SCALE)
            order_ridges = group.run_on_first(partial(self._fit_orders, maps, target_samples, scale, solver, bar))
            bar.update(self._order_work(0))
            group.broadcast_(list(maps.state_dict().values()))
            self.ridges.append((linear.ridge, *order_ridges))
            self.centers.append(target_fit.mean_y)
            results.append(maps.eval())
        return results

    def _moments_of(self, target: int) -> tuple[Moments, Moments | None]:
        """Return the moments of the fitting and of the selection images, if there are any, with one target."""
        channels = self.channels_of(target)
        if self.config.order:
            fit, select = (moments.value for moments in self.moments[target])
        else:
            fit, select = (moments.value.targets(channels.start, channels.stop) for moments in self.moments[0])
        return fit, select if select.count > 0 else None

    def _available_ridge(self, fit: Moments, select: Moments | None) -> Ridge:
        """Return the ridge option, or a fixed ridge where a search is impossible; note it."""
        if self.config.ridge != "search":
            return self.config.ridge
        if select is None:
            self.notes.append(f"no image fell to the selection set: ridge fixed at {FIXED_RIDGE:g}")
            return FIXED_RIDGE
        if len(fit.mean_x) > MAX_SEARCH_FEATURES:
            self.notes.append(
                f"{len(fit.mean_x)} features: ridge fixed at {FIXED_RIDGE:g}, searched only up to {MAX_SEARCH_FEATURES}"
            )
        return "search"

    def _fit_orders(
        self,
        maps: ClosedFormMaps,
        samples: list[Sample | None],
        scale: float,
        solver: ReadoutSolver | None,
        bar: tqdm[Any],
    ) -> list[float]:
        """Fit orders 1 … K one after the other, and return their ridges."""
        if solver is None:
            return []
        config, ridges = self.config.nonlinear_config(), []
        residuals = samples
        for order in range(1, self.config.order + 1):
            # Each order is fitted to the residual of the orders below
            residuals = [
                None if s is None else s.with_target(s.y - predict_component(maps, order - 1, s)) for s in residuals
            ]
            fit, select = residuals
            if fit is None:
                return []
            work = self._order_work(order)
            finished = bar.n + work

            def advance(fraction: float, work: float = work) -> None:
                bar.update(fraction * work)

            ridges.append(
                fit_order(
                    maps,
                    order,
                    fit,
                    select,
                    scale,
                    solver,
                    config,
                    seed=self.config.seed,
                    advance=advance,
                )
            )
            bar.update(finished - bar.n)
        return ridges

    def _order_work(self, order: int) -> float:
        """Return the approximate multiply-adds of one order of one target."""
        projected = self.spec.source_channels if self.projection is None else len(self.projection)
        columns, targets = projected * self.kernel_size**2, self.spec.target_channels
        if order == 0:
            return float(EIGENDECOMPOSITION_PRODUCTS * columns**3)
        config, hidden = self.config.nonlinear_config(), self.config.hidden or default_hidden(targets, self.kernel_size)
        rows = min(int(self.moments[0][0].value.count), self.config.max_rows or DEFAULT_MAX_ROWS)
        exact = config.is_exact(self.kernel_size, self.config.ridge)
        inputs = (projected if order == 1 else hidden) + (0 if exact else projected + (order - 1) * hidden)
        # Forward, gradient of the weights and gradient of the features
        work = 3.0 * config.total_rows(order, rows, exact=exact) * self.kernel_size**2 * hidden * (inputs + targets)
        columns += order * hidden * self.kernel_size**2
        return work + (rows * columns * (columns / 2 + targets) if exact else 0.0)

    def _build_maps(self) -> ClosedFormMaps:
        projection = None if self.projection is None else self.projection.to(self.spec.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            maps = ClosedFormMaps(
                self.spec.source_channels,
                self.spec.target_channels,
                self.config.order,
                self.kernel_size,
                self.config.hidden or default_hidden(self.spec.target_channels, self.kernel_size),
                projection,
            )
        return maps.to(self.spec.device, self.spec.dtype)

    def _collect_warnings(self, fit: Moments, label: str) -> None:
        """Note and issue warnings on degenerate features."""
        c = self.spec.target_channels
        # Columns of a patch by kernel cell and channel. On grids of one row or column, some cells hold padding alone
        smallest = MIN_RELATIVE_STD**2 * fit.count
        varies = (fit.xx.diagonal() > smallest * fit.mean_x.square()).view(self.kernel_size**2, -1)
        num_features = int(varies.any(1).sum()) * varies.shape[1]
        dead = int((~varies[self.kernel_size**2 // 2]).sum())
        if dead:
            self.notes.append(f"{dead} source channel(s) without variance on the fitting images")
        dead = int((fit.yy[:c] <= smallest * fit.mean_y[:c].square()).sum())
        if dead:
            meaning = "; the shares have no meaning" if dead == c else ""
            self.notes.append(f"{dead} of {c} target channel(s) without variance on the fitting images{meaning}")
        if self.rows < MIN_ROWS_PER_FEATURE * num_features:
            self.notes.append(f"only {self.rows} rows for {num_features} features: the order-0 map rests on its ridge")
        for note in self.notes:
            warnings.warn(f"{label}: {note}", KnowisoWarning, stacklevel=5)


def default_hidden(target_channels: int, kernel_size: int) -> int:
    """Return the default width of the hidden maps: four times the target's channels, limited for wide layers."""
    maximum = MAX_POINTWISE_HIDDEN
    if kernel_size > 1:
        maximum = max(MAX_PATCH_HIDDEN, min(target_channels, MAX_POINTWISE_HIDDEN))
    return min(max(MIN_HIDDEN, HIDDEN_PER_CHANNEL * target_channels), maximum)


def _residual_moments(m: Moments | None, sample: Sample | None, linear: LinearMap) -> Moments | None:
    """Return the moments with the residual of order 0, or None where the sample is a part of their positions only."""
    if m is None or sample is None or sample.rows != m.count:
        return None
    return replace(m, xy=m.xy - m.xx @ linear.weight)


def _feature_samples(spec: FitSpec, kernel_size: int) -> list[FeatureSample]:
    """Return the samples of fitting and selection images for orders ≥ 1, the latter a quarter as large."""
    halo = (spec.config.order + 1) * (kernel_size // 2)
    return [
        FeatureSample(
            max(1, (spec.config.max_rows or DEFAULT_MAX_ROWS) // part), images, kernel_size, halo, spec.config.seed
        )
        for part, images in ((1, spec.expected_images), (4, max(1, spec.expected_images // 4)))
    ]


def _projection(channels: int, config: DisentangleConfig) -> Tensor | None:
    """Draw random orthonormal rows; the unexplained share after a projection is an upper bound of the one without."""
    if config.source_channels is None or config.source_channels >= channels:
        return None
    generator = torch.Generator().manual_seed(config.seed)
    gaussian = torch.randn(channels, config.source_channels, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(gaussian)[0]
    return basis.T.contiguous()
