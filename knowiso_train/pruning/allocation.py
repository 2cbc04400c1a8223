"""Allocation of widths to channel groups under a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import OptionError
from knowiso_train.features.hooks import record_outputs
from knowiso_train.pruning.calibration import Calibration
from knowiso_train.pruning.channel_groups import ChannelGroup


def count_positions(model: nn.Module, run: Callable[[], Any], images: int) -> dict[str, float]:
    """For each convolution and linear layer that runs, the positions at which it works for one image, over all its calls.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> count_positions(model, lambda: model(torch.zeros(5, 3, 4, 4)), 5)
        {'0': 4.0, '2': 1.0}
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    with torch.no_grad(), record_outputs(layers, Tensor.numel) as num_elements:
        run()
    return {name: sum(counts) / (images * len(layers[name].weight)) for name, counts in num_elements.items()}


def count_macs(model: nn.Module, run: Callable[[], Any], images: int) -> float:
    """Multiply-adds of convolutions and linear layers for one image, their biases left out.

    Example:
        >>> model = nn.Conv2d(3, 4, 3)
        >>> count_macs(model, lambda: model(torch.zeros(1, 3, 4, 4)), 1)
        432.0
    """
    modules: dict[str, Any] = dict(model.named_modules())
    return float(
        sum(places * modules[name].weight.numel() for name, places in count_positions(model, run, images).items())
    )


def affordable(model: nn.Module, images: Calibration, work: float, within: tuple[int, int], passes: int = 1) -> int:
    """Images for which so many passes of a network stay within a budget, at least and at most so many.

    Args:
        model: the network.
        images: one of them is run.
        work: multiply-adds of all passes together.
        within: at least and at most.
        passes: that all these images take.

    Example:
        >>> images = Calibration([torch.zeros(2, 3, 4, 4)])  # 432 multiply-adds each
        >>> [affordable(nn.Conv2d(3, 4, 3), images, work, (4, 64)) for work in (1e2, 1e4, 1e6)]
        [4, 23, 64]
    """
    each = count_macs(model, partial(images.forward, model, images.first(1)), 1)
    return max(within[0], min(within[1], int(work / (each * passes + 1))))


@dataclass(frozen=True)
class LayerCost:
    """One layer: `unit · (inputs - what is gone) · (outputs - what is gone)`; of a depthwise convolution `unit · (outputs - what is gone)`.

    Attributes:
        unit: cost of one input channel for one output channel.
        inputs: of one group of the convolution.
        outputs: output channels.
        reads: channels of one group that a unit of each channel group stands for.
        writes: output channels that a unit stands for.
    """

    unit: float
    inputs: float
    outputs: float
    reads: Mapping[str, float] = field(default_factory=dict)
    writes: Mapping[str, float] = field(default_factory=dict)

    def at(self, gone: Mapping[str, int]) -> float:
        """Cost when so many units of each channel group are gone."""
        inputs = self.inputs - sum(times * gone.get(name, 0) for name, times in self.reads.items())
        outputs = self.outputs - sum(times * gone.get(name, 0) for name, times in self.writes.items())
        return self.unit * inputs * outputs


def layer_costs(
    model: nn.Module, groups: Sequence[ChannelGroup], places: Mapping[str, float], kind: str = "macs"
) -> dict[str, LayerCost]:
    """Cost of every layer in terms of the channel groups.

    Args:
        model: the network.
        groups: its channel groups.
        places: from `count_positions`.
        kind: "macs" for multiply-adds of an image, "params" for weights.

    Raises:
        OptionError: another kind.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 2, 1, bias=False))
        >>> every = torch.arange(4)[:, None]
        >>> costs = layer_costs(model, [ChannelGroup("0", 4, {"1": every}, {"0": every})], {"0": 10.0, "1": 10.0})
        >>> sum(cost.at({}) for cost in costs.values()), sum(cost.at({"0": 2}) for cost in costs.values())
        (200.0, 100.0)
    """
    if kind not in ("macs", "params"):
        raise OptionError(f'kind must be "macs" or "params", got {kind!r}')
    found = {}
    for name, places_of in places.items():
        layer: Any = model.get_submodule(name)
        weight, convs = layer.weight, getattr(layer, "groups", 1)
        unit = (places_of if kind == "macs" else 1.0) * weight[0, 0].numel()
        depthwise = convs > 1 and weight.shape[1] == 1
        reads = {} if depthwise else {g.name: g.readers[name].shape[1] / convs for g in groups if name in g.readers}
        writes = {g.name: float(g.writers[name].shape[1]) for g in groups if name in g.writers}
        found[name] = LayerCost(unit, weight.shape[1], weight.shape[0], reads, writes)
    return found


Costs = Mapping[str, LayerCost]


