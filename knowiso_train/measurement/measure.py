"""Measurement of the explained share of every order between two networks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from knowiso_train.disentangle.config import Solver, solve_bar
from knowiso_train.errors import DataError, OptionError
from knowiso_train.features.extractor import Extractor, check_line
from knowiso_train.features.hooks import Side
from knowiso_train.features.layer_options import check_named_layers, sides_of_networks
from knowiso_train.features.modules import LayerPair, distinct_names, network_name, pair_layers
from knowiso_train.features.state import checked_device, on_device, preserve_state
from knowiso_train.features.wrappers import has_collective_forward
from knowiso_train.measurement._pair import Features, PairMeasurement, check_activations, check_capacity
from knowiso_train.measurement._shared_network import SharedNetwork
from knowiso_train.measurement.config import MIN_REPORT_IMAGES, Direction, Directions, Mask, MeasureConfig, Repeated
from knowiso_train.measurement.data import SPLIT_NAMES, IndexedBatch, SplitImageLoader
from knowiso_train.measurement.functional import AUTO_LABELS, ExplainedNetwork
from knowiso_train.measurement.report import Report
from knowiso_train.measurement.similarity import SimilarityName
from knowiso_train.utils.batch import batch_size, index_batch
from knowiso_train.utils.distributed import ProcessGroup
from knowiso_train.utils.environment import library_versions
from knowiso_train.utils.validation import validate_arguments

MAX_CHECKED_IMAGES = 8  # for the check that features can be replaced

Layers = str | Sequence[str] | Sequence[tuple[str, str]] | Mapping[str, str]


@validate_arguments
def measure(
    source: nn.Module,
    target: nn.Module,
    loader: Iterable[Any],
    layers: Layers,
    *,
    order: int = 2,
    kernel_size: int | None = None,
    solver: Solver = "closed_form",
    directions: Directions = "forward",
    hidden: int | None = None,
    ridge: float | Literal["search"] = "search",
    split: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    max_images: int | None = None,
    max_rows: int | None = None,
    positions: int | None = None,
    source_channels: int | None = None,
    noise_floor: bool = True,
    bootstrap: int = 500,
    source_transform: Callable[[Any], Any] | None = None,
    target_transform: Callable[[Any], Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    layout: str | Mapping[str, str] | None = None,
    repeated: Repeated = "error",
    functional: bool = False,
    labels: str | Callable[[Any], Any] | None = AUTO_LABELS,
    output: Callable[[Any], Tensor] | None = None,
    at: Side | Mapping[str, Side] = "output",
    mask: Mask | None = "auto",
    similarity: bool | SimilarityName | Sequence[SimilarityName] = False,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    names: tuple[str, str] | None = None,
    progress: bool = True,
    solver_options: Mapping[str, Any] | None = None,
) -> Report:
    """Measure the share of each target feature that the source features explain with 0, 1, … K non-linear steps.

    Each network processes every image once, for all layer pairs together: first the fitting and selection images, then
    the report images. One image is processed before them, to estimate the memory of a batch. All shares are measured
    on the report images. Method: arXiv 1908.01581.

    Args:
        source: Explaining network (A).
        target: Explained network (B).
        loader: Batches (tensor, tuple or dict). A DataLoader over a map-style dataset is read by index. Its images are
            distributed over the processes of an initialized `torch.distributed` group. Any other iterable must yield
            the same batches in both passes.
        layers: Names or globs for both networks, (source, target) tuples, or a dict {source: target}.
        order: Highest number K of non-linear steps. 0 is linear and takes seconds; each further order trains a map.
        kernel_size: Kernel size of the maps. None: 1, or 3 for the paper's solver on grids.
        solver: "closed_form", or "paper" (arXiv 1908.01581, trained by its published recipe).
        directions: "forward" (B explained from A), "backward" (A explained from B) or "both".
        hidden: Width of the hidden maps of orders ≥ 1. None: four times the target's channels, limited for
            wide layers.
        ridge: Relative ridge ρ, or "search" on the selection images.
        split: Fractions of the images to fit, select and report on, by a seeded hash of the dataset index.
        seed: Seed of split, order, sample, bootstrap and hidden maps.
        max_images: Maximum number of images. None: all.
        max_rows: Maximum number of positions kept in memory for orders ≥ 1, or for training the paper's network. None:
            131,072, or all for the paper's network.
        positions: Number of random positions of each image for the fit of order 0. None: all.
        source_channels: Number of random orthonormal directions to project the source feature on. The unexplained share
            is then an upper bound. None: no projection.
        noise_floor: Also fit targets that are permuted between images, and report the share that is explained there.
        bootstrap: Number of replicates for the 95 % intervals.
        source_transform: Transform of the images for the source network (resolution, normalization).
        target_transform: Transform of the images for the target network.
        forward: `forward(model, batch)`, replaces `model(images)` for networks with other inputs.
        layout: "nchw", "nhwc", "nlc", "ncl" or "nc", for all layers or by name or glob. None: inferred. It can state
            prefix tokens, grid and suffix tokens: "nlc:1+14x14", "nlc:1+14x14+100", or "nlc:line" for a sequence.
        repeated: "error", "first" or "last": treatment of layers that are called more than once in one forward pass.
        functional: Also replace each explained feature by a part of it, and compare the output of its network with the
            unchanged output on the report images. Each pair then has `functional[k]` (orders 0…k), `residual_only`
            (residual plus the feature's mean) and `target_output` (unchanged). See `FunctionalShare`.
        labels: Labels for top-1 with `functional=True`: the key of batches that are mappings, or a function of the
            batch. "auto": the second element of a tuple, or an entry such as "labels". None: no labels.
        output: Function of a network's output that returns its logits (N, C, …). None: the tensor, its "logits" or
            "out", or its only floating tensor.
        at: Side to measure: "output", "input" (the first positional tensor of the call, such as the feature before
            an activation), or a mapping from name or glob to side.
        mask: Function of a batch that returns True for its valid positions, (N, L) or (N, H, W). Others, such as padded
            tokens, are left out. "auto": the entry of batches that are mappings, such as "attention_mask". None: all.
        similarity: Also compute linear CKA, orthogonal Procrustes and linear-regression R²; or names of
            `SIMILARITY_NAMES`. See `SimilarityMoments`.
        device: Device of both networks during the call. None: their present devices.
        autocast: dtype of autocast for the networks; statistics stay in float32 and float64. None: no autocast.
        names: Names of source and target in the report. None: architectures or class names, with the role if both are
            equal.
        progress: Show progress bars.
        solver_options: Fields of `NonlinearConfig` (closed form) or `PaperConfig`.

    Returns:
        A `Report`; its pairs hold the fitted disentanglers.

    Raises:
        KnowisoError: See its subclasses. Modes, `requires_grad`, devices and random state are restored also then.

    Examples:
        >>> a, b = (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()) for _ in range(2))
        >>> images = torch.utils.data.TensorDataset(torch.randn(200, 3, 8, 8))
        >>> report = measure(a, b, torch.utils.data.DataLoader(images, batch_size=20), "1", order=0, progress=False)
        >>> abs(sum(report.pairs[0].shares) + report.pairs[0].unexplained - 1) < 1e-9
        True
    """
    config = MeasureConfig(
        order=order,
        kernel_size=kernel_size,
        solver=solver,
        directions=directions,
        hidden=hidden,
        ridge=ridge,
        split=split,
        seed=seed,
        max_images=max_images,
        max_rows=max_rows,
        positions=positions,
        source_channels=source_channels,
        noise_floor=noise_floor,
        bootstrap=bootstrap,
        source_transform=source_transform,
        target_transform=target_transform,
        forward=forward,
        layout=layout,
        repeated=repeated,
        functional=functional,
        labels=labels,
        output=output,
        at=at,
        mask=mask,
        similarity=similarity,
        device=device,
        autocast=autocast,
        names=names,
        progress=progress,
        solver_options=solver_options,
    )
    config.check_functional_options()
    if names is not None and names[0] == names[1]:
        raise OptionError(f"names= must be different for source and target, got {names}")
    return run_measurement(source, target, loader, layers, config)


def run_measurement(
    source: nn.Module,
    target: nn.Module,
    loader: Iterable[Any] | SplitImageLoader,
    layers: Layers,
    config: MeasureConfig,
    shared_source: SharedNetwork | None = None,
    shared_target: SharedNetwork | None = None,
) -> Report:
    """Run `measure` with the options of a config.

    Args:
        source: Explaining network.
        target: Explained network.
        loader: Batches, or images that are split already, with the split, seed and `max_images` of the config.
        layers: As for `measure`.
        config: Options.
        shared_source: Features of the source network that measurements on the same images share. None: not shared.
        shared_target: The same of the target network.
    """
    start = time.perf_counter()
    group = ProcessGroup()
    images = loader
    if not isinstance(images, SplitImageLoader):
        images = SplitImageLoader(images, config.split, config.seed, config.max_images, group)
    pairs = pair_layers(source, target, layers)
    checked_device(config.device, source, target)  # initializes CUDA, whose random state is then restored too
    with ExitStack() as stack:
        stack.enter_context(preserve_state(source, target))
        stack.enter_context(on_device(config.device, source, target))
        extractors = [stack.enter_context(extractor) for extractor in _extractors(source, target, pairs, config)]
        measurement = _Measurement(pairs, extractors, images, group, config, shared_source, shared_target)
        measurement.fit()
        measurement.solve()
        measurement.report()
        num_images = measurement.total_images()
        results = tuple(pair.result(num_images["report"]) for pair in measurement.pair_measurements)
    source_name, target_name = config.names or distinct_names(network_name(source), network_name(target))
    return Report(
        source=source_name,
        target=target_name,
        pairs=results,
        images=num_images,
        settings=config.report_settings() | {"processes": group.size},
        seconds=time.perf_counter() - start,
        versions=library_versions(),
    )


def _extractors(
    source: nn.Module, target: nn.Module, pairs: Sequence[LayerPair], config: MeasureConfig
) -> list[Extractor]:
    networks = (("source", source, config.source_transform), ("target", target, config.target_transform))
    layers = [sorted({getattr(pair, role) for pair in pairs}) for role, _, _ in networks]
    layers_by_network = list(zip((source, target), layers, strict=True))
    sides = sides_of_networks(config.at, layers_by_network)
    check_named_layers("layout", config.layout, layers_by_network)
    return [
        Extractor(
            model,
            names,
            name=role,
            at=at,
            layout=config.layout,
            repeated=config.repeated,
            transform=transform,
            forward=config.forward,
            autocast=config.autocast,
        )
        for (role, model, transform), names, at in zip(networks, layers, sides, strict=True)
    ]


class _Measurement:
    """Measurement of all layer pairs: two passes over the images, with the solve between them."""

    def __init__(
        self,
        pairs: Sequence[LayerPair],
        extractors: Sequence[Extractor],
        images: SplitImageLoader,
        group: ProcessGroup,
        config: MeasureConfig,
        shared_source: SharedNetwork | None = None,
        shared_target: SharedNetwork | None = None,
    ) -> None:
        self.pairs, self.extractors, self.images, self.group, self.config = pairs, extractors, images, group, config
        self.show_progress = config.progress and group.rank == 0
        self.collective_forward = group.size > 1 and any(has_collective_forward(part.model) for part in extractors)
        self.shared_source = None if self.collective_forward else shared_source
        self.shared_target = None if self.collective_forward else shared_target
        self.last_batch: IndexedBatch | None = None
        self.num_images = dict.fromkeys(SPLIT_NAMES, 0)
        self.pair_measurements: list[PairMeasurement] = []
        # By the direction in which the network is explained
        self.explained: dict[Direction, ExplainedNetwork] = {}
        if config.functional:
            extractor_of = {"forward": extractors[1], "backward": extractors[0]}
            self.explained = {
                direction: ExplainedNetwork(extractor_of[direction], config.output, config.labels)
                for direction in config.measured_directions
            }

    def fit(self) -> None:
        """Accumulate the fitting and selection images."""
        for batch in self._batches("fit", report=False):
            if not self.pair_measurements:
                check_activations(self.extractors, batch.batch)
            # Bad outputs and labels are errors before maps are fitted
            features = self._extract(batch, "fit", "select", outputs=not self.pair_measurements)
            if not self.pair_measurements:
                self._start(*features)
                self._check_replacements(batch.batch)
            for pair in self.pair_measurements:
                pair.fit(*features, batch)
        if not all(self.group.gather(bool(self.pair_measurements))):
            raise DataError(
                f"no image to fit on for at least one of {self.group.size} process(es); "
                "give more images, or a smaller batch size"
            )
        self.images.check_distinct()

    def solve(self) -> None:
        """Fit the maps of all layer pairs."""
        # The closed form of order 0 is too fast for a progress bar
        trains = self.config.order > 0 or self.config.solver == "paper"
        show = self.show_progress and trains
        with solve_bar(sum(pair.work for pair in self.pair_measurements), show=show) as bar:
            for pair in self.pair_measurements:
                pair.solve(bar)

    def report(self) -> None:
        """Accumulate the residuals of the report images."""
        for batch in self._batches("report", report=True):
            features = self._extract(batch, "report", outputs=True)
            for pair in self.pair_measurements:
                pair.report(*features, batch, self.explained.get(pair.direction))
            if self.shared_source is not None:
                self.shared_source.compare_outputs(self.explained, batch)
        for network in self.explained.values():
            network.substitution.clear()

    def total_images(self) -> dict[str, int]:
        """Return the number of images of each part over all processes."""
        totals = {part: sum(self.group.gather(count)) for part, count in self.num_images.items()}
        if totals["report"] < MIN_REPORT_IMAGES:
            raise DataError(
                f"expected at least {MIN_REPORT_IMAGES} images in the report set, got {totals['report']} (fit "
                f"{totals['fit']}, select {totals['select']}); give more images or a larger last fraction in split="
            )
        return totals

    def _start(self, source_features: Features, target_features: Features) -> None:
        """Create the pair measurements from the first batch, and check the memory before it is allocated."""
        self._check_lines(source_features, target_features)
        self.pair_measurements = [
            PairMeasurement(
                pair,
                direction,
                self.config,
                source_features,
                target_features,
                expected_images=self.images.expected,
                group=self.group,
            )
            for direction in self.config.measured_directions
            for pair in self.pairs
        ]
        for device in {pair.device for pair in self.pair_measurements}:
            pairs = [pair for pair in self.pair_measurements if pair.device == device]
            check_capacity({pair.label: pair.estimate_memory() for pair in pairs}, device)

    def _check_lines(self, source_features: Features, target_features: Features) -> None:
        """Check that no pair consists of a line of tokens and a feature map."""
        for pair in self.pairs:
            layers, features = (pair.source, pair.target), (source_features[pair.source], target_features[pair.target])
            for i, extractor in enumerate(self.extractors):
                if extractor.specs[layers[i]].is_line:
                    check_line(features[i], features[1 - i], f"{extractor.name}: layer {layers[i]!r}")

    def _check_replacements(self, batch: Any) -> None:
        """Check on the first images that the explained features can be replaced."""
        # A user's function may need the whole batch
        if self.explained and self.config.forward is None:
            batch = index_batch(batch, torch.arange(min(MAX_CHECKED_IMAGES, batch_size(batch))))
        for direction, network in self.explained.items():
            pairs = [pair for pair in self.pair_measurements if pair.direction == direction]
            network.substitution.run(batch)
            for layer in sorted({pair.explained_layer for pair in pairs}):
                network.substitution.verify(layer)
            network.substitution.clear()

    def _extract(self, batch: IndexedBatch, *parts: str, outputs: bool = False) -> tuple[Features, Features]:
        for part in parts:
            self.num_images[part] += int(batch.mask(part).sum())
        explained = (self.explained.get("backward"), self.explained.get("forward")) if outputs else (None, None)
        source_features, target_features = (
            _features(extractor, network, shared, batch)
            for extractor, network, shared in zip(
                self.extractors, explained, (self.shared_source, self.shared_target), strict=True
            )
        )
        return source_features, target_features

    def _batches(self, description: str, *, report: bool) -> Iterator[IndexedBatch]:
        batches = self.images.report_batches() if report else self.images.fit_batches()
        total = self.images.num_batches(report=report)
        progress = tqdm(batches, desc=description, total=total, unit="batch", disable=not self.show_progress)
        masked = (batch.with_mask(self.config.mask) for batch in progress)
        if not self.collective_forward:
            yield from masked
            return
        while True:
            batch = next(masked, None)
            has_batch = self.group.gather(batch is not None)
            if not any(has_batch) or (self.last_batch is None and not all(has_batch)):
                return
            if batch is not None:
                self.last_batch = batch
                yield batch
            elif self.last_batch is not None:
                # A forward that the other processes wait for, without using its features
                self._extract(self.last_batch)


def _features(
    extractor: Extractor, network: ExplainedNetwork | None, shared: SharedNetwork | None, batch: IndexedBatch
) -> Features:
    if network is not None:  # records what `Substitution` needs
        return network.run(batch.batch)
    return extractor.run(batch.batch) if shared is None else shared.run(extractor, batch)
