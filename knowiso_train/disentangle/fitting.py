"""From streamed features to fitted maps. One fitter per layer pair; memory independent of the number of images."""

from __future__ import annotations

import warnings
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from knowiso_train.disentangle.closed_form import ClosedFormMaps
from knowiso_train.disentangle.paper import PaperMaps
from knowiso_train.disentangle.paper_fit import PaperRecipe, fit_paper
from knowiso_train.disentangle.readout import predicted, write_conv
from knowiso_train.disentangle.ridge import SEARCH_LIMIT, solve_ridge
from knowiso_train.disentangle.settings import Settings
from knowiso_train.disentangle.stage_fit import StageRecipe, fit_order
from knowiso_train.errors import DataError, KnowisoWarning
from knowiso_train.statistics import FeatureSample, Group, Sample, StreamingMoments, sample_positions


class Maps(Protocol):
    """What both solvers give: a module with K + 1 components."""

    def components(self, x: Tensor) -> list[Tensor]: ...


class Fitter(Protocol):
    """Takes features batch by batch, then gives maps; `targets` sets of target channels are fitted from one pass over the source."""

    ridges: list[tuple[float, ...]]
    centres: list[Tensor]
    notes: list[str]
    rows: int

    def update(self, x: Tensor, y: Tensor, index: NDArray[np.int64], select: NDArray[np.bool_]) -> None: ...

    def finish(self, *, progress: bool, label: str) -> list[nn.Module]: ...


def make_fitter(
    settings: Settings,
    source_channels: int,
    target_channels: int,
    grid: tuple[int, int],
    expected: int,
    *,
    targets: int = 1,
    like: Tensor,
    group: Group | None = None,
) -> Fitter:
    """A fitter for features of these shapes.

    Args:
        settings: kernel decided (`on_grid`).
        source_channels: C_A.
        target_channels: C_B of one target.
        grid: positions of the target.
        expected: images that will come, as far as is known.
        targets: number of targets stacked along the channels of `y`.
        like: a feature with the dtype and device of those to come.
        group: the processes that share the fit.
    """
    kind = PaperFitter if settings.solver == "paper" else ClosedFormFitter
    return kind(settings, source_channels, target_channels, grid, expected, targets, like, group or Group())


