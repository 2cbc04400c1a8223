"""Which units of every group go first, and how wide the groups become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from knowiso_train.errors import OptionError, ShapeError
from knowiso_train.integrations.channel_groups import dependency_graph
from knowiso_train.pruning.allocation import allocate, allowed_widths, total_cost
from knowiso_train.pruning.calibration import Calibration, Forward
from knowiso_train.pruning.channel_group import ChannelGroup, inputs_of_layer, unit_columns
from knowiso_train.pruning.collect import ROWS, InputMoments, input_moments
from knowiso_train.pruning.consumer import Consumer
from knowiso_train.pruning.cost import LayerCost
from knowiso_train.pruning.elimination import BackwardElimination
from knowiso_train.pruning.originals import WIDE, Originals, originals
from knowiso_train.pruning.refit import RowMoments
from knowiso_train.pruning.regression import AnyMoments
from knowiso_train.pruning.rows import columns_of, readable
from knowiso_train.pruning.sensitivity import eliminate, probed, sensitivities
from knowiso_train.pruning.trace import Tail

RIDGE = 1e-4
TEMPERS = (0.5, 1.0)  # exponents of the output's sensitivity; the first where nothing tells them apart
JUDGING = 0.25  # of the images at most tell the output's sensitivity, and no more than it takes
AGAIN = 2304  # regressors, above which a second elimination takes longer than it is worth


@dataclass
class Choice:
    """Orders in which units go, and what that does.

    Attributes:
        orders: for each group its units, the first to go first.
        harms: for each group (J + 1,), what its readers lose with w units left; None cuts the same share of every group.
        factors: for each group, the output's sensitivity to that.
        kinds: of the groups.
    """

    orders: dict[str, list[int]]
    harms: dict[str, Tensor] | None
    factors: dict[str, float]
    kinds: dict[str, str]

    def candidates(self, costs: Mapping[str, LayerCost], share: float, floor: float, round_to: int) -> list[dict[str, int]]:
        """Widths at most this share of the cost, by harms that count the output's sensitivity more or less: the plain one counts errors as if they
        added up and were never mended by later layers, and how far that is so depends on the network.

        Raises:
            OptionError: out of reach.
        """
        found: list[dict[str, int]] = []
        for temper in TEMPERS if self.harms is not None else TEMPERS[:1]:
            widths = self.widths(costs, share, floor, round_to, temper)
            if widths not in found:
                found.append(widths)
        return found

    def widths(self, costs: Mapping[str, LayerCost], share: float, floor: float, round_to: int, temper: float) -> dict[str, int]:
        """Units that stay, at most this share of the cost, with that exponent of the sensitivities.

        Raises:
            OptionError: out of reach.
        """
        target = share * total_cost(costs, {})
        steps = {name: 1 if kind == "heads" else round_to for name, kind in self.kinds.items()}
        if self.harms is not None:
            harms = {name: harm * self.factors[name] ** temper for name, harm in self.harms.items()}
            return allocate(harms, costs, target, floor=floor, round_to=steps)
        sizes = {name: len(order) for name, order in self.orders.items()}
        for percent in range(1000, -1, -1):
            widths = {}
            for name, size in sizes.items():
                allowed = allowed_widths(size, floor, steps[name])
                widths[name] = next((width for width in allowed if width <= size * percent / 1000), allowed[-1])
            if total_cost(costs, {name: size - widths[name] for name, size in sizes.items()}) <= target:
                return widths
        raise OptionError(f"cannot reach a share of {share} of the cost with a floor of {floor}; let a larger share stay, or lower the floor")

    def again(self, layers: Mapping[str, nn.Module], groups: Sequence[ChannelGroup], widths: Mapping[str, int]) -> dict[str, SequentialChoice]:
        """Groups whose channels are chosen again when the refit reaches their only reader."""
        if self.harms is None:
            return {}
        readers = [reader for group in groups for reader in group.readers]
        found = {}
        for group in groups:
            [reader, *others] = group.readers
            alone = not others and readers.count(reader) == 1 and _choosable(layers[reader])
            if alone and widths[group.name] < group.size:
                found[group.name] = SequentialChoice(layers[reader], group, reader, widths[group.name])
        return found


class SequentialChoice:
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
        if not isinstance(moments, RowMoments):
            raise ShapeError(f"layer {self.reader!r}: too many regressors to choose among")
        elimination = BackwardElimination([Consumer(self.reader, moments.xx[0], scaled, columns, 1.0)], RIDGE)
        self.removed, _ = elimination.run(keep=self.width)
        return self.group.masks({self.reader: inputs_of_layer(self.layer)}, self.removed)[self.reader].to(weight.device)


def by_isomorphism(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    tails: Mapping[str, Tail],
    images: Calibration,
    seed: int,
    progress: bool,
    rows: int | None = None,
) -> tuple[Choice, Originals | None]:
    """Backward elimination of every group on the original's inputs, weighed by what the output makes of it on images that were not looked at before:
    where images are few, refitted weights do better on those that they were fitted to, and more so in wide layers.
    With `rows`, what a refit will aim at is kept in the same pass.
    """
    modules = dict(model.named_modules())
    readers = {
        name: modules[name] for group in groups for name in group.readers if readable(modules[name]) and getattr(modules[name], "groups", 1) == 1
    }
    merged = {
        name: unit_columns(readers[name], channels)
        for group in groups
        for name, channels in group.readers.items()
        if name in readers and columns_of(readers[name]) > WIDE
    }
    fitted, others = images.parted(JUDGING, probed(model, groups, images))
    target = None
    if rows is None:
        inputs = input_moments(
            model, fitted, readers, max_images=fitted.count, rows=ROWS, forward=images.forward, merged=merged, seed=seed, progress=progress
        )
    else:
        with InputMoments(readers, fitted.count, ROWS, merged, seed) as gathered:
            target = originals(model, modules, tails, images, rows, seed, progress, also=gathered)
        inputs = gathered.moments()
    found = {group.name: eliminate(model, group, inputs, tails, RIDGE) for group in groups}
    factors = sensitivities(model, groups, found, others, progress, list(tails))
    orders, harms = {name: entry.order for name, entry in found.items()}, {name: entry.harms for name, entry in found.items()}
    return Choice(orders, harms, factors, {group.name: group.kind for group in groups}), target


def by_scores(model: nn.Module, example: Any, groups: Sequence[ChannelGroup], importance: Any, forward: Forward | None = None) -> Choice:
    """Units in the order of the scores of a torch-pruning importance.

    Raises:
        OptionError: no importance, or one that gives no scores for a group.
    """
    if not callable(importance) or isinstance(importance, type):
        raise OptionError(f'importance must be "isomorphism" or an importance of torch-pruning, got {importance!r}')
    graph, orders = dependency_graph(model, example, forward), {}
    for group in groups:
        root, handler = _root(model, group)
        item = graph.get_pruning_group(root, handler, group.writers[_writer(group)].flatten().tolist())
        try:
            scores = importance(item)
        except Exception as error:  # whatever it needs and was not given, such as gradients
            raise OptionError(f"{type(importance).__name__} cannot score {group.name!r} ({type(error).__name__}: {error})") from error
        if scores is None:
            raise OptionError(f"{type(importance).__name__} gives no scores for {group.name!r}; pass it as ignored=, or choose another importance")
        channels = [int(index) for index in item[0].idxs]
        of_channel = torch.empty(max(channels) + 1, dtype=torch.float64)
        of_channel[channels] = scores.detach().double().cpu()
        orders[group.name] = of_channel[group.writers[_writer(group)]].mean(1).argsort().tolist()
    return Choice(orders, None, {}, {group.name: group.kind for group in groups})


def _choosable(layer: nn.Module) -> bool:
    return readable(layer) and getattr(layer, "groups", 1) == 1 and columns_of(layer) <= AGAIN


def _writer(group: ChannelGroup) -> str:
    return next(iter(group.writers)) if group.kind == "heads" else group.name


def _root(model: nn.Module, group: ChannelGroup) -> tuple[nn.Module, Any]:
    root = model.get_submodule(_writer(group))
    if isinstance(root, nn.Linear):
        return root, tp.prune_linear_out_channels
    depthwise = root.groups > 1 and root.weight.shape[1] == 1  # type: ignore[operator, index]
    return root, tp.prune_depthwise_conv_out_channels if depthwise else tp.prune_conv_out_channels
