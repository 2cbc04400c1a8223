"""Fitting of the closed-form maps."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from knowiso_train.disentangle.closed_form import ClosedFormMaps, predicted, write_conv
from knowiso_train.disentangle.config import DisentangleConfig, NonlinearConfig, parse_solver_options
from knowiso_train.disentangle.fitter import FitSpec, Fitter, MemoryEstimate
from knowiso_train.disentangle.nonlinear import fit_order
from knowiso_train.errors import KnowisoWarning
from knowiso_train.regression.moments import StreamingMoments
from knowiso_train.regression.ridge import FIXED_RIDGE, MAX_SEARCH_FEATURES, Ridge, Spectrum, solve_ridge
from knowiso_train.regression.sampling import FeatureSample, Sample, sample_positions


class ClosedFormFitter(Fitter):
    """Order 0 from moments of all positions; higher orders from a bounded sample."""

    def __init__(self, task: FitSpec) -> None:
        super().__init__(task)
        settings = task.settings
        self.settings, self.kernel_size = settings, settings.kernel_size or 1
        self.recipe = parse_solver_options(NonlinearConfig, settings.solver_options, "closed-form")
        self.projection = _projection(task.source_channels, settings)
        inner = task.source_channels if self.projection is None else len(self.projection)
        self.moments = [
            StreamingMoments(inner, task.targets * task.target_channels, self.kernel_size, task.device)
            for _ in range(2)
        ]
        halo = (settings.order + 1) * (self.kernel_size // 2)
        self.samples = [
            FeatureSample(rows, images, self.kernel_size, halo, settings.seed)
            for rows, images in (
                (settings.max_rows, task.expected),
                (max(1, settings.max_rows // 4), max(1, task.expected // 4)),
            )
        ]

    @staticmethod
    def estimate_memory(
        settings: DisentangleConfig,
        source_channels: int,
        target_channels: int,
        targets: int,
        expected_rows: int | None,
    ) -> MemoryEstimate:
        kernel_area = (settings.kernel_size or 1) ** 2
        num_features = min(source_channels, settings.source_channels or source_channels) * kernel_area
        hidden = (settings.hidden or default_hidden(target_channels)) * kernel_area
        sample = Fitter.sample_bytes(settings, source_channels, target_channels, targets, expected_rows)
        # S_xx and S_xy in float64, for the fitting and for the selection images
        moments = 2 * 8 * (num_features**2 + num_features * targets * target_channels)
        # Order 0: copies of S_xx in the eigendecomposition, or in a Cholesky factorization where no ridge is searched
        solving = 8 * (5 if num_features <= MAX_SEARCH_FEATURES else 2) * num_features**2
        if not settings.order:
            return MemoryEstimate(num_features, moments, solving)
        # Orders >= 1: square matrices over the features of all orders together
        solving += 8 * 8 * (num_features + settings.order * hidden) ** 2
        return MemoryEstimate(num_features, moments + sample, solving)

    def update(self, x: Tensor, y: Tensor, index: NDArray[np.int64], select: NDArray[np.bool_]) -> None:
        if self.projection is not None:
            x = torch.einsum("pc,nchw->nphw", self.projection.to(x), x)
        cells = y.shape[2] * y.shape[3]
        for role, mask in enumerate((~select, select)):
            if not mask.any():
                continue
            chosen = torch.from_numpy(np.flatnonzero(mask)).to(x.device)
            xs, ys, ids = x[chosen], y[chosen], index[mask]
            few = self.settings.positions is not None and self.settings.positions < cells
            positions = (
                sample_positions(ids, cells, self.settings.positions or cells, self.settings.seed).to(x.device)
                if few
                else None
            )
            self.moments[role].update(xs, ys, positions)
            if self.settings.order:
                self.samples[role].add(xs, ys, ids)

    def finish(self, *, progress: bool, label: str) -> list[nn.Module]:
        for moments in self.moments:
            moments.all_reduce(self.task.group)
        fit, select = (m.value for m in self.moments)
        self.rows = int(fit.count)
        if self.rows == 0:
            raise self.nothing_to_fit(label)
        held = select if select.count > 0 else None
        ridge = self.settings.ridge
        if ridge == "search" and held is None:
            ridge = FIXED_RIDGE
            self.notes.append("no image fell to the selection set: ridge fixed at 1e-4")
        if ridge == "search" and len(fit.mean_x) > MAX_SEARCH_FEATURES:
            self.notes.append(
                f"{len(fit.mean_x)} columns: ridge fixed at 1e-4, searched only up to {MAX_SEARCH_FEATURES}"
            )
        self._look_at(label)
        samples = [sample.result(self.task.group) for sample in self.samples] if self.settings.order else [None, None]
        shared = Spectrum.of(fit, held) if self.task.targets > 1 and len(fit.mean_x) <= MAX_SEARCH_FEATURES else None
        results: list[nn.Module] = []
        for target in range(self.task.targets):
            part = self.part(target)
            other = None if held is None else held.targets(part.start, part.stop)
            linear = solve_ridge(fit.targets(part.start, part.stop), ridge, other, shared)
            maps = self._empty()
            write_conv(maps.linear, linear.weight, linear.bias)
            own = [None if s is None else s.with_target(s.y[:, part]) for s in samples]
            scale = max(float(fit.yy[part].sum() / (fit.count * self.task.target_channels)) ** 0.5, 1e-30)
            used = self._orders(maps, own, scale, ridge, progress=progress and target == 0, label=label)
            self.task.group.broadcast_(list(maps.state_dict().values()))
            self.ridges.append((linear.ridge, *self.task.group.gather(used)[0]))
            self.centers.append(fit.mean_y[part])
            results.append(maps.eval())
        return results

    def _orders(
        self,
        maps: ClosedFormMaps,
        samples: list[Sample | None],
        scale: float,
        ridge: Ridge,
        *,
        progress: bool,
        label: str,
    ) -> list[float]:
        """Fit orders 1…K one after the other; by rank 0, which broadcasts."""
        used: list[float] = []
        left = samples
        for order in range(1, self.settings.order + 1):
            left = [None if s is None else s.with_target(s.y - predicted(maps, order - 1, s)) for s in left]
            fit, select = left
            if fit is None or self.task.group.rank:
                return []
            used.append(
                fit_order(
                    maps,
                    order,
                    fit,
                    select,
                    scale,
                    ridge,
                    self.recipe,
                    seed=self.settings.seed,
                    progress=progress,
                    label=label,
                )
            )
        return used

    def _empty(self) -> ClosedFormMaps:
        hidden = self.settings.hidden or default_hidden(self.task.target_channels)
        projection = None if self.projection is None else self.projection.to(self.task.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            maps = ClosedFormMaps(
                self.task.source_channels,
                self.task.target_channels,
                self.settings.order,
                self.kernel_size,
                hidden,
                projection,
            )
        return maps.to(self.task.device, self.task.dtype)

    def _look_at(self, label: str) -> None:
        """Say what is defined but deserves a second look."""
        m = self.moments[0].value
        c, columns = self.task.target_channels, len(m.mean_x)
        dead = int((m.xx.diagonal() <= 0).sum()) // self.kernel_size**2
        if dead:
            self.notes.append(f"{dead} source channel(s) without variance on the fitting images")
        dead = int((m.yy[:c] <= 0).sum())
        if dead:
            self.notes.append(f"{dead} of {c} target channel(s) without variance on the fitting images")
        if self.rows < 2 * columns:
            self.notes.append(f"only {self.rows} rows for {columns} regressors: the order-0 map rests on its ridge")
        for note in self.notes:
            warnings.warn(f"{label}: {note}", KnowisoWarning, stacklevel=5)


def default_hidden(target_channels: int) -> int:
    """Width of the hidden maps where it is not given: twice the target's channels, 512 at most, so that wide layers stay affordable."""
    return min(max(4, 2 * target_channels), 512)


def _projection(channels: int, settings: DisentangleConfig) -> Tensor | None:
    """Random orthonormal rows, so that the unexplained share after projection is an upper bound of the one without."""
    if settings.source_channels is None or settings.source_channels >= channels:
        return None
    generator = torch.Generator().manual_seed(settings.seed)
    basis: Tensor = torch.linalg.qr(
        torch.randn(channels, settings.source_channels, generator=generator, dtype=torch.float64)
    )[0]
    return basis.T.contiguous()