def total_cost(costs: Costs, gone: Mapping[str, int]) -> float:
    """Of all layers when so many units of each group are gone."""
    return sum(cost.at(gone) for cost in costs.values())


def allowed_widths(size: int, min_width: float, round_to: int) -> list[int]:
    """Descending: the whole, and the multiples of `round_to` that are at least `min_width` of it.

    Example:
        >>> allowed_widths(10, 0.25, 4)
        [10, 8, 4]
    """
    least = max(1, math.ceil(min_width * size))
    return [size, *(width for width in range(size - 1, least - 1, -1) if width % round_to == 0)]


def allocate(
    harms: Mapping[str, Tensor],
    costs: Costs,
    target: float,
    *,
    min_width: float = 0.125,
    round_to: int | Mapping[str, int] = 1,
) -> dict[str, int]:
    """Widths of least harm at a cost of at most `target`.

    Step by step the group is narrowed that saves most for the harm it does, to the width where its ratio is best, costs
    counted at the widths that
    the others have by then. With convex harms and costs that add up this is the Lagrangian optimum.

    Args:
        harms: for each group (J + 1,), the harm of having w units left; never falling as w falls. Entry 0 is not used.
        costs: of every layer.
        target: in the unit of the costs.
        min_width: least share of a group's units that stays.
        round_to: widths are multiples of it, or the whole; one number, or one for each group.

    Returns:
        Units that stay, for each group.

    Raises:
        OptionError: a target that cannot be reached.

    Example:
        >>> costs = {"a": LayerCost(1.0, 1, 8, {}, {"a": 1.0}), "b": LayerCost(1.0, 1, 8, {}, {"b": 1.0})}
        >>> harms = {"a": torch.arange(8.0, -1, -1), "b": 10 * torch.arange(8.0, -1, -1)}
        >>> allocate(harms, costs, 10.0)
        {'a': 2, 'b': 8}
    """
    widths = {name: len(harm) - 1 for name, harm in harms.items()}
    steps = round_to if isinstance(round_to, Mapping) else dict.fromkeys(widths, round_to)
    choices = {name: allowed_widths(width, min_width, steps[name]) for name, width in widths.items()}
    sizes = dict(widths)
    least = total_cost(costs, {name: sizes[name] - choices[name][-1] for name in widths})
    if least > target:
        everything = total_cost(costs, {})
        raise OptionError(
            f"cannot reach a share of {target / everything:.3f} of the cost: with every group at its min_width {least / everything:.3f} is left. "
            "Let a larger share stay, lower the min_width or round_to, or ignore fewer layers"
        )
    touching = {name: [c for c in costs.values() if name in c.reads or name in c.writes] for name in widths}
    together = {
        name: {other for other in widths for c in touching[name] if other in c.reads or other in c.writes}
        for name in widths
    }
    now, gone = total_cost(costs, {}), dict.fromkeys(widths, 0)
    # And what one unit saves; they change when a group of a layer in common does
    steepest: dict[str, tuple[WidthReduction | None, float]] = {}
    while now > target:
        found: list[tuple[WidthReduction, str]] = []
        for name, width in widths.items():
            if name not in steepest:
                each = _saved(touching[name], gone, name, 1)
                steepest[name] = _best_reduction(harms[name], choices[name], width, each, math.inf), each
            best, each = steepest[name]
            if best is not None and (width - best.width) * each > now - target:  # perhaps less would do
                best = _best_reduction(harms[name], choices[name], width, each, now - target)
            if best is not None:
                found.append((best, name))
        best, name = min(found, key=lambda pair: pair[0].slope)
        now -= _saved(touching[name], gone, name, widths[name] - best.width)
        gone[name] += widths[name] - best.width
        widths[name] = best.width
        for other in together[name]:
            steepest.pop(other, None)
    return widths


@dataclass(frozen=True)
class WidthReduction:
    """To this width, and the harm it does for each unit of cost that it saves."""

    slope: float
    width: int


def _best_reduction(
    harm: Tensor, choices: Sequence[int], width: int, each: float, enough: float
) -> WidthReduction | None:
    """The best one of a group, no narrower than it takes to save `enough`; None at the min_width."""
    grid = torch.tensor([choice for choice in choices if choice < width])
    if not len(grid):
        return None
    saves = (width - grid) * max(each, 1e-30)
    if bool((saves >= enough).any()):
        grid = grid[: int((saves >= enough).float().argmax()) + 1]
    slopes = (harm[grid] - harm[width]) / saves[: len(grid)]
    at = int(slopes.argmin())
    return WidthReduction(float(slopes[at]), int(grid[at]))


def _saved(costs: Sequence[LayerCost], gone: Mapping[str, int], name: str, units: int) -> float:
    return sum(cost.at(gone) - cost.at({**gone, name: gone[name] + units}) for cost in costs)
