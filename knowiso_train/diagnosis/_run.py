"""Passes of a diagnosis over the images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from knowiso_train.diagnosis._analysis import AnalysisSizes, Examination, Explanation, ResidualAnalysis
from knowiso_train.diagnosis._top_images import BatchImages, make_pictures, thumbnails_of
from knowiso_train.diagnosis.config import DiagnoseConfig
from knowiso_train.diagnosis.report import Diagnosis
from knowiso_train.errors import CapacityError, OptionError
from knowiso_train.features.extractor import Extractor
from knowiso_train.features.layer_options import (
    check_named_layers,
    layers_of_networks,
    matching_entries,
    sides_of_networks,
)
from knowiso_train.features.modules import LayerPair, pair_layers
from knowiso_train.features.state import checked_device, on_device, preserve_state
from knowiso_train.features.wrappers import has_collective_forward, is_sharded, unwrap_model
from knowiso_train.measurement.config import MeasureConfig
from knowiso_train.measurement.data import IndexedBatch, SplitImageLoader
from knowiso_train.measurement.functional import ExplainedNetwork, find_labels
from knowiso_train.measurement.measure import Layers, run_measurement
from knowiso_train.measurement.report import PairResult, Report
from knowiso_train.utils.batch import index_batch
from knowiso_train.utils.distributed import ProcessGroup
from knowiso_train.utils.environment import library_versions
from knowiso_train.utils.memory import format_bytes, usable_bytes

Transform = Callable[[Any], Any]


class DiagnosisRun:
    """Measurement of all layer pairs, and two further passes over the report images.

    Args:
        networks: The weak network and all strong ones.
        names: Name of each network.
        transforms: Transform of the images for each network.
        loader: Batches.
        config: Options of the measurements.
        options: Other options.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        names: Sequence[str],
        transforms: Sequence[Transform | None],
        loader: Iterable[Any],
        config: MeasureConfig,
        options: DiagnoseConfig,
    ) -> None:
        self.names, self.transforms = names, transforms
        self.config, self.options, self.group = config, options, ProcessGroup()
        self.networks = [self._local_network(network, name) for network, name in zip(networks, names, strict=True)]
        self.images = SplitImageLoader(loader, config.split, config.seed, config.max_images, self.group)
        self.show_progress = config.progress and self.group.rank == 0
        self.num_images: dict[str, int] = {}

    def diagnose(self, layers: Layers) -> Diagnosis:
        """Return the diagnosis of layer pairs."""
        start = time.perf_counter()
        checked_device(self.config.device, *self.networks)  # initializes CUDA, whose random state is then restored too
        with ExitStack() as stack:
            stack.enter_context(preserve_state(*self.networks))
            stack.enter_context(on_device(self.config.device, *self.networks))
            examinations = self._measure(layers)
            sizes = AnalysisSizes(self.options.num_directions, self.options.num_shared, self.options.num_images)
            analyses = [ResidualAnalysis(examination, sizes, self.group) for examination in examinations]
            _check_memory(analyses)
            extractors = [stack.enter_context(extractor) for extractor in self._extractors(examinations)]
            for batch in self._report_batches("directions"):
                features = [extractor.run(batch.batch) for extractor in extractors]
                for analysis in analyses:
                    analysis.add_moments(features, batch.valid)
            for analysis in analyses:
                analysis.solve()
            self._add_figures(extractors, analyses)
            for analysis in analyses:
                analysis.reduce()
            results = tuple(analysis.result(self.names) for analysis in analyses)
        rankings = [ranking for analysis in analyses for ranking in analysis.rankings()]
        return Diagnosis(
            weak=self.names[0],
            strong=tuple(self.names[1:]),
            layers=results,
            images=self.num_images,
            thumbnails=thumbnails_of(rankings, self.options.num_thumbnails),
            class_names=tuple(self.options.class_names or ()),
            settings=self.config.report_settings() | {"processes": self.group.size},
            seconds=time.perf_counter() - start,
            versions=library_versions(),
        )

    def _local_network(self, network: nn.Module, name: str) -> nn.Module:
        """Return a network whose forward does not wait for the other processes: that inside DDP, or itself.

        Raises:
            OptionError: A network that FSDP shards.
        """
        if self.group.size == 1 or not has_collective_forward(network):
            return network
        local = network if is_sharded(network) else unwrap_model(network)
        if has_collective_forward(local):
            raise OptionError(
                f"diagnose needs networks that each process holds completely, but FSDP shards {name}, or a part of it "
                "is in DDP; load its weights into a plain network"
            )
        return local

    def _measure(self, layers: Layers) -> list[Examination]:
        """Measure the weak network with each strong one, and the strong ones with each other."""
        count = len(self.networks)
        pairs = {i: pair_layers(self.networks[0], self.networks[i], layers) for i in range(1, count)}
        networks = [
            (self.networks[0], [pair.source for i in pairs for pair in pairs[i]]),
            *((self.networks[i], [pair.target for pair in pairs[i]]) for i in pairs),
        ]
        check_named_layers("at", self.config.at, networks)
        check_named_layers("layout", self.config.layout, networks)
        reports = {(0, i): self._report(0, i, pairs[i]) for i in pairs}
        for i in pairs:
            for j in range(i + 1, count):
                between = [LayerPair(a.target, b.target) for a in pairs[i] for b in pairs[j] if a.source == b.source]
                reports[i, j] = self._report(i, j, between)
        examinations = []
        for i in pairs:
            for direction, source, target in (("forward", 0, i), ("backward", i, 0)):
                for result in getattr(reports[0, i], direction):
                    examinations.append(
                        Examination(
                            kind="blind_spots" if direction == "forward" else "unreliable",
                            network=target,
                            pair=result,
                            explanation=Explanation(source, result.source, result.disentangler),
                            others=tuple(
                                self._explanation(reports, pairs, other, target, result)
                                for other in pairs
                                if other != i
                            ),
                        )
                    )
        return examinations

    def _explanation(
        self,
        reports: Mapping[tuple[int, int], Report],
        pairs: Mapping[int, Sequence[LayerPair]],
        other: int,
        target: int,
        result: PairResult,
    ) -> Explanation:
        """Return the map from another strong network to the examined feature of a pair."""
        weak_layer = result.source if target else result.target
        layer = next(pair.target for pair in pairs[other] if pair.source == weak_layer)
        first, second = sorted((other, target))
        measured = reports[first, second].forward if other < target else reports[first, second].backward
        maps = next(entry for entry in measured if (entry.source, entry.target) == (layer, result.target))
        return Explanation(other, layer, maps.disentangler)

    def _report(self, source: int, target: int, pairs: Sequence[LayerPair]) -> Report:
        # Options by layer may name layers of all networks
        networks = layers_of_networks(self.networks[source], self.networks[target], pairs)
        config = replace(
            self.config,
            at=matching_entries(self.config.at, networks),
            layout=matching_entries(self.config.layout, networks),
            source_transform=self.transforms[source],
            target_transform=self.transforms[target],
            names=(self.names[source], self.names[target]),
        )
        layers = [(pair.source, pair.target) for pair in pairs]
        report = run_measurement(self.networks[source], self.networks[target], self.images, layers, config)
        self.num_images = report.images
        return report

    def _extractors(self, examinations: Sequence[Examination]) -> list[Extractor]:
        layers: list[set[str]] = [set() for _ in self.networks]
        for examination in examinations:
            layers[examination.network].add(examination.layer)
            for explanation in (examination.explanation, *examination.others):
                layers[explanation.network].add(explanation.layer)
        sides = sides_of_networks(self.config.at, list(zip(self.networks, map(sorted, layers), strict=True)))
        return [
            Extractor(
                network,
                sorted(layers[i]),
                name=self.names[i],
                at=sides[i],
                layout=self.config.layout,
                repeated=self.config.repeated,
                transform=self.transforms[i],
                forward=self.config.forward,
                autocast=self.config.autocast,
            )
            for i, network in enumerate(self.networks)
        ]

    def _report_batches(self, description: str) -> Iterator[IndexedBatch]:
        """Yield the batches of this process, with report images alone."""
        batches, total = self.images.report_batches(), self.images.num_batches(report=True)
        for batch in tqdm(batches, desc=description, total=total, unit="batch", disable=not self.show_progress):
            mask = batch.with_mask(self.config.mask).mask("report")
            if not mask.all():
                images = torch.from_numpy(mask)
                batch = IndexedBatch(index_batch(batch.batch, images), batch.index[mask], batch.part[mask])
            if mask.any():
                yield batch.with_mask(self.config.mask)

    def _add_figures(self, extractors: Sequence[Extractor], analyses: Sequence[ResidualAnalysis]) -> None:
        """Add all report images to the figures, and measure the effects of the directions."""
        networks = [
            ExplainedNetwork(extractor, self.config.output, self.config.labels) if self.config.functional else None
            for extractor in extractors
        ]
        groups = self.config.labels if self.options.groups is None else self.options.groups
        for batch in self._report_batches("figures"):
            labels = find_labels(batch.batch, groups)
            images = BatchImages(
                index=batch.index,
                labels=labels.cpu() if labels is not None and _are_classes(labels, len(batch.index)) else None,
                pictures=make_pictures(batch.batch, self.options.to_image) if self.options.num_thumbnails else None,
                valid=batch.valid,
            )
            features = [
                extractor.run(batch.batch) if network is None else network.run(batch.batch)
                for extractor, network in zip(extractors, networks, strict=True)
            ]
            for analysis in analyses:
                analysis.add_figures(features, images, networks[analysis.examination.network])


def _are_classes(labels: Tensor, count: int) -> bool:
    """Return whether labels are one integer for each image; masks of dense outputs are not."""
    return labels.shape == (count,) and not labels.is_floating_point() and not labels.is_complex()


def _check_memory(analyses: Sequence[ResidualAnalysis]) -> None:
    """Raise an error if the covariances exceed the usable memory of a device.

    Raises:
        CapacityError: The estimate exceeds `usable_bytes`.
    """
    for device in {analysis.device for analysis in analyses}:
        on_this_device = [analysis for analysis in analyses if analysis.device == device]
        needed, usable = sum(a.moment_bytes for a in on_this_device), usable_bytes(device)
        if needed > usable:
            largest = max(on_this_device, key=lambda a: a.moment_bytes).examination
            raise CapacityError(
                f"the covariances of {len(on_this_device)} results need about {format_bytes(needed)} on {device}, but "
                f"{format_bytes(usable)} can be used; the largest is that of layer {largest.layer!r} with "
                f"{largest.pair.target_channels} channels. Examine a pooled layer, or fewer layers a call."
            )
