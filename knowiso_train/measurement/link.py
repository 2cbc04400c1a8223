"""One layer pair in one direction, through the three phases of a measurement."""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
from torch import Tensor

from knowiso_train.disentangle import Disentangler, Settings, make_fitter
from knowiso_train.disentangle.fitter import Fitter
from knowiso_train.errors import KnowisoWarning
from knowiso_train.features import LayerPair, align
from knowiso_train.measurement.capacity import Need, need
from knowiso_train.measurement.images import Images
from knowiso_train.measurement.report import PairResult
from knowiso_train.measurement.shuffling import Shuffler
from knowiso_train.statistics import Group, ResidualStatistics

FEW_IMAGES = 10
T = TypeVar("T")


class Link:
    """Explains `target` from `source` ("forward") or the other way round ("backward"): `fit` batches, `solve`, `report` batches, `result`."""

    def __init__(
        self,
        pair: LayerPair,
        direction: str,
        settings: Settings,
        of_source: Tensor,
        of_target: Tensor,
        expected: int | None,
        group: Group,
        *,
        noise_floor: bool,
        bootstrap: int,
    ) -> None:
        self.pair, self.direction, self.group = pair, direction, group
        x, y = self._ordered(of_source, of_target)
        self.grids = ((x.shape[2], x.shape[3]), (y.shape[2], y.shape[3]))
        self.channels = (x.shape[1], y.shape[1])
        self.settings = settings.on_grid(self.grids[1])
        self.device = torch.device("cpu") if y.device.type == "mps" else y.device  # statistics are float64, which MPS has not
        self.floor, self.bootstrap = noise_floor, bootstrap
        self.expected = expected
        rows = None if expected is None else expected * y.shape[2] * y.shape[3]
        self.need: Need = need(self.label, self.settings, *self.channels, 1 + noise_floor, rows)
        self._fitter: Fitter | None = None
        self._shuffler = Shuffler()
        self._disentanglers: list[Disentangler] = []
        self._statistics: list[ResidualStatistics] = []

    @property
    def label(self) -> str:
        """source → target, in the direction that is explained."""
        a, b = self._ordered(self.pair.source, self.pair.target)
        return f"{a} → {b} ({self.direction})"

    def fit(self, of_source: dict[str, Tensor], of_target: dict[str, Tensor], images: Images) -> None:
        """Take the images of a batch that are for fitting and selecting."""
        wanted = images.of("fit") | images.of("select")
        x, y = self._features(of_source, of_target)
        role = torch.from_numpy(images.role)
        if self.floor:
            y = torch.cat([y, self._shuffler(y, role)], 1)
        if self._fitter is None:
            self._fitter = make_fitter(self.settings, x, y, self.expected or 10_000, targets=1 + self.floor, group=self.group)
        keep = torch.from_numpy(wanted).to(y.device)
        self._fitter.update(x[keep], y[keep], images.index[wanted], images.of("select")[wanted])

    def solve(self, *, progress: bool) -> None:
        """Fit the maps; from here on they are fixed."""
        fitter = self._fitted()
        for target, maps in enumerate(fitter.finish(progress=progress, label=self.label)):
            self._disentanglers.append(Disentangler.of(maps, self.settings))
            bootstrap = self.bootstrap if target == 0 else 0
            self._statistics.append(ResidualStatistics(self.settings.order + 1, fitter.centres[target], bootstrap, self.settings.seed))

    @torch.no_grad()
    def report(self, of_source: dict[str, Tensor], of_target: dict[str, Tensor], images: Images) -> None:
        """Take the images of a batch that are for reporting."""
        wanted = images.of("report")
        if not wanted.any():
            return
        keep = torch.from_numpy(wanted).to(self.device)
        x, y = (feature[keep] for feature in self._features(of_source, of_target))
        targets = [y, self._shuffler(y, torch.full((len(y),), 2))] if self.floor else [y]
        for disentangler, statistics, truth in zip(self._disentanglers, self._statistics, targets, strict=True):
            statistics.update(truth, disentangler.components(x), images.index[wanted])

    def result(self) -> PairResult:
        """What the report says of this pair."""
        for statistics in self._statistics:
            statistics.all_reduce(self.group)
        fitter, estimate = self._fitted(), self._statistics[0].estimate()
        additive = self.settings.solver != "paper"
        floor = 1 - self._statistics[1].estimate().unexplained[-1] if self.floor and self._statistics[0].images > 1 else None
        notes = list(fitter.notes)
        if self._statistics[0].images < FEW_IMAGES:
            notes.append(f"only {int(self._statistics[0].images)} images to report on: the interval is rough")
            warnings.warn(f"{self.label}: {notes[-1]}", KnowisoWarning, stacklevel=3)
        names = self._ordered(self.pair.source, self.pair.target)
        return PairResult(
            source=names[0],
            target=names[1],
            direction=self.direction,
            shares=estimate.shares if additive else estimate.component_variances,
            unexplained=estimate.unexplained[-1],
            interval=estimate.interval,
            share_intervals=estimate.share_intervals if additive else estimate.component_intervals,
            noise_floor=floor,
            component_variances=estimate.component_variances,
            additive=additive,
            source_channels=self.channels[0],
            target_channels=self.channels[1],
            source_grid=self.grids[0],
            target_grid=self.grids[1],
            ridge=fitter.ridges[0],
            rows=fitter.rows,
            warnings=tuple(notes),
            disentangler=self._disentanglers[0],
        )

    def _ordered(self, a: T, b: T) -> tuple[T, T]:
        return (a, b) if self.direction == "forward" else (b, a)

    def _features(self, of_source: dict[str, Tensor], of_target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = self._ordered(of_source[self.pair.source], of_target[self.pair.target])
        dtype = torch.promote_types(x.dtype, y.dtype)
        return align(x.to(self.device, dtype), self.grids[1]), y.to(self.device, dtype)

    def _fitted(self) -> Fitter:
        if self._fitter is None:
            raise RuntimeError("solve() before fit()")
        return self._fitter
