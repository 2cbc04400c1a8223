"""Ranking of channels by the cost of removing them, and widths under a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from knowiso_train.errors import InputTypeError, OptionError, ShapeError
from knowiso_train.ops.im2col import num_input_features, regression_weight, ungrouped_weight
from knowiso_train.pruning._channel_group import ChannelGroup
from knowiso_train.pruning._channel_groups import is_single_regression, num_input_channels, unit_columns
from knowiso_train.pruning._elimination import BackwardElimination, Consumer, output_variance
from knowiso_train.pruning._tracing import MIN_OUTPUT_SCALE, ActivationCache, Epilogue, batch_norm_affine
from knowiso_train.pruning.allocation import (
    LayerCost,
    affordable_images,
    allocate,
    allowed_widths,
    count_macs,
    total_cost,
)
from knowiso_train.pruning.calibration import Calibration
from knowiso_train.pruning.layer_samples import (
    SAMPLES_PER_FEATURE,
    WIDE_LAYER_FEATURES,
    InputMoments,
    LayerInput,
    ReferenceOutputs,
    input_moments,
    record_reference_outputs,
)
from knowiso_train.regression.ridge import KernelMoments, PrimalMoments
from knowiso_train.utils.batch import tensor_leaves

RANKING_RIDGE = 1e-4  # relative ridge of the refit during elimination
# Exponents of the output's sensitivity in the weights of removal costs; the first one without a trial
SENSITIVITY_EXPONENTS = (0.5, 1.0)
MAX_SENSITIVITY_FRACTION = 0.25  # upper bound on the fraction of images for the output's sensitivity
MAX_RERANK_FEATURES = 2304  # features of a layer, above which a second elimination takes too long

PROBE_WIDTH_FRACTION = 0.25  # width of a group, as a fraction of all units, at which the output's change is measured
MAX_FEATURES_PER_SAMPLE = 0.05  # features per sample, above which the covariance is shrunk to its diagonal
SENSITIVITY_IMAGES = 16, 256  # minimum and maximum number of images
MAX_SENSITIVITY_MACS = 2e12  # multiply-adds of the passes of all groups
SENSITIVITY_BATCH_SIZE = 32  # images whose activations are cached at once


@dataclass
class ChannelRanking:
    """Order in which the units of each group are removed, and the cost of doing so.

    Attributes:
        removal_order: Units of each group, the first one to remove first.
        removal_cost: Unexplained variance (J + 1,) of each group's consumers with w units left, at entry w. None
            removes the same fraction of every group.
        sensitivity: Change of the network's output per unit of each group's removal cost.
        kinds: Kind of each group.
    """

    removal_order: dict[str, list[int]]
    removal_cost: dict[str, Tensor] | None
    sensitivity: dict[str, float]
    kinds: dict[str, str]

    def candidates(
        self, costs: Mapping[str, LayerCost], fraction: float, min_width: float, round_to: int
    ) -> list[dict[str, int]]:
        """Return distinct widths within a fraction of the cost, one for each exponent of the sensitivity.

        Exponent 1 assumes that errors add up and that later layers correct none. How far that holds depends on the
        network, hence the choice.

        Raises:
            OptionError: A budget out of reach.
        """
        exponents = SENSITIVITY_EXPONENTS[:1] if self.removal_cost is None else SENSITIVITY_EXPONENTS
        candidates: list[dict[str, int]] = []
        for exponent in exponents:
            widths = self.widths(costs, fraction, min_width, round_to, exponent)
            if widths not in candidates:
                candidates.append(widths)
        return candidates

    def widths(
        self, costs: Mapping[str, LayerCost], fraction: float, min_width: float, round_to: int, exponent: float
    ) -> dict[str, int]:
        """Return the width of each group within a fraction of the cost.

        Minimizes Σ_g s_g^exponent · removal cost_g(width_g), with the sensitivities s_g.

        Raises:
            OptionError: A budget out of reach.
        """
        target = fraction * total_cost(costs, {})
        divisors = {name: 1 if kind == "heads" else round_to for name, kind in self.kinds.items()}
        if self.removal_cost is not None:
            weighted = {name: cost * self.sensitivity[name] ** exponent for name, cost in self.removal_cost.items()}
            return allocate(weighted, costs, target, min_width=min_width, round_to=divisors)
        sizes = {name: len(order) for name, order in self.removal_order.items()}
        allowed = {name: allowed_widths(size, min_width, divisors[name]) for name, size in sizes.items()}
        for permille in range(1000, -1, -1):
            widths = {
                name: next((width for width in allowed[name] if width <= size * permille / 1000), allowed[name][-1])
                for name, size in sizes.items()
            }
            if total_cost(costs, {name: size - widths[name] for name, size in sizes.items()}) <= target:
                return widths
        raise OptionError(
            f"cannot reach a fraction of {fraction} of the cost with min_width={min_width}; raise the budget or lower "
            "min_width"
        )

    def deferred(
        self, layers: Mapping[str, nn.Module], groups: Sequence[ChannelGroup], widths: Mapping[str, int]
    ) -> dict[str, DeferredRanking]:
        """Return the groups whose channels are ranked again when the reconstruction reaches their only consumer."""
        if self.removal_cost is None:
            return {}
        consumers = [name for group in groups for name in group.consumers]
        deferred = {}
        for group in groups:
            [consumer, *others] = group.consumers
            layer = layers[consumer]
            exclusive = not others and consumers.count(consumer) == 1
            small = is_single_regression(layer) and num_input_features(layer) <= MAX_RERANK_FEATURES
            if exclusive and small and widths[group.name] < group.size:
                deferred[group.name] = DeferredRanking(layer, group, consumer, widths[group.name])
        return deferred


class DeferredRanking:
    """Ranking of a group by the inputs that its consumer has in the pruned network.

    Args:
        layer: Consumer, which has no other inputs.
        group: Channel group.
        consumer: Name of the consumer.
        width: Units to keep.

    Attributes:
        removed: Removed units, after the call.
    """

    def __init__(self, layer: nn.Module, group: ChannelGroup, consumer: str, width: int) -> None:
        self.layer, self.group, self.consumer, self.width = layer, group, consumer, width
        self.removed: list[int] = []

    def __call__(self, moments: PrimalMoments | KernelMoments, weight: Tensor, scale: Tensor) -> Tensor:
        """Return the mask (C,) of input channels to keep.

        Args:
            moments: Moments of the consumer's inputs.
            weight: Weights (d, o) of the consumer without a restriction of its inputs.
            scale: Scale (o,) of each output channel.
        """
        if not isinstance(moments, PrimalMoments):
            raise ShapeError(f"layer {self.consumer!r}: too many features to rank channels")
        columns = unit_columns(self.layer, self.group.consumers[self.consumer]).to(weight.device)
        consumer = Consumer(self.consumer, moments.xx[0], weight * _bounded_scale(scale), columns, 1.0)
        self.removed, _ = BackwardElimination([consumer], RANKING_RIDGE).eliminate_until(keep=self.width)
        masks = self.group.input_masks({self.consumer: num_input_channels(self.layer)}, self.removed)
        return masks[self.consumer].to(weight.device)


def rank_by_isomorphism(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    epilogues: Mapping[str, Epilogue],
    images: Calibration,
    seed: int,
    progress: bool,
    rows: int | None = None,
) -> tuple[ChannelRanking, ReferenceOutputs | None]:
    """Rank the channels of every group by backward elimination on the original network's inputs.

    The output's sensitivity is measured on other images: with few images, refitted weights fit those that they were
    computed from better than new ones, and more so in wide layers.

    Args:
        model: Original network, in eval mode.
        groups: Channel groups.
        epilogues: Epilogues of the layers.
        images: Calibration images.
        seed: Seed of the positions.
        progress: Show progress bars.
        rows: Samples per feature of a later reconstruction, whose targets are recorded in the same pass. None records
            no targets.
    """
    consumers = {
        name: model.get_submodule(name)
        for group in groups
        for name in group.consumers
        if is_single_regression(model.get_submodule(name))
    }
    merged = {
        name: unit_columns(consumers[name], channels)
        for group in groups
        for name, channels in group.consumers.items()
        if name in consumers and num_input_features(consumers[name]) > WIDE_LAYER_FEATURES
    }
    macs = count_macs(model, images.first(1), images.forward)
    maximum = affordable_images(macs, MAX_SENSITIVITY_MACS, SENSITIVITY_IMAGES, len(groups))
    elimination_images, sensitivity_images = images.split(MAX_SENSITIVITY_FRACTION, maximum)
    count, reference = elimination_images.count, None
    if rows is None:
        inputs = input_moments(
            model,
            elimination_images,
            consumers,
            max_images=count,
            forward=images.forward,
            merged=merged,
            seed=seed,
            progress=progress,
        )
    else:
        with InputMoments(consumers, count, SAMPLES_PER_FEATURE, merged, seed) as accumulator:
            reference = record_reference_outputs(model, epilogues, images, rows, seed, progress, accumulator)
        inputs = accumulator.moments()
    eliminations = {group.name: eliminate_channels(model, group, inputs, epilogues, RANKING_RIDGE) for group in groups}
    ranking = ChannelRanking(
        removal_order={name: elimination.order for name, elimination in eliminations.items()},
        removal_cost={name: elimination.removal_cost for name, elimination in eliminations.items()},
        sensitivity=output_sensitivities(model, eliminations, sensitivity_images, progress, list(epilogues)),
        kinds={group.name: group.kind for group in groups},
    )
    return ranking, reference


@dataclass(frozen=True)
class GroupElimination:
    """Backward elimination of one group.

    Attributes:
        order: Units in the order of removal; the last one is never removed.
        removal_cost: Unexplained variance (J + 1,) of the consumers with w units left, summed, at entry w; entry 0 is
            infinite.
        probe_width: Units left at the probe.
        weights: For each consumer its refitted weight at the probe, and the change of its bias.
    """

    order: list[int]
    removal_cost: Tensor
    probe_width: int
    weights: dict[str, tuple[Tensor, Tensor]]


def eliminate_channels(
    model: nn.Module,
    group: ChannelGroup,
    inputs: Mapping[str, LayerInput],
    epilogues: Mapping[str, Epilogue],
    ridge: float = RANKING_RIDGE,
) -> GroupElimination:
    """Eliminate the units of a group on the original network's inputs.

    Output channels of a consumer are weighted by the scale of its batch norm.

    Args:
        model: Original network.
        group: Group with at least one consumer among `inputs`.
        inputs: Input moments of ungrouped consumers.
        epilogues: Epilogues of the layers.
        ridge: Relative ρ.
    """
    consumers = [
        _GroupConsumer.of(model, name, channels, inputs[name], epilogues.get(name, Epilogue()))
        for name, channels in group.consumers.items()
        if name in inputs
    ]
    elimination = BackwardElimination([consumer.regression for consumer in consumers], ridge)
    probe_width = max(1, round(PROBE_WIDTH_FRACTION * group.size))
    order, costs = elimination.eliminate_until(keep=probe_width)
    weights = {
        consumer.regression.name: consumer.layer_weight(refitted)
        for consumer, refitted in zip(consumers, elimination.weights(), strict=True)
    }
    if probe_width > 1:
        later_order, later_costs = elimination.eliminate_until(keep=1)
        order, costs = order + later_order, costs + later_costs
    removal_cost = torch.zeros(group.size + 1, dtype=torch.float64)
    removal_cost[0] = math.inf
    if costs:
        # Entry w: the sum of the costs of the first J - w removals
        removal_cost[1 : group.size] = torch.tensor(costs, dtype=torch.float64).clamp_min(0).cumsum(0).flip(0)
    last = int(elimination.remaining.nonzero()[0])
    return GroupElimination([*order, last], removal_cost, probe_width, weights)


@dataclass(frozen=True)
class _GroupConsumer:
    """Consumer of a group, with weights scaled by its epilogue.

    Attributes:
        layer: The layer.
        regression: Consumer for the elimination.
        mean: Means of the regression's features.
        scale: Scale of each output channel.
        units: Features (J, m) of each unit where a wide layer's features are merged, else None.
    """

    layer: nn.Module
    regression: Consumer
    mean: Tensor
    scale: Tensor
    units: Tensor | None

    @classmethod
    def of(
        cls, model: nn.Module, name: str, channels: Tensor, inputs: LayerInput, epilogue: Epilogue
    ) -> _GroupConsumer:
        layer: Any = model.get_submodule(name)
        weight, moments = regression_weight(layer.weight.detach()).double(), inputs.moments
        columns = unit_columns(layer, channels).to(weight.device)
        norm = model.get_submodule(epilogue.norm) if epilogue.norm is not None else None
        scale = _bounded_scale(batch_norm_affine(norm, weight.shape[1], weight.device)[0])
        units, weight = None, weight * scale
        if len(moments.mean_x) != len(weight):
            # Merged: the m features of a unit count as m outputs with the same input
            units, weight = columns, weight[columns].flatten(1)
            columns = torch.arange(len(columns), device=columns.device)[:, None]
        xx = _shrunk(moments.xx.double() / moments.count, float(moments.count))
        regression = Consumer(name, xx, weight, columns, output_variance(xx, weight))
        return cls(layer, regression, moments.mean_x.double(), scale, units)

    def layer_weight(self, refitted: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight of the layer for refitted regression weights, and the change of its bias."""
        original, mean = regression_weight(self.layer.weight.detach()).double(), self.mean  # type: ignore[operator]
        if self.units is not None:
            spread = torch.zeros_like(original)
            spread[self.units] = refitted.view(*self.units.shape, -1)
            refitted = spread
            mean = torch.zeros_like(original[:, 0]).index_put((self.units,), mean[:, None].expand(self.units.shape))
        refitted = refitted / self.scale
        # The mean of the output does not change: b + (A - B)ᵀ E[x]
        return ungrouped_weight(self.layer, refitted[None]), (original - refitted).T @ mean


