"""Measurement of the isomorphic share of every order between two networks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from knowiso_train.disentangle.config import DisentangleConfig
from knowiso_train.disentangle.disentangler import Disentangler, make_fitter
from knowiso_train.disentangle.fitter import Fitter
from knowiso_train.errors import DataError, KnowisoWarning, OptionError
from knowiso_train.features.extractor import Extractor, align
from knowiso_train.features.modules import LayerPair, network_name, pair_layers
from knowiso_train.features.state import on_device, preserve_state
from knowiso_train.measurement.data import IndexedBatch, PermutedTargets, SplitImageLoader
from knowiso_train.measurement.memory import MemoryEstimate, check_capacity, estimate_memory
from knowiso_train.measurement.report import PairResult, Report
from knowiso_train.regression.explained_variance import ResidualStatistics
from knowiso_train.utils.distributed import ProcessGroup
from knowiso_train.utils.environment import library_versions

DIRECTION_OPTIONS = {"forward": ("forward",), "backward": ("backward",), "both": ("forward", "backward")}

FEW_IMAGES = 10
T = TypeVar("T")


def measure(
    source: nn.Module,
    target: nn.Module,
    loader: Iterable[Any],
    layers: str | Sequence[str] | Sequence[tuple[str, str]] | Mapping[str, str],
    *,
    order: int = 2,
    kernel_size: int | None = None,
    solver: str = "closed_form",
    directions: str = "forward",
    hidden: int | None = None,
    ridge: float | str = "search",
    split: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    max_images: int | None = None,
    max_rows: int = 131_072,
    positions: int | None = None,
    source_channels: int | None = None,
    noise_floor: bool = True,
    bootstrap: int = 500,
    source_transform: Callable[[Any], Any] | None = None,
    target_transform: Callable[[Any], Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    layout: str | Mapping[str, str] | None = None,
    repeated: str = "error",
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    names: tuple[str, str] | None = None,
    progress: bool = True,
    solver_options: Mapping[str, Any] | None = None,
) -> Report:
    """Split each target feature into the parts that the source reproduces with 0, 1, … K non-linear steps and the part that it cannot.

    Both networks run once per image, for all layer pairs together: first over the images to fit and select on, then
    over those to report on.
    Every share is measured on the report images.

    Args:
        source: the network that explains (A).
        target: the network that is explained (B).
        loader: batches (tensor, tuple or dict). A DataLoader over a map-style dataset is read by index, each image
            once, dealt to the
            processes of an initialized `torch.distributed` group; any other iterable must give the same batches when it
            is read twice.
        layers: names or globs for both networks, (source, target) tuples, or a dict {source: target}.
        order: K, the highest number of non-linear steps.
        kernel_size: neighborhood of the maps; None is 1, or 3 for the paper's solver on grids.
        solver: "closed_form", or "paper" (arXiv 1908.01581, trained by its published recipe).
        directions: "forward" (B explained from A), "backward" (A explained from B) or "both".
        hidden: width of the hidden maps of orders ≥ 1; None is twice the target's channels, 512 at most.
        ridge: relative ridge ρ, or "search" on the selection images.
        split: fractions of the images to fit, select and report on, by a seeded hash of the dataset index.
        seed: of split, order, sample, bootstrap and hidden maps.
        max_images: read no more than this many.
        max_rows: most positions kept in memory for orders ≥ 1 (closed form) or for training (paper).
        positions: fit order 0 on this many random positions of each image instead of all.
        source_channels: project the source on this many random orthonormal directions first; the unexplained share is
            then an upper bound.
        noise_floor: fit once more with the targets shuffled between images, and report what that explains.
        bootstrap: replicates for the 95 % intervals.
        source_transform: applied to the images before the source network (resolution, normalization).
        target_transform: the same before the target network.
        forward: `forward(model, batch)` where a network needs more than the images.
        layout: "nchw", "nhwc", "nlc", "ncl" or "nc" for all layers, or by layer name, where it cannot be inferred.
        repeated: "error", "first" or "last", for layers that fire more than once in one forward.
        device: run both networks there, and bring them back; None leaves each where it is.
        autocast: dtype for autocast around the networks (statistics stay in float32 and float64).
        names: of source and target in the report.
        progress: show a progress bar.
        solver_options: see `PaperRecipe` and `StageRecipe`.

    Returns:
        A `Report`; its pairs carry the fitted disentanglers.

    Raises:
        KnowisoError: see the subclasses; modes, `requires_grad`, devices and random state are as before, also then.

    Example:
        >>> a, b = (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()) for _ in range(2))
        >>> images = torch.utils.data.TensorDataset(torch.randn(200, 3, 8, 8))
        >>> report = measure(a, b, torch.utils.data.DataLoader(images, batch_size=20), "1", order=0, progress=False)
        >>> abs(sum(report.pairs[0].shares) + report.pairs[0].unexplained - 1) < 1e-9
        True
    """
    if directions not in DIRECTION_OPTIONS:
        raise OptionError(f"directions must be one of {tuple(DIRECTION_OPTIONS)}, got {directions!r}")
    if bootstrap < 0:
        raise OptionError(f"bootstrap must be >= 0, got {bootstrap}")
    began = time.perf_counter()
    settings = DisentangleConfig(
        order, kernel_size, solver, hidden, ridge, max_rows, positions, source_channels, seed, solver_options
    )
    group = ProcessGroup()
    stream = SplitImageLoader(loader, split, seed, max_images, group)
    pairs = pair_layers(source, target, layers)
    show = progress and group.rank == 0
    counts: dict[str, int] = dict.fromkeys(("fit", "select", "report"), 0)

    with ExitStack() as stack:
        stack.enter_context(preserve_state(source, target))
        stack.enter_context(on_device(device, source, target))
        networks = [
            stack.enter_context(
                Extractor(
                    model,
                    sorted({getattr(p, role) for p in pairs}),
                    name=role,
                    layout=layout,
                    repeated=repeated,
                    transform=transform,
                    forward=forward,
                    autocast=autocast,
                )
            )
            for model, role, transform in ((source, "source", source_transform), (target, "target", target_transform))
        ]

        def features(images: IndexedBatch, *roles: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
            for role in roles:
                counts[role] += int(images.of(role).sum())
            of_source, of_target = (network.run(images.batch) for network in networks)
            return of_source, of_target

        links: list[PairMeasurement] = []
        for images in tqdm(
            stream.fitting(), desc="fit", total=stream.batches(report=False), unit="batch", disable=not show
        ):
            of_source, of_target = features(images, "fit", "select")
            if not links:
                links = _links(pairs, directions, settings, of_source, of_target, stream, group, noise_floor, bootstrap)
            for link in links:
                link.fit(of_source, of_target, images)
        if not all(group.gather(bool(links))):
            raise DataError(
                f"no image to fit on for at least one of {group.size} process(es); give more images, or a smaller batch size"
            )
        for link in tqdm(links, desc="solve", unit="layer", disable=not show or not (order or solver == "paper")):
            link.solve(progress=show)
        for images in tqdm(
            stream.reporting(), desc="report", total=stream.batches(report=True), unit="batch", disable=not show
        ):
            of_source, of_target = features(images, "report")
            for link in links:
                link.report(of_source, of_target, images)
        totals = {role: sum(group.gather(count)) for role, count in counts.items()}
        if not totals["report"]:
            raise DataError(
                f"no image fell to the report set (fit {totals['fit']}, select {totals['select']}); "
                "give more images or a larger last fraction in split="
            )
        results = tuple(link.result() for link in links)

    source_name, target_name = names or (network_name(source), network_name(target))
    return Report(
        source=source_name,
        target=target_name,
        pairs=results,
        images=totals,
        settings=settings.to_dict()
        | {
            "directions": directions,
            "split": list(split),
            "max_images": max_images,
            "bootstrap": bootstrap,
            "processes": group.size,
        },
        seconds=time.perf_counter() - began,
        versions=library_versions(),
    )


def _links(
    pairs: list[LayerPair],
    directions: str,
    settings: DisentangleConfig,
    of_source: dict[str, torch.Tensor],
    of_target: dict[str, torch.Tensor],
    stream: SplitImageLoader,
    group: ProcessGroup,
    noise_floor: bool,
    bootstrap: int,
) -> list[PairMeasurement]:
    """One link per layer pair and direction, all shapes known, and memory checked before any of it is taken."""
    make = [
        PairMeasurement(
            pair,
            direction,
            settings,
            of_source[pair.source],
            of_target[pair.target],
            stream.expected,
            group,
            noise_floor=noise_floor,
            bootstrap=bootstrap,
        )
        for direction in DIRECTION_OPTIONS[directions]
        for pair in pairs
    ]
    by_device: dict[torch.device, list[PairMeasurement]] = {}
    for link in make:
        by_device.setdefault(link.device, []).append(link)
    for device, members in by_device.items():
        check_capacity([member.need for member in members], device)
    return make


class PairMeasurement:
    """Explains `target` from `source` ("forward") or the other way round ("backward"): `fit` batches, `solve`, `report` batches, `result`."""

    def __init__(
        self,
        pair: LayerPair,
        direction: str,
        settings: DisentangleConfig,
        of_source: Tensor,
        of_target: Tensor,
        expected: int | None,
        group: ProcessGroup,
        *,
        noise_floor: bool,
        bootstrap: int,
    ) -> None:
        self.pair, self.direction, self.group = pair, direction, group
        x, y = self._ordered(of_source, of_target)
        self.grids = ((x.shape[2], x.shape[3]), (y.shape[2], y.shape[3]))
        self.channels = (x.shape[1], y.shape[1])
        self.settings = settings.on_grid(self.grids[1])
        # Statistics are float64, which MPS has not
        self.device = torch.device("cpu") if y.device.type == "mps" else y.device
        self.floor, self.bootstrap = noise_floor, bootstrap
        self.expected = expected
        rows = None if expected is None else expected * y.shape[2] * y.shape[3]
        self.need: MemoryEstimate = estimate_memory(self.label, self.settings, *self.channels, 1 + noise_floor, rows)
        self._fitter: Fitter | None = None
        self._shuffler = PermutedTargets()
        self._disentanglers: list[Disentangler] = []
        self._statistics: list[ResidualStatistics] = []

    @property
    def label(self) -> str:
        """source → target, in the direction that is explained."""
        a, b = self._ordered(self.pair.source, self.pair.target)
        return f"{a} → {b} ({self.direction})"

    def fit(self, of_source: dict[str, Tensor], of_target: dict[str, Tensor], images: IndexedBatch) -> None:
        """Take the images of a batch that are for fitting and selecting."""
        wanted = images.of("fit") | images.of("select")
        x, y = self._features(of_source, of_target)
        role = torch.from_numpy(images.role)
        if self.floor:
            y = torch.cat([y, self._shuffler(y, role)], 1)
        if self._fitter is None:
            self._fitter = make_fitter(
                self.settings, x, y, self.expected or 10_000, targets=1 + self.floor, group=self.group
            )
        keep = torch.from_numpy(wanted).to(y.device)
        self._fitter.update(x[keep], y[keep], images.index[wanted], images.of("select")[wanted])

    def solve(self, *, progress: bool) -> None:
        """Fit the maps; from here on they are fixed."""
        fitter = self._fitted()
        for target, maps in enumerate(fitter.finish(progress=progress, label=self.label)):
            self._disentanglers.append(Disentangler.of(maps, self.settings))
            bootstrap = self.bootstrap if target == 0 else 0
            self._statistics.append(
                ResidualStatistics(self.settings.order + 1, fitter.centers[target], bootstrap, self.settings.seed)
            )

    @torch.no_grad()
    def report(self, of_source: dict[str, Tensor], of_target: dict[str, Tensor], images: IndexedBatch) -> None:
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
        floor = (
            1 - self._statistics[1].estimate().unexplained[-1]
            if self.floor and self._statistics[0].images > 1
            else None
        )
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