class ClosedFormFitter:
    """Order 0 from moments of all positions; higher orders from a bounded sample."""

    def __init__(
        self,
        settings: Settings,
        source_channels: int,
        target_channels: int,
        grid: tuple[int, int],
        expected: int,
        targets: int,
        like: Tensor,
        group: Group,
    ) -> None:
        self.settings, self.shape, self.targets, self.group = settings, (source_channels, target_channels), targets, group
        self.kernel_size = settings.kernel_size or 1
        self.dtype, self.device = torch.promote_types(like.dtype, torch.float32), like.device
        self.projection = _projection(source_channels, settings)
        inner = source_channels if self.projection is None else len(self.projection)
        self.moments = [StreamingMoments(inner, targets * target_channels, self.kernel_size, like.device) for _ in range(2)]
        halo = (settings.order + 1) * (self.kernel_size // 2)
        self.samples = [
            FeatureSample(rows, images, self.kernel_size, halo, settings.seed)
            for rows, images in ((settings.max_rows, expected), (max(1, settings.max_rows // 4), max(1, expected // 4)))
        ]
        self.ridges: list[tuple[float, ...]] = []
        self.centres: list[Tensor] = []
        self.notes: list[str] = []
        self.rows = 0

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
            positions = sample_positions(ids, cells, self.settings.positions or cells, self.settings.seed).to(x.device) if few else None
            self.moments[role].update(xs, ys, positions)
            if self.settings.order:
                self.samples[role].add(xs, ys, ids)

    def finish(self, *, progress: bool, label: str) -> list[nn.Module]:
        for moments in self.moments:
            moments.all_reduce(self.group)
        fit, select = (m.value for m in self.moments)
        self.rows = int(fit.count)
        if self.rows == 0:
            raise DataError(f"{label}: no image fell to the fitting set; give more images or a larger first fraction in split=")
        held = select if select.count > 0 else None
        ridge = self.settings.ridge
        if ridge == "search" and held is None:
            ridge = 1e-4
            self.notes.append("no image fell to the selection set: ridge fixed at 1e-4")
        if ridge == "search" and len(fit.mean_x) > SEARCH_LIMIT:
            self.notes.append(f"{len(fit.mean_x)} columns: ridge fixed at 1e-4, searched only up to {SEARCH_LIMIT}")
        self._look_at(label)
        samples = [sample.result(self.group) for sample in self.samples] if self.settings.order else [None, None]
        c = self.shape[1]
        results: list[nn.Module] = []
        for target in range(self.targets):
            part = slice(target * c, (target + 1) * c)
            linear = solve_ridge(fit.targets(part.start, part.stop), ridge, None if held is None else held.targets(part.start, part.stop))
            maps = self._empty()
            write_conv(maps.linear, linear.weight, linear.bias)
            own = [None if s is None else s.with_target(s.y[:, part]) for s in samples]
            scale = max(float(fit.yy[part].sum() / (fit.count * c)) ** 0.5, 1e-30)
            used = self._orders(maps, own, scale, ridge, progress=progress and target == 0, label=label)
            self.group.broadcast_(list(maps.state_dict().values()))
            self.ridges.append((linear.ridge, *self.group.gather(used)[0]))
            self.centres.append(fit.mean_y[part])
            results.append(maps.eval())
        return results

    def _orders(
        self, maps: ClosedFormMaps, samples: list[Sample | None], scale: float, ridge: float | str, *, progress: bool, label: str
    ) -> list[float]:
        """Fit orders 1…K one after the other; by rank 0, which broadcasts."""
        recipe, used = StageRecipe.of(self.settings.solver_options), []
        left = samples
        for order in range(1, self.settings.order + 1):
            left = [None if s is None else s.with_target(s.y - predicted(maps, order - 1, s)) for s in left]
            fit, select = left
            if fit is None or self.group.rank:
                return []
            used.append(fit_order(maps, order, fit, select, scale, ridge, recipe, seed=self.settings.seed, progress=progress, label=label))
        return used

    def _empty(self) -> ClosedFormMaps:
        hidden = self.settings.hidden or default_hidden(self.shape[1])
        projection = None if self.projection is None else self.projection.to(self.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            maps = ClosedFormMaps(*self.shape, self.settings.order, self.kernel_size, hidden, projection)
        return maps.to(self.device, self.dtype)

    def _look_at(self, label: str) -> None:
        """Say what is defined but deserves a second look."""
        m = self.moments[0].value
        c, columns = self.shape[1], len(m.mean_x)
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


class PaperFitter:
    """Keeps whole images up to `max_rows` positions, those for selecting too, and trains the paper's network on them."""

    def __init__(
        self,
        settings: Settings,
        source_channels: int,
        target_channels: int,
        grid: tuple[int, int],
        expected: int,
        targets: int,
        like: Tensor,
        group: Group,
    ) -> None:
        self.settings, self.shape, self.targets, self.group, self.grid = settings, (source_channels, target_channels), targets, group, grid
        self.dtype, self.device = torch.promote_types(like.dtype, torch.float32), like.device
        self.recipe = PaperRecipe.of(settings.solver_options)
        self.sample = FeatureSample(settings.max_rows, expected, 1, 0, settings.seed, whole=True)
        self.ridges: list[tuple[float, ...]] = []
        self.centres: list[Tensor] = []
        self.notes: list[str] = []
        self.rows = 0

    def update(self, x: Tensor, y: Tensor, index: NDArray[np.int64], select: NDArray[np.bool_]) -> None:
        self.sample.add(x, y, index)

    def finish(self, *, progress: bool, label: str) -> list[nn.Module]:
        sample = self.sample.result(self.group)
        if sample is None:
            raise DataError(f"{label}: no image fell to the fitting set; give more images or a larger first fraction in split=")
        self.rows = sample.rows
        source_channels, c = self.shape
        if source_channels != c:
            self.notes.append(f"{source_channels} source and {c} target channels: the general form with untied maps and biases")
        results: list[nn.Module] = []
        for target in range(self.targets):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.settings.seed)
                maps = PaperMaps(source_channels, c, self.settings.order, self.settings.kernel_size or 3).to(self.device, self.dtype)
            if self.group.rank == 0:
                own = sample.with_target(sample.y[:, target * c : (target + 1) * c])
                fit_paper(maps, own, self.recipe, seed=self.settings.seed, progress=progress, label=label if target == 0 else f"{label} (shuffled)")
            self.group.broadcast_(list(maps.state_dict().values()))
            self.ridges.append(())
            self.centres.append(sample.y[:, target * c : (target + 1) * c].double().mean((0, 2, 3)))
            results.append(maps.requires_grad_(False).eval())
        return results


def default_hidden(target_channels: int) -> int:
    """Width of the hidden maps where it is not given: twice the target's channels."""
    return max(4, 2 * target_channels)


def _projection(channels: int, settings: Settings) -> Tensor | None:
    """Random orthonormal rows, so that the unexplained share after projection is an upper bound of the one without."""
    if settings.source_channels is None or settings.source_channels >= channels:
        return None
    generator = torch.Generator().manual_seed(settings.seed)
    basis: Tensor = torch.linalg.qr(torch.randn(channels, settings.source_channels, generator=generator, dtype=torch.float64))[0]
    return basis.T.contiguous()
