"""Measurement of one layer pair in one direction."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from knowiso_train.disentangle.config import Fitter, MemoryEstimate
from knowiso_train.disentangle.disentangler import Disentangler, fitter_type, make_fitter
from knowiso_train.errors import CapacityError, KnowisoWarning, OptionError, ShapeError
from knowiso_train.features.extractor import Extractor, align
from knowiso_train.features.modules import LayerPair
from knowiso_train.features.padding import ValidPositions
from knowiso_train.features.state import preserve_state
from knowiso_train.measurement.config import MIN_RELIABLE_IMAGES, Direction, MeasureConfig
from knowiso_train.measurement.data import SPLIT_NAMES, IndexedBatch, PermutedTargets
from knowiso_train.measurement.functional import ExplainedNetwork, FunctionalStatistics
from knowiso_train.measurement.report import PairResult
from knowiso_train.measurement.similarity import SimilarityMoments
from knowiso_train.regression.explained_variance import ResidualStatistics
from knowiso_train.utils.batch import batch_size, index_batch
from knowiso_train.utils.distributed import ProcessGroup
from knowiso_train.utils.memory import format_bytes, usable_bytes

Features = dict[str, Tensor]  # (N, C, H, W) by layer name

DEFAULT_EXPECTED_IMAGES = 10_000  # if the loader does not provide its length
SELECT = SPLIT_NAMES.index("select")

T = TypeVar("T")


@dataclass(frozen=True)
class PairSamples:
    """Features of one batch as the fit and the statistics take them.

    With padding, each valid position is an image of its own, with one position.

    Attributes:
        x: Source on the target's grid, (M, C_A, H, W).
        targets: The target feature and, for the noise floor, its permutation, each (M, C_B, H, W).
        image: Dataset index of each image, (M,).
        index: Distinct index of each image or position, (M,).
        part: Position in `SPLIT_NAMES` of each image, (M,).
        pooled: Means of both features over the valid positions of each image. None: without padding.
    """

    x: Tensor
    targets: list[Tensor]
    image: NDArray[np.int64]
    index: NDArray[np.int64]
    part: NDArray[np.int64]
    pooled: tuple[Tensor, Tensor] | None = None


class PairMeasurement:
    """Measurement of one layer pair in one direction: `fit` batches, `solve`, `report` batches, `result`.

    With `noise_floor=True` two targets are fitted: the target feature, and the same feature with its images permuted.

    Args:
        pair: Names of the two layers.
        direction: Direction to measure.
        config: Options of the measurement.
        source_features: First batch of the source network; gives shapes and device.
        target_features: First batch of the target network.
        expected_images: Number of images of the measurement. None: unknown.
        group: Processes that share the measurement.
    """

    def __init__(
        self,
        pair: LayerPair,
        direction: Direction,
        config: MeasureConfig,
        source_features: Features,
        target_features: Features,
        *,
        expected_images: int | None,
        group: ProcessGroup,
    ) -> None:
        self.pair, self.direction, self.config, self.group = pair, direction, config, group
        x, y = self._in_direction(source_features[pair.source], target_features[pair.target])
        self.grids = ((x.shape[2], x.shape[3]), (y.shape[2], y.shape[3]))
        self.channels = (x.shape[1], y.shape[1])
        self.settings = config.disentangle_config().on_grid(self.grids[1])
        # MPS has no float64, in which the statistics are accumulated
        self.device = torch.device("cpu") if y.device.type == "mps" else y.device
        self.expected_images = expected_images
        self._fitter: Fitter | None = None
        self._permute = PermutedTargets()
        self._similarity: SimilarityMoments | None = None
        if config.similarities:
            self._similarity = SimilarityMoments(config.similarities, *self.channels, self.device, self.label)
        self._disentanglers: list[Disentangler] = []
        self._statistics: list[ResidualStatistics] = []
        self._functional = FunctionalStatistics(self.settings.order + 1) if config.functional else None

    @property
    def label(self) -> str:
        """Layers and direction, for messages."""
        source, target = self._in_direction(self.pair.source, self.pair.target)
        return f"{source} → {target} ({self.direction})"

    @property
    def explained_layer(self) -> str:
        """Name of the explained layer."""
        return self._in_direction(self.pair.source, self.pair.target)[1]

    @property
    def num_targets(self) -> int:
        """Number of targets to fit: the feature and, for the noise floor, its permutation."""
        return 1 + self.config.noise_floor

    def estimate_memory(self) -> MemoryEstimate:
        """Return the memory estimate of the fit."""
        height, width = self.grids[1]
        rows = None if self.expected_images is None else self.expected_images * height * width
        fitter = fitter_type(self.settings)
        estimate = fitter.estimate_memory(self.settings, *self.channels, self.num_targets, rows)
        similarity = SimilarityMoments.estimate_bytes(self.config.similarities, *self.channels)
        return replace(estimate, streaming=estimate.streaming + similarity)

    def fit(self, source_features: Features, target_features: Features, batch: IndexedBatch) -> None:
        """Accumulate the fitting and selection images of a batch."""
        samples = self._samples(source_features, target_features, batch, "fit", "select")
        if self._fitter is None:
            expected = self.expected_images or DEFAULT_EXPECTED_IMAGES
            if batch.valid is not None:
                expected *= batch.valid.mask.shape[1]
            x, y = samples.x, torch.cat(samples.targets, 1)
            self._fitter = make_fitter(self.settings, x, y, expected, num_targets=self.num_targets, group=self.group)
        self._fitter.update(samples.x, torch.cat(samples.targets, 1), samples.index, samples.part == SELECT)
        self._update_similarity(samples, report=False)

    @property
    def work(self) -> float:
        """Approximate multiply-adds of `solve`."""
        return self._started_fitter().work

    def solve(self, bar: tqdm[Any]) -> None:
        """Fit the maps, which are fixed from here on, and advance a bar by `work`."""
        fitter = self._started_fitter()
        for target, maps in enumerate(fitter.finish(bar=bar, label=self.label)):
            self._disentanglers.append(Disentangler.of(maps, self.settings))
            # The noise floor is reported without an interval
            bootstrap = self.config.bootstrap if target == 0 else 0
            self._statistics.append(
                ResidualStatistics(self.settings.order + 1, fitter.centers[target], bootstrap, self.settings.seed)
            )

    @torch.no_grad()
    def report(
        self,
        source_features: Features,
        target_features: Features,
        batch: IndexedBatch,
        network: ExplainedNetwork | None = None,
    ) -> None:
        """Accumulate the residuals of the report images of a batch, and the outputs of the explained network."""
        if not batch.mask("report").any():
            return
        samples = self._samples(source_features, target_features, batch, "report")
        components = [disentangler.components(samples.x) for disentangler in self._disentanglers]
        for parts, statistics, target in zip(components, self._statistics, samples.targets, strict=True):
            statistics.update(target, parts, samples.image)
        self._update_similarity(samples, report=True)
        if self._functional is not None and network is not None:
            x, feature = self._aligned(source_features, target_features)
            images = torch.from_numpy(batch.mask("report")).to(self.device)
            # With padding the samples are single positions
            parts = components[0] if samples.pooled is None else self._disentanglers[0].components(x[images])
            center = self._started_fitter().centers[0]
            self._functional.update(network, self.explained_layer, feature, parts, center, images)

    def result(self, num_images: int) -> PairResult:
        """Return the figures of this pair, reduced over the processes.

        Args:
            num_images: Number of report images of all processes.
        """
        for statistics in (*self._statistics, self._functional, self._similarity):
            if statistics is not None:
                statistics.all_reduce(self.group)
        functional, residual_only, target_output = self._functional.shares() if self._functional else ((), None, None)
        fitter, estimate = self._started_fitter(), self._statistics[0].estimate()
        # The paper's components are correlated: their variances are reported as published, and do not sum to 1
        additive = self.settings.solver != "paper"
        noise_floor = None
        if self.config.noise_floor:
            noise_floor = 1 - self._statistics[1].estimate().unexplained[-1]
        notes = list(fitter.notes)
        if num_images < MIN_RELIABLE_IMAGES:
            notes.append(f"only {num_images} images to report on: shares and interval are rough")
            warnings.warn(f"{self.label}: {notes[-1]}", KnowisoWarning, stacklevel=4)
        for note in self._similarity.notes if self._similarity else ():
            notes.append(note)
            warnings.warn(f"{self.label}: {note}", KnowisoWarning, stacklevel=4)
        source, target = self._in_direction(self.pair.source, self.pair.target)
        return PairResult(
            source=source,
            target=target,
            direction=self.direction,
            shares=estimate.shares if additive else estimate.component_variances,
            unexplained=estimate.unexplained[-1],
            interval=estimate.interval,
            share_intervals=estimate.share_intervals if additive else estimate.component_intervals,
            noise_floor=noise_floor,
            component_variances=estimate.component_variances,
            additive=additive,
            source_channels=self.channels[0],
            target_channels=self.channels[1],
            source_grid=self.grids[0],
            target_grid=self.grids[1],
            ridge=fitter.ridges[0],
            rows=fitter.rows,
            warnings=tuple(notes),
            functional=functional,
            residual_only=residual_only,
            target_output=target_output,
            similarity=self._similarity.result() if self._similarity else {},
            disentangler=self._disentanglers[0],
        )

    def _in_direction(self, of_source: T, of_target: T) -> tuple[T, T]:
        return (of_source, of_target) if self.direction == "forward" else (of_target, of_source)

    def _samples(
        self, source_features: Features, target_features: Features, batch: IndexedBatch, *parts: str
    ) -> PairSamples:
        """Return the features of the images of some parts, without padding.

        Raises:
            ShapeError: Another number of features than images.
            CaptureError: Padded positions that cannot be left out.
        """
        x, y = self._aligned(source_features, target_features)
        if len(x) != len(batch.index) or len(y) != len(batch.index):
            raise ShapeError(
                f"{self.label}: expected one feature of each of the {len(batch.index)} images of the batch, got "
                f"{len(x)} of the source and {len(y)} of the target; check the transforms and forward="
            )
        valid = self._valid_positions(batch)
        if valid is not None:
            # So that the targets of all images can be permuted position by position
            x, y, valid = valid.repeated(x), valid.repeated(y), valid.leading()
        targets = [y]
        if self.config.noise_floor:
            targets.append(self._permute(y, torch.from_numpy(batch.part)))
        mask = np.logical_or.reduce([batch.mask(part) for part in parts])
        images = torch.from_numpy(mask).to(y.device)
        x, targets = x[images], [target[images] for target in targets]
        index, part = batch.index[mask], batch.part[mask]
        if valid is None:
            return PairSamples(x, targets, index, index, part)
        valid = ValidPositions(valid.origin, valid.mask[images.to(valid.mask.device)])
        counts, length = valid.counts.cpu().numpy(), valid.mask.shape[1]
        owner = np.repeat(np.arange(len(index)), counts)
        position = np.concatenate([np.arange(count) for count in counts]) if len(counts) else owner
        single = [valid.rows(feature)[:, :, None, None] for feature in (x, *targets)]
        pooled = (valid.mean(x), valid.mean(targets[0]))
        return PairSamples(single[0], single[1:], index[owner], index[owner] * length + position, part[owner], pooled)

    def _valid_positions(self, batch: IndexedBatch) -> ValidPositions | None:
        """Return the valid positions of features with padding; None for features to which the mask does not apply."""
        source_grid, grid = self.grids
        if batch.valid is None or source_grid == grid == (1, 1):
            return None
        solver_fits = self.settings.solver == "closed_form" and self.settings.positions is None
        if solver_fits and batch.valid.fits(grid, source_grid, kernel_size=self.settings.kernel_size or 1):
            return batch.valid
        if batch.valid.complete:
            return None
        if not solver_fits:
            raise OptionError(
                f'{self.label}: {batch.valid.origin} marks padded positions, which solver="closed_form" without '
                "positions= can leave out. Change these options, or count padding as positions with mask=None"
            )
        layers = self._in_direction(self.pair.source, self.pair.target)
        raise batch.valid.misfit_error(dict(zip(layers, self.grids, strict=True)))

    def _update_similarity(self, samples: PairSamples, *, report: bool) -> None:
        if self._similarity is not None and len(samples.x):
            self._similarity.update(samples.x, samples.targets[0], report=report, pooled=samples.pooled)

    def _aligned(self, source_features: Features, target_features: Features) -> tuple[Tensor, Tensor]:
        """Return both features in one dtype, the explaining one resampled to the grid of the explained one."""
        x, y = self._in_direction(source_features[self.pair.source], target_features[self.pair.target])
        dtype = torch.promote_types(x.dtype, y.dtype)
        return align(x.to(self.device, dtype), self.grids[1]), y.to(self.device, dtype)

    def _started_fitter(self) -> Fitter:
        if self._fitter is None:
            raise RuntimeError("solve() before fit()")
        return self._fitter


def check_capacity(estimates: Mapping[str, MemoryEstimate], device: torch.device) -> None:
    """Raise an error if the estimated memory exceeds the usable memory of a device.

    Args:
        estimates: Memory estimate of each layer pair, by its label.
        device: Device of the statistics.

    Raises:
        CapacityError: The estimate exceeds `usable_bytes`.
    """
    usable = usable_bytes(device)
    # All pairs accumulate at the same time, but are solved one after the other
    total = sum(e.streaming for e in estimates.values()) + max(e.solving for e in estimates.values())
    if total <= usable:
        return
    label, largest = max(estimates.items(), key=lambda item: item[1].streaming + item[1].solving)
    raise CapacityError(
        f"measuring {len(estimates)} layer pair(s) needs about {format_bytes(total)} on {device}, "
        f"but {format_bytes(usable)} can be used; the largest is {label} with {largest.num_features} features "
        f"({format_bytes(largest.streaming + largest.solving)}). Use kernel_size=1, source_channels=256 (a random "
        "projection of the source), positions=16, a smaller max_rows, order=0, or fewer layers a call."
    )


def check_activations(extractors: Sequence[Extractor], batch: Any) -> None:
    """Raise an error if the activations of a batch would exceed the usable memory, from those of one image.

    The networks run on the first image of the batch, the second one beside the features of the first. Networks with
    parameters of special classes (sharded, lazy, quantized) are not checked.

    Args:
        extractors: Networks with their hooks, in the order in which they run.
        batch: First batch of the loader.

    Raises:
        CapacityError: The activations exceed `usable_bytes`.
    """
    models = [extractor.model for extractor in extractors]
    if any(type(parameter) is not nn.Parameter for model in models for parameter in model.parameters()):
        return
    held: dict[torch.device, int] = {}
    with preserve_state(*models):
        for extractor in extractors:
            device = extractor.device or torch.device("cpu")
            usable = usable_bytes(device)
            try:
                size = batch_size(batch)
                image = index_batch(batch, torch.arange(1))
                features = extractor.run_within(image, usable // size - held.get(device, 0))
            except CapacityError:
                raise CapacityError(
                    f"{extractor.name}: the activations of a batch of {size} images exceed the {format_bytes(usable)} "
                    f"that can be used on {device}. Use smaller batches, smaller images, or fewer layers a call"
                ) from None
            except Exception:  # an error of the network or the batch is raised again by the pass over the whole batch
                return
            held[device] = held.get(device, 0) + features