def _bounded_scale(scale: Tensor) -> Tensor:
    """Return positive scales, bounded from below relative to the largest one."""
    return scale.abs().clamp_min(MIN_OUTPUT_SCALE * float(scale.abs().max().clamp_min(1e-30)))


def _shrunk(xx: Tensor, count: float) -> Tensor:
    """Shrink a covariance to its diagonal: with few samples every feature is a linear map of the others."""
    features_per_sample = len(xx) / count
    alpha = min(1.0, max(0.0, (features_per_sample - MAX_FEATURES_PER_SAMPLE) / (1 - MAX_FEATURES_PER_SAMPLE)))
    return (1 - alpha) * xx + alpha * xx.diagonal().diag()


def output_sensitivities(
    model: nn.Module,
    eliminations: Mapping[str, GroupElimination],
    images: Calibration,
    progress: bool = True,
    order: Sequence[str] = (),
) -> dict[str, float]:
    """Measure the change of the network's output per unit of each group's removal cost.

    One group at a time is reduced to its probe width w, with refitted consumers:
    s_g = (‖f_g(x) - f(x)‖² / Var f(x)) / removal cost_g(w). Weighted by it, the removal costs of all groups are in the
    unit of the output's error.

    Args:
        model: Original network, in eval mode.
        eliminations: Elimination of each group.
        images: Images to measure on.
        progress: Show a progress bar.
        order: Layers that run once, in forward order. Those before a reduced layer are computed once for all groups.

    Returns:
        Sensitivity of each group.

    Raises:
        InputTypeError: A network whose output is no tensor.
    """
    cache = ActivationCache({name: model.get_submodule(name) for name in order})
    changes, outputs = dict.fromkeys(eliminations, 0.0), []
    batches = list(images.batches(SENSITIVITY_BATCH_SIZE))
    passes = len(batches) * len(eliminations)
    with torch.no_grad(), tqdm(total=passes, desc="sensitivity", unit="pass", disable=not progress) as bar:
        for batch in batches:
            with cache.recording():
                outputs.append(output_tensor(images.forward(model, batch)))
            for name, elimination in eliminations.items():
                with _replaced(model, elimination.weights), cache.skip_prefix(list(elimination.weights)):
                    difference = output_tensor(images.forward(model, batch)) - outputs[-1]
                changes[name] += float(difference.square().sum())
                bar.update()
        output = torch.cat(outputs)
        variance = float((output - output.mean(0)).square().sum().clamp_min(1e-30))
    sensitivities = {}
    for name, elimination in eliminations.items():
        cost = float(elimination.removal_cost[elimination.probe_width])
        sensitivities[name] = max(changes[name] / variance / cost, 1e-24) if cost > 0 else 1.0
    return sensitivities


