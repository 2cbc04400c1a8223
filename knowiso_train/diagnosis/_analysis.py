"""Residual of one layer pair on the report images, in two passes with constant memory."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from knowiso_train.diagnosis._top_images import BatchImages, TopImages, heat_map
from knowiso_train.diagnosis.report import (
    ClassResult,
    Confirmation,
    FeatureDirection,
    Kind,
    LayerDiagnosis,
    OutputEffect,
)
from knowiso_train.disentangle.disentangler import Disentangler
from knowiso_train.errors import KnowisoWarning
from knowiso_train.features.padding import ValidPositions
from knowiso_train.measurement._pair import Features
from knowiso_train.measurement.functional import NUM_SUMS, ExplainedNetwork, image_sums, share_from_sums
from knowiso_train.measurement.report import PairResult
from knowiso_train.regression.moments import StreamingMoments
from knowiso_train.utils.distributed import ProcessGroup

LISTED_CHANNELS = 5  # of each direction
# Directions with a smaller share of the variance of residual and explained part come from rounding or from the ridge
MIN_DIRECTION_SHARE = 1e-6
MIN_SAMPLES_PER_CHANNEL = 5  # below this number the leading directions fit the sample: a warning


@dataclass(frozen=True)
class Explanation:
    """Fitted map from a layer of a network.

    Attributes:
        network: Position of the network in the list of all networks.
        layer: Explaining layer.
        maps: Map to the examined feature.
    """

    network: int
    layer: str
    maps: Disentangler


@dataclass(frozen=True)
class Examination:
    """Examined feature and the networks that it is explained from.

    Attributes:
        kind: "blind_spots" or "unreliable".
        network: Position of the examined network in the list of all networks.
        pair: Measured figures of the layer pair.
        explanation: Map whose residual is examined.
        others: Maps of the other strong networks, which may confirm the residual.
    """

    kind: Kind
    network: int
    pair: PairResult
    explanation: Explanation
    others: tuple[Explanation, ...] = ()

    @property
    def layer(self) -> str:
        """Name of the examined layer."""
        return self.pair.target


@dataclass(frozen=True)
class AnalysisSizes:
    """Numbers of results per layer.

    Attributes:
        directions: Directions of the residual.
        shared: Directions of the explained part.
        images: Images of each ranking.
    """

    directions: int
    shared: int
    images: int


class ResidualAnalysis:
    """Sums over the report images: `add_moments` in a first pass, `solve`, `add_figures` in a second, `result`.

    Args:
        examination: Feature to examine.
        sizes: Numbers of results.
        group: Processes that share the images.
    """

    def __init__(self, examination: Examination, sizes: AnalysisSizes, group: ProcessGroup) -> None:
        self.examination, self.sizes, self.group = examination, sizes, group
        channels = examination.pair.target_channels
        maps = examination.explanation.maps
        self.device = next(maps.parameters()).device
        self._moments = [StreamingMoments(channels, 1, device=self.device) for _ in range(2)]
        self._other_sums = self._zeros(len(examination.others), channels)
        self.directions = self.shared = torch.empty(0)
        self._means: list[Tensor] = []
        self._other_means: list[Tensor] = []

    @property
    def moment_bytes(self) -> int:
        """Memory of the covariances: two sums in float64, and copies while a batch is added."""
        return 2 * 2 * 8 * self.examination.pair.target_channels**2

    def add_moments(self, features: Sequence[Features], valid: ValidPositions | None) -> None:
        """Add the report images of a batch, at their valid positions, to the covariances of both parts."""
        y, residuals = self._split(features)
        parts = [residuals[0], y - residuals[0], *residuals[1:]]
        if valid is not None and self._has_padding(valid):
            # Each valid position is an image of one position
            parts = [valid.rows(part)[:, :, None, None] for part in parts]
        for stream, part in zip(self._moments, parts[:2], strict=True):
            stream.update(part, part[:, :1])
        for sums, part in zip(self._other_sums, parts[2:], strict=True):
            sums += part.sum((0, 2, 3), dtype=torch.float64)

    def solve(self) -> None:
        """Compute means and principal directions; they are fixed from here on."""
        for stream in self._moments:
            stream.all_reduce(self.group)
        self._reduce(self._other_sums)
        residual, explained = (stream.value for stream in self._moments)
        scale = float(residual.xx.trace() + explained.xx.trace())
        self.directions = self._principal_directions(residual.xx, self.sizes.directions, scale)
        self.shared = self._principal_directions(explained.xx, self.sizes.shared, scale)
        self._means = [residual.mean_x, residual.mean_x + explained.mean_x]
        self._other_means = list(self._other_sums / residual.count.clamp(min=1))
        self._start_figures()

    def _start_figures(self) -> None:
        height, width = self.examination.pair.target_grid
        channels, others = self.examination.pair.target_channels, len(self.examination.others)
        # Rows: residual, target
        self.rows = self._zeros()
        self.channel_energies = self._zeros(2, channels)
        self.position_energies = self._zeros(2, height, width)
        # Rows: residual, target, explained part
        self.direction_energies = self._zeros(3, len(self.directions))
        self.shared_energies = self._zeros(3, len(self.shared))
        # Σ residual · residual of another network
        self.common_channels = self._zeros(others, channels)
        self.common_directions = self._zeros(others, len(self.directions))
        self.classes: dict[int, Tensor] = {}
        self.top_images = TopImages(self.sizes.images)
        self.top_of_directions = [TopImages(self.sizes.images) for _ in self.directions]
        self.top_of_shared = [TopImages(self.sizes.images) for _ in self.shared]
        # Rows: each direction, the network's own output
        self.effect_sums = torch.zeros(len(self.directions) + 1, NUM_SUMS, dtype=torch.float64)

    def add_figures(
        self, features: Sequence[Features], images: BatchImages, network: ExplainedNetwork | None = None
    ) -> None:
        """Add the report images of a batch to all figures.

        Args:
            features: Features of each network.
            images: The images.
            network: Examined network after its run on the batch, to measure the effects of the directions. None: no
                effects.
        """
        feature, residuals = self._split(features)
        means = [self._means[1], self._means[0], *self._other_means]
        centered = [
            part - self._as_channels(mean, part) for part, mean in zip([feature, *residuals], means, strict=True)
        ]
        num_positions = feature[:, 0].numel()
        if images.valid is not None and self._has_padding(images.valid):
            # Zeros add nothing to sums of products
            mask = images.valid.mask.to(self.device).view(-1, 1, *feature.shape[2:])
            centered, num_positions = [part * mask for part in centered], int(mask.sum())
        y, residual, *others = centered
        self.rows += num_positions
        energies = torch.stack([residual.square(), y.square()])
        self.channel_energies += energies.sum((1, 3, 4), dtype=torch.float64)
        maps = energies.sum(2)
        self.position_energies += maps.sum(1, dtype=torch.float64)
        self._add_classes(maps.sum((2, 3), dtype=torch.float64), images.labels)
        self.top_images.update(maps[0], images)
        projections = self._add_directions(y, residual, images)
        for i, other in enumerate(others):
            self.common_channels[i] += (residual * other).sum((0, 2, 3), dtype=torch.float64)
            products = projections * self._project(self.directions, other)
            self.common_directions[i] += products.sum((0, 2, 3), dtype=torch.float64)
        if network is not None:
            self._add_effects(feature, projections, network)

    def _add_effects(self, feature: Tensor, projections: Tensor, network: ExplainedNetwork) -> None:
        """Remove the residual along each direction from the feature, and add the change of the network's output."""
        own, labels = network.log_probabilities, network.labels
        for d, vector in enumerate(self.directions):
            changed = feature - self._as_channels(vector, feature) * projections[:, d : d + 1]
            self.effect_sums[d] += image_sums(network.replace(self.examination.layer, changed), own, labels)
        self.effect_sums[-1] += image_sums(own, own, labels)

    def reduce(self) -> None:
        """Sum over the processes, and keep the images with the largest energies of all."""
        self._reduce(
            self.rows,
            self.channel_energies,
            self.position_energies,
            self.direction_energies,
            self.shared_energies,
            self.common_channels,
            self.common_directions,
            self.effect_sums,
        )
        for top in self.rankings():
            top.merge(self.group)
        if self.group.size > 1:
            gathered = self.group.gather({label: sums.cpu() for label, sums in self.classes.items()})
            self.classes = {}
            for sums_by_label in gathered:
                for label, sums in sums_by_label.items():
                    self.classes[label] = self.classes.get(label, torch.zeros_like(sums)) + sums

    def rankings(self) -> list[TopImages]:
        """Return the rankings of images, those of the whole residual first."""
        return [self.top_images, *self.top_of_directions, *self.top_of_shared]

    def result(self, names: Sequence[str]) -> LayerDiagnosis:
        """Return the figures, after `reduce`."""
        examination = self.examination
        total = float(self.channel_energies[1].sum()) or 1.0
        mean_energy = total / max(float(self.rows), 1.0)
        num_positions = self.position_energies[0].numel()
        position_shares = self.position_energies * num_positions / total
        confirmations = tuple(
            Confirmation(
                network=names[other.network],
                share=float((self.channel_energies[0] - self.common_channels[i]).sum()) / total,
                channels=_ratios(self.channel_energies[0] - self.common_channels[i], self.channel_energies[1]),
            )
            for i, other in enumerate(examination.others)
        )
        return LayerDiagnosis(
            kind=examination.kind,
            network=names[examination.network],
            explaining=names[examination.explanation.network],
            pair=examination.pair,
            directions=self._direction_results(total, mean_energy),
            shared=self._shared_results(total, mean_energy),
            channels=_ratios(self.channel_energies[0], self.channel_energies[1]),
            channel_variances=tuple((self.channel_energies[1] / total).tolist()),
            positions=heat_map(position_shares[0]),
            position_variances=heat_map(position_shares[1]),
            classes=self._class_results(),
            images=self.top_images.ranked(mean_energy),
            confirmations=confirmations,
            warnings=self._warnings(),
        )

    def _warnings(self) -> tuple[str, ...]:
        channels, samples = self.examination.pair.target_channels, int(self.rows)
        if not self.sizes.directions or samples >= MIN_SAMPLES_PER_CHANNEL * channels:
            return ()
        note = f"only {samples} samples for {channels} channels: the shares of the leading directions are too large"
        warnings.warn(f"{self.examination.layer}: {note}", KnowisoWarning, stacklevel=5)
        return (note,)

    def _split(self, features: Sequence[Features]) -> tuple[Tensor, list[Tensor]]:
        """Return the examined feature, its residual, and its residuals given the other strong networks."""
        examination, residuals = self.examination, []
        y = features[examination.network][examination.layer]
        for explanation in (examination.explanation, *examination.others):
            x = features[explanation.network][explanation.layer]
            dtype = torch.promote_types(x.dtype, y.dtype)
            y = y.to(self.device, dtype)
            residuals.append(explanation.maps.split(x.to(self.device, dtype), y)[1])
        return y, residuals

    def _has_padding(self, valid: ValidPositions) -> bool:
        """Return whether positions of this pair's features are padding, as in the measurement of the pair."""
        return not valid.complete and not self.examination.pair.source_grid == self.examination.pair.target_grid == (
            1,
            1,
        )

    def _add_classes(self, energies: Tensor, labels: Tensor | None) -> None:
        """Add the energies (2, N) of residual and target to the sums of each image's class."""
        if labels is None:
            return
        rows = torch.cat([torch.ones_like(energies[:1]), energies]).cpu()
        for label in sorted(set(labels.tolist())):
            if label >= 0:
                sums = rows[:, labels == label].sum(1)
                self.classes[label] = self.classes.get(label, torch.zeros_like(sums)) + sums

    def _add_directions(self, y: Tensor, residual: Tensor, images: BatchImages) -> Tensor:
        """Add to the figures of all directions; return the projections of the residual, (N, D, H, W)."""
        explained = y - residual
        along = [self._project(self.directions, x) for x in (residual, y, explained)]
        self.direction_energies += _sums_of_squares(along)
        for d, top in enumerate(self.top_of_directions):
            top.update(along[0][:, d].square(), images, along[0][:, d])
        along_shared = [self._project(self.shared, x) for x in (residual, y, explained)]
        self.shared_energies += _sums_of_squares(along_shared)
        for d, top in enumerate(self.top_of_shared):
            # Large where the feature and its explanation both respond
            top.update(along_shared[1][:, d] * along_shared[2][:, d], images, along_shared[1][:, d])
        return along[0]

    def _direction_results(self, total: float, mean_energy: float) -> tuple[FeatureDirection, ...]:
        """Return the directions of the residual."""
        residual_energies = self.direction_energies[0]
        confirmed = (1 - self.common_directions / residual_energies).T.tolist()
        shares = (residual_energies / total).tolist()
        plain = self._plain_results(
            self.directions, shares, self.direction_energies, self.top_of_directions, mean_energy
        )
        return tuple(
            replace(direction, effect=effect, confirmed=tuple(parts))
            for direction, effect, parts in zip(plain, self._effects(), confirmed, strict=True)
        )

    def _effects(self) -> list[OutputEffect | None]:
        """Return the effect of each direction; None if effects were not measured."""
        if not self.effect_sums[-1].any():
            return [None] * len(self.directions)
        *changed, own = map(share_from_sums, self.effect_sums)
        return [
            OutputEffect(
                kl=max(share.kl, 0.0),  # below 0 by rounding alone
                agreement=share.agreement,
                top1_change=None if share.top1 is None or own.top1 is None else share.top1 - own.top1,
            )
            for share in changed
        ]

    def _shared_results(self, total: float, mean_energy: float) -> tuple[FeatureDirection, ...]:
        """Return the directions of the explained part."""
        shares = (self.shared_energies[2] / total).tolist()
        return tuple(self._plain_results(self.shared, shares, self.shared_energies, self.top_of_shared, mean_energy))

    def _plain_results(
        self, vectors: Tensor, shares: list[float], energies: Tensor, tops: Sequence[TopImages], mean_energy: float
    ) -> list[FeatureDirection]:
        """Return directions without effects, from the energies (3, D) of residual, target and explained part."""
        unexplained = _ratios(energies[0], energies[1])
        deviations = (energies[1] / self.rows.clamp(min=1)).sqrt().tolist()
        results = []
        for d, vector in enumerate(vectors):
            channels = vector.abs().argsort(descending=True, stable=True)[:LISTED_CHANNELS]
            results.append(
                FeatureDirection(
                    share=shares[d],
                    unexplained=unexplained[d],
                    channels=tuple(channels.tolist()),
                    weights=tuple(vector[channels].tolist()),
                    images=tops[d].ranked(mean_energy, deviations[d]),
                    vector=vector.cpu(),
                )
            )
        return results

    def _class_results(self) -> tuple[ClassResult, ...]:
        residual_total = float(self.channel_energies[0].sum()) or 1.0
        results = [
            ClassResult(
                label=label,
                images=int(count),
                unexplained=float(residual / target) if target else 0.0,
                share=float(residual) / residual_total,
            )
            for label, (count, residual, target) in self.classes.items()
        ]
        return tuple(sorted(results, key=lambda entry: (-entry.unexplained, entry.label)))

    def _principal_directions(self, scatter: Tensor, count: int, scale: float) -> Tensor:
        """Return the leading eigenvectors of a scatter matrix as rows, the largest weight of each positive."""
        values, vectors = torch.linalg.eigh(scatter)
        order = [i for i in reversed(range(len(values))) if values[i] > MIN_DIRECTION_SHARE * scale][:count]
        rows: Tensor = vectors[:, order].T.contiguous()
        largest = rows.gather(1, rows.abs().argmax(1, keepdim=True)) if len(rows) else rows[:, :1]
        rows = rows * largest.sign()
        self.group.broadcast_([rows])
        return rows

    def _project(self, directions: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("dc,nchw->ndhw", directions.to(x), x)

    def _as_channels(self, mean: Tensor, x: Tensor) -> Tensor:
        return mean.to(x).view(1, -1, 1, 1)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def _reduce(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            moved = tensor.to(self.group.device)
            self.group.sum_(moved)
            tensor.copy_(moved)


def _ratios(parts: Tensor, wholes: Tensor) -> tuple[float, ...]:
    """Return quotients, 0 for a channel without variance."""
    return tuple((part / whole if whole else 0.0) for part, whole in zip(parts.tolist(), wholes.tolist(), strict=True))


def _sums_of_squares(projections: Sequence[Tensor]) -> Tensor:
    """Return the energies of projections (N, D, H, W), one row for each."""
    return torch.stack([x.square().sum((0, 2, 3), dtype=torch.float64) for x in projections])
