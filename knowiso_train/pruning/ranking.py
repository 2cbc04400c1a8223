"""Ranking of channels by the cost of removing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from knowiso_train.errors import OptionError, ShapeError
from knowiso_train.ops.im2col import is_plain_linear_op, num_input_features
from knowiso_train.pruning.allocation import LayerCost, allocate, allowed_widths, total_cost
from knowiso_train.pruning.calibration import SAMPLES_PER_FEATURE, Calibration, InputMoments, input_moments
from knowiso_train.pruning.channel_groups import ChannelGroup, num_input_channels, unit_columns
from knowiso_train.pruning.elimination import BackwardElimination, Consumer
from knowiso_train.pruning.layer_regression import AnyMoments
from knowiso_train.pruning.reference_outputs import WIDE_LAYER_FEATURES, ReferenceOutputs, record_reference_outputs
from knowiso_train.pruning.sensitivity import eliminate_channels, max_sensitivity_images, output_sensitivities
from knowiso_train.pruning.tracing import Epilogue
from knowiso_train.regression.ridge import PrimalMoments

RANKING_RIDGE = 1e-4
# Exponents of the output's sensitivity; the first where nothing tells them apart
SENSITIVITY_EXPONENTS = (0.5, 1.0)
# Of the images at most tell the output's sensitivity, and no more than it takes
MAX_SENSITIVITY_FRACTION = 0.25
MAX_RERANK_FEATURES = 2304  # regressors, above which a second elimination takes longer than it is worth


@dataclass
class ChannelRanking:
    """Orders in which units go, and what that does.

    Attributes:
        orders: for each group its units, the first to go first.
        harms: for each group (J + 1,), what its readers lose with w units left; None cuts the same share of every
            group.
        factors: for each group, the output's sensitivity to that.
        kinds: of the groups.
    """

    orders: dict[str, list[int]]
    harms: dict[str, Tensor] | None
    factors: dict[str, float]
    kinds: dict[str, str]

    def candidates(
        self, costs: Mapping[str, LayerCost], share: float, min_width: float, round_to: int
    ) -> list[dict[str, int]]:
        """Widths at most this share of the cost, by harms that count the output's sensitivity more or less: the plain one counts errors as if they
        added up and were never mended by later layers, and how far that is so depends on the network.

        Raises:
            OptionError: out of reach.
        """
        found: list[dict[str, int]] = []
        for temper in SENSITIVITY_EXPONENTS if self.harms is not None else SENSITIVITY_EXPONENTS[:1]:
            widths = self.widths(costs, share, min_width, round_to, temper)
            if widths not in found:
                found.append(widths)
        return found

    def widths(
        self, costs: Mapping[str, LayerCost], share: float, min_width: float, round_to: int, temper: float
    ) -> dict[str, int]:
        """Units that stay, at most this share of the cost, with that exponent of the sensitivities.

        Raises:
            OptionError: out of reach.
        """
        target = share * total_cost(costs, {})
        steps = {name: 1 if kind == "heads" else round_to for name, kind in self.kinds.items()}
        if self.harms is not None:
            harms = {name: harm * self.factors[name] ** temper for name, harm in self.harms.items()}
            return allocate(harms, costs, target, min_width=min_width, round_to=steps)
        sizes = {name: len(order) for name, order in self.orders.items()}
        for percent in range(1000, -1, -1):
            widths = {}
            for name, size in sizes.items():
                allowed = allowed_widths(size, min_width, steps[name])
                widths[name] = next((width for width in allowed if width <= size * percent / 1000), allowed[-1])
            if total_cost(costs, {name: size - widths[name] for name, size in sizes.items()}) <= target:
                return widths
        raise OptionError(
            f"cannot reach a share of {share} of the cost with a min_width of {min_width}; let a larger share stay, or lower the min_width"
        )

    def again(
        self, layers: Mapping[str, nn.Module], groups: Sequence[ChannelGroup], widths: Mapping[str, int]
    ) -> dict[str, DeferredRanking]:
        """Groups whose channels are chosen again when the refit reaches their only reader."""
        if self.harms is None:
            return {}
        readers = [reader for group in groups for reader in group.readers]
        found = {}
        for group in groups:
            [reader, *others] = group.readers
            alone = not others and readers.count(reader) == 1 and _choosable(layers[reader])
            if alone and widths[group.name] < group.size:
                found[group.name] = DeferredRanking(layers[reader], group, reader, widths[group.name])
        return found


class DeferredRanking:
    """Chooses the units of a group when the forward refit reaches the layer that reads them, by what that layer is given there.

    Args:
        layer: the reader.
        group: it reads nothing else.
        reader: its name.
        width: units that stay.
    """

    def __init__(self, layer: nn.Module, group: ChannelGroup, reader: str, width: int) -> None:
        self.layer, self.group, self.reader, self.width = layer, group, reader, width
        self.removed: list[int] = []

    def __call__(self, moments: AnyMoments, weight: Tensor, scale: Tensor) -> Tensor:
        """(C,) mask of input channels."""
        scaled = weight * scale.abs().clamp_min(1e-6 * float(scale.abs().max().clamp_min(1e-30)))
        columns = unit_columns(self.layer, self.group.readers[self.reader]).to(weight.device)
        if not isinstance(moments, PrimalMoments):
            raise ShapeError(f"layer {self.reader!r}: too many regressors to choose among")
        elimination = BackwardElimination([Consumer(self.reader, moments.xx[0], scaled, columns, 1.0)], RANKING_RIDGE)
        self.removed, _ = elimination.run(keep=self.width)
        return self.group.masks({self.reader: num_input_channels(self.layer)}, self.removed)[self.reader].to(
            weight.device
        )


def rank_by_isomorphism(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    tails: Mapping[str, Epilogue],
    images: Calibration,
    seed: int,
    progress: bool,
    rows: int | None = None,
) -> tuple[ChannelRanking, ReferenceOutputs | None]:
    """Backward elimination of every group on the original's inputs, weighed by what the output makes of it on images that were not looked at before:
    where images are few, refitted weights do better on those that they were fitted to, and more so in wide layers.
    With `rows`, what a refit will aim at is kept in the same pass.
    """
    modules = dict(model.named_modules())
    readers = {
        name: modules[name]
        for group in groups
        for name in group.readers
        if is_plain_linear_op(modules[name]) and getattr(modules[name], "groups", 1) == 1
    }
    merged = {
        name: unit_columns(readers[name], channels)
        for group in groups
        for name, channels in group.readers.items()
        if name in readers and num_input_features(readers[name]) > WIDE_LAYER_FEATURES
    }
    fitted, others = images.split(MAX_SENSITIVITY_FRACTION, max_sensitivity_images(model, groups, images))
    target = None
    if rows is None:
        inputs = input_moments(
            model,
            fitted,
            readers,
            max_images=fitted.count,
            rows=SAMPLES_PER_FEATURE,
            forward=images.forward,
            merged=merged,
            seed=seed,
            progress=progress,
        )
    else:
        with InputMoments(readers, fitted.count, SAMPLES_PER_FEATURE, merged, seed) as gathered:
            target = record_reference_outputs(model, modules, tails, images, rows, seed, progress, also=gathered)
        inputs = gathered.moments()
    found = {group.name: eliminate_channels(model, group, inputs, tails, RANKING_RIDGE) for group in groups}
    factors = output_sensitivities(model, groups, found, others, progress, list(tails))
    orders, harms = (
        {name: entry.order for name, entry in found.items()},
        {name: entry.harms for name, entry in found.items()},
    )
    return ChannelRanking(orders, harms, factors, {group.name: group.kind for group in groups}), target


def _choosable(layer: nn.Module) -> bool:
    return (
        is_plain_linear_op(layer)
        and getattr(layer, "groups", 1) == 1
        and num_input_features(layer) <= MAX_RERANK_FEATURES
    )