@contextmanager
def _replaced(model: nn.Module, weights: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Replace weights, and shift outputs, within."""

    def shift_output(shift: Tensor) -> Callable[..., Tensor]:
        return lambda module, inputs, output: output + shift

    handles, before = [], {}
    try:
        for name, (weight, shift) in weights.items():
            layer: Any = model.get_submodule(name)
            before[name] = layer.weight.data
            layer.weight.data = weight.to(before[name])
            shape = (1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
            handles.append(layer.register_forward_hook(shift_output(shift.to(before[name]).view(shape))))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in before.items():
            layer = model.get_submodule(name)
            layer.weight.data = weight


def output_tensor(value: Any) -> Tensor:
    """Return a model's output tensor: its logits, or the first floating tensor of nested outputs.

    Raises:
        InputTypeError: No floating tensor.

    Examples:
        >>> output_tensor((None, 3, torch.ones(2)))
        tensor([1., 1.])
    """
    logits = value.get("logits") if isinstance(value, Mapping) else getattr(value, "logits", None)
    tensors = [tensor for tensor in tensor_leaves([logits, value]) if tensor.is_floating_point()]
    if not tensors:
        raise InputTypeError(f"expected a network whose output holds a floating tensor, got {type(value).__name__}")
    return tensors[0].float()
