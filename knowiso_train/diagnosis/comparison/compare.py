"""Comparison of stages with a reference network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from knowiso_train.diagnosis.comparison._digests import batch_digest, function_identity, network_digest
from knowiso_train.diagnosis.comparison._folder import StageFolder
from knowiso_train.diagnosis.comparison.checkpoints import CheckpointStage
from knowiso_train.diagnosis.comparison.report import StageComparison, StageLayer, StageResult
from knowiso_train.errors import DataError, InputTypeError, OptionError
from knowiso_train.features.extractor import Extractor
from knowiso_train.features.hooks import hook_target
from knowiso_train.features.modules import named_layers, network_name
from knowiso_train.features.recording import record_outputs
from knowiso_train.features.state import checked_device, on_device, preserve_random_state, preserve_state
from knowiso_train.features.wrappers import has_collective_forward, unwrap_model
from knowiso_train.measurement._shared_network import SharedNetwork
from knowiso_train.measurement.config import MeasureConfig
from knowiso_train.measurement.data import SplitImageLoader
from knowiso_train.measurement.functional import AUTO_LABELS
from knowiso_train.measurement.measure import Layers, run_measurement
from knowiso_train.measurement.report import PairResult, Report
from knowiso_train.utils.environment import library_versions
from knowiso_train.utils.memory import usable_bytes
from knowiso_train.utils.validation import NonNegativeFloat, check_known_names, validate_arguments

# Options of MeasureConfig that `compare_stages` sets itself
STAGE_OPTIONS = ("directions", "source_transform", "target_transform", "names", "progress")
# Options beside those of `MeasureConfig.report_settings` that determine the figures
FURTHER_SETTINGS = ("noise_floor", "repeated", "layout", "autocast", "labels", "output", "mask", "forward")

Network = nn.Module | Callable[[], nn.Module]
Stages = Mapping[str, Network] | Iterable[tuple[str, Network] | CheckpointStage]
Transform = Callable[[Any], Any]


@validate_arguments
def compare_stages(
    reference: nn.Module,
    stages: Stages,
    loader: Iterable[Any],
    layers: Layers | Mapping[str, Layers],
    *,
    order: int = 0,
    functional: bool = True,
    labels: str | Callable[[Any], Any] | None = AUTO_LABELS,
    reference_transform: Transform | None = None,
    stage_transform: Transform | Mapping[str, Transform] | None = None,
    reference_name: str | None = None,
    path: str | Path | None = None,
    cache_gib: NonNegativeFloat = 2.0,
    progress: bool = True,
    **options: Any,
) -> StageComparison:
    """Measure the shares of a reference network's features that each stage keeps, loses and gains, by layer.

    Stages are descendants of the reference (pruned, quantized, distilled, fine-tuned), other networks, or checkpoints
    of a training. Each is measured with the reference in both directions, as by `measure`. A stage that is
    given as a function is in memory only while it is measured. The reference's features of the fitting images are
    computed once.

    Args:
        reference: Network that the stages are compared with.
        stages: Networks by name, (name, network) tuples in an iterable, or `checkpoint_stages`. In place of a network,
            a function without arguments that returns it is called when its turn comes.
        loader: Batches, as for `measure`.
        layers: Names or globs for all networks, (reference, stage) tuples, or a dict {reference: stage}; or a dict from
            the name of each stage to a list or dict of these.
        order: Highest number of non-linear steps.
        functional: Also measure the outputs with each part in place of the feature, and the stages' own outputs.
        labels: Labels for top-1, as for `measure`.
        reference_transform: Transform of the images for the reference. None: no transform.
        stage_transform: Transform of the images for all stages, or for some by name. None: no transform.
        reference_name: Name of the reference in the results. None: its architecture or class.
        path: Folder for one file per finished stage. A later call with the same settings goes on where this one ended.
            A stage that is given as a function is then identified by its name, code, arguments and the variables that
            it holds, not by global variables; the images by their number and the first batch. None: no files.
        cache_gib: Largest size of the reference's features in memory in GiB. Above it, they are computed for each
            stage.
        progress: Show a progress bar.
        **options: Further options of `measure`, such as `max_images`, `similarity` or `noise_floor` (default: False).

    Returns:
        A `StageComparison`.

    Raises:
        OptionError: No stages, two of one name, an option that `measure` does not have, or a folder with files of other
            settings.
        InputTypeError: A stage that is no network.
        KnowisoError: Other subclasses as for `measure`.

    Examples:
        >>> networks = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()) for _ in range(2)]
        >>> loader = torch.utils.data.DataLoader(torch.randn(200, 3, 8, 8), batch_size=50)
        >>> stages = {"same": networks[0], "other": lambda: networks[1]}
        >>> comparison = compare_stages(networks[0], stages, loader, "0", progress=False)
        >>> comparison["other"]["0"].lost > 0.2 > comparison["same"]["0"].lost
        True
        >>> comparison.loss_start("other"), comparison.loss_start("same")
        ('0', None)
    """
    config = _config(
        {
            "order": order,
            "functional": functional,
            "labels": labels,
            "source_transform": reference_transform,
        },
        options,
    )
    run = _ComparisonRun(
        reference, loader, layers, config, stage_transform, cache_gib=cache_gib, name=reference_name, path=path
    )
    return run.compare(stages, progress=progress)


class _ComparisonRun:
    """Measurements of stages one after the other, with the reference's features in common."""

    def __init__(
        self,
        reference: nn.Module,
        loader: Iterable[Any],
        layers: Layers | Mapping[str, Layers],
        config: MeasureConfig,
        stage_transform: Transform | Mapping[str, Transform] | None,
        *,
        cache_gib: float,
        name: str | None,
        path: str | Path | None,
    ) -> None:
        self.start = time.perf_counter()
        self.reference, self.layers, self.config = reference, layers, config
        self.stage_transform = stage_transform
        self.name = name or network_name(reference)
        self.images = SplitImageLoader(loader, config.split, config.seed, config.max_images)
        self.group = self.images.group
        limit = min(int(cache_gib * 2**30), usable_bytes(torch.device("cpu")) // 2)
        self.shared = SharedNetwork(limit)
        self.settings = config.report_settings() | {"processes": self.group.size}
        checked_device(config.device, reference)
        with preserve_state(reference), on_device(config.device, reference):
            batch = next((batch.batch for batch in self.images.fit_batches()), None)
            if not all(self.group.gather(batch is not None)):
                raise DataError("expected images to fit on, got none; give more images, or a smaller batch size")
            self.position = self._call_order(batch)
        self.folder: StageFolder | None = None
        if path is not None:
            # Rank 0 alone writes, and its files decide for all processes
            settings = (
                self.settings
                | _further_settings(config)
                | {
                    "reference": network_digest(reference),
                    "images": self.images.expected,
                    "first_batch": batch_digest(batch),
                }
            )
            self.folder = StageFolder(path, self.group.gather(settings)[0], writes=self.group.rank == 0)

    def compare(self, stages: Stages, *, progress: bool) -> StageComparison:
        """Return the results of all stages."""
        results: list[StageResult] = []
        if isinstance(stages, Mapping | Sequence):  # an iterator has no names yet
            self._check_names([entry.name for entry in _entries(stages)])
        entries = _entries(stages)
        total = len(stages) if isinstance(stages, Mapping | Sequence) else None
        show = progress and self.group.rank == 0
        with (
            on_device(self.config.device, self.reference),
            tqdm(total=total, desc="stages", unit="stage", disable=not show) as bar,
        ):
            # Not a for loop, whose variable would hold one network while the next is made
            while (entry := next(entries, None)) is not None:
                if entry.name in {result.name for result in results}:
                    raise OptionError(f"expected stages of different names, got {entry.name!r} twice; rename one")
                with _named_errors(entry.name):
                    # Before a function may change the networks that it holds
                    key = self._key(entry) if self.folder is not None else {}
                    results.append(self._finished(entry, key) or self._measure(entry, key))
                del entry
                bar.update()
        if not results:
            raise OptionError("expected at least one stage to compare with the reference, got none")
        return StageComparison(
            reference=self.name,
            stages=tuple(results),
            settings=self.settings,
            seconds=time.perf_counter() - self.start,
            versions=library_versions(),
        )

    def _check_names(self, stages: Sequence[str]) -> None:
        """Check that options by stage name no other stage, and layers all of them."""
        for name in stages:
            self._layers_of(name)
        transforms = self.stage_transform if isinstance(self.stage_transform, Mapping) else {}
        layers: Any = self.layers if _is_by_stage(self.layers) else {}
        check_known_names("stage_transform", transforms, stages, "stages")
        check_known_names("layers", layers, stages, "stages")

    def _finished(self, entry: _Entry, key: Mapping[str, Any]) -> StageResult | None:
        """Return the result of a stage that an earlier call finished."""
        if self.folder is None:
            return None
        result = self.folder.read(entry.name, key)
        first: StageResult | None = self.group.gather(result)[0]
        return first

    def _measure(self, entry: _Entry, key: Mapping[str, Any]) -> StageResult:
        network = entry.build()
        transform = self._transform(entry.name)
        config = replace(self.config, names=(self.name, entry.name), target_transform=transform)
        pairs = self._layers_of(entry.name)
        report = run_measurement(self.reference, network, self.images, pairs, config, self.shared)
        result = StageResult(
            name=entry.name,
            step=entry.step,
            layers=self._stage_layers(report),
            output=self.shared.take_output_share(self.group),
            images=report.images,
            seconds=report.seconds,
        )
        if self.folder is not None:
            self.folder.write(result, key)
        # All processes return the times of the first one, after its file is written
        first: StageResult = self.group.gather(result)[0]
        return first

    def _key(self, entry: _Entry) -> dict[str, Any]:
        """Return everything that determines the figures of a stage alone."""
        transform = self._transform(entry.name)
        return {
            "network": entry.digest(),
            "layers": self._layers_of(entry.name),
            "stage_transform": None if transform is None else function_identity(transform),
        }

    def _transform(self, name: str) -> Transform | None:
        transform = self.stage_transform
        return transform.get(name) if isinstance(transform, Mapping) else transform

    def _layers_of(self, name: str) -> Layers:
        layers: Any = self.layers
        if not _is_by_stage(layers):
            return self.layers  # type: ignore[return-value]
        if name not in layers:
            raise OptionError(f"layers= has no entry for stage {name!r}, only for {', '.join(layers)}")
        result: Layers = layers[name]
        return result

    def _stage_layers(self, report: Report) -> tuple[StageLayer, ...]:
        """Return the pairs of both directions together, in the order in which the reference computes the layers."""
        explained = {(pair.target, pair.source): pair for pair in report.backward}
        entries = [
            StageLayer(
                layer=pair.source,
                stage_layer=pair.target,
                of_reference=_without_maps(explained[pair.source, pair.target]),
                of_stage=_without_maps(pair),
            )
            for pair in report.forward
        ]
        last = len(self.position)
        return tuple(sorted(entries, key=lambda entry: self.position.get(entry.layer, last)))

    def _call_order(self, batch: Any) -> dict[str, int]:
        """Return the position of each layer of the reference in the order of their calls."""
        layers, root = named_layers(self.reference), unwrap_model(self.reference)
        if self.group.size > 1 and has_collective_forward(self.reference):
            return {name: position for position, name in enumerate(layers)}
        extractor = Extractor(
            self.reference,
            next(iter(layers), ""),
            name="reference",
            transform=self.config.source_transform,
            forward=self.config.forward,
            autocast=self.config.autocast,
        )
        targets = {name: hook_target(layer, "output", root) for name, layer in layers.items()}
        with record_outputs(targets, lambda output: None) as calls:
            extractor.call(extractor.prepare(batch))
        return {name: position for position, name in enumerate(calls)}


@dataclass(frozen=True, eq=False)
class _Entry:
    """Stage that was not measured yet."""

    name: str
    network: Network
    step: int | None = None

    def build(self) -> nn.Module:
        # New weights draw random numbers, on which the images of an augmenting dataset may depend
        with preserve_random_state():
            network = self.network if isinstance(self.network, nn.Module) else self.network()
        if not isinstance(network, nn.Module):
            raise InputTypeError(
                f"stage {self.name!r}: expected a network or a function that returns one, got a function that returns "
                f"{type(network).__name__}"
            )
        return network

    def digest(self) -> str:
        if isinstance(self.network, CheckpointStage):
            return self.network.digest()
        return network_digest(self.network) if isinstance(self.network, nn.Module) else function_identity(self.network)


def _entries(stages: Stages) -> Iterator[_Entry]:
    iterator: Iterator[Any] = iter(stages.items() if isinstance(stages, Mapping) else stages)
    # Not a for loop, whose variable would hold one network while the next is made
    while (item := next(iterator, None)) is not None:
        yield _entry(item)
        del item


def _entry(item: Any) -> _Entry:
    if isinstance(item, CheckpointStage):
        return _Entry(item.name, item, item.step)
    if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[0], str):
        raise InputTypeError(
            f"expected stages as (name, network) tuples or a mapping from name to network, got {type(item).__name__}"
        )
    name, network = item
    if not isinstance(network, nn.Module) and not callable(network):
        raise InputTypeError(
            f"stage {name!r}: expected a network or a function that returns one, got {type(network).__name__}"
        )
    return _Entry(name, network)


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Add the name of the stage to errors."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in stage {name!r} of compare_stages")
        raise


def _config(settings: Mapping[str, Any], options: Mapping[str, Any]) -> MeasureConfig:
    allowed = [item.name for item in fields(MeasureConfig) if item.name not in {*STAGE_OPTIONS, *settings}]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise OptionError(f"compare_stages has no option {', '.join(unknown)}; expected some of {', '.join(allowed)}")
    return MeasureConfig(directions="both", progress=False, **({"noise_floor": False} | dict(settings) | dict(options)))


def _further_settings(config: MeasureConfig) -> dict[str, Any]:
    """Return options that determine the figures beside those of the report, with functions by their code."""
    values = {name: getattr(config, name) for name in FURTHER_SETTINGS}
    values["reference_transform"] = config.source_transform
    return {name: function_identity(value) if callable(value) else value for name, value in values.items()}


def _is_by_stage(layers: Any) -> bool:
    """Return whether layers are given for each stage: a mapping to other values than names."""
    return isinstance(layers, Mapping) and not all(isinstance(value, str) for value in layers.values())


def _without_maps(pair: PairResult) -> PairResult:
    # Maps of many stages would fill the memory
    return replace(pair, disentangler=None)
