"""Allocation of widths to channel groups under a budget."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from knowiso_train.errors import OptionError
from knowiso_train.features.recording import record_outputs
from knowiso_train.pruning._channel_group import ChannelGroup
from knowiso_train.pruning._tracing import Forward
from knowiso_train.utils.batch import batch_size


def count_positions(model: nn.Module, batch: Any, forward: Forward = operator.call) -> dict[str, float]:
    """Count the output positions of each convolution and linear layer for one image, over all its calls.

    Args:
        model: Network.
        batch: Small batch.
        forward: Function that runs a model on a batch.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> count_positions(model, torch.zeros(5, 3, 4, 4))
        {'0': 4.0, '2': 1.0}
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    images = batch_size(batch)
    with torch.no_grad(), record_outputs(layers, Tensor.numel) as num_elements:
        forward(model, batch)
    return {name: sum(counts) / (images * len(layers[name].weight)) for name, counts in num_elements.items()}


def count_macs(model: nn.Module, batch: Any, forward: Forward = operator.call) -> float:
    """Count the multiply-adds of a whole network for one image, without biases.

    Convolutions, linear layers, recurrent layers, the products of attention and every other matrix product count,
    whether a module or a function computes them. Elementwise operations do not.

    Examples:
        >>> count_macs(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 4, 4))
        432.0
        >>> count_macs(nn.LSTM(3, 4, batch_first=True), torch.zeros(2, 5, 3)) == 4 * 4 * (3 + 4) * 5
        True
    """
    return count_module_macs(model, batch, (), forward)[0]


def count_module_macs(
    model: nn.Module, batch: Any, names: Collection[str], forward: Forward = operator.call
) -> tuple[float, dict[str, float]]:
    """Count the multiply-adds of a whole network and of some modules for one image, over all their calls.

    Args:
        model: Network.
        batch: Small batch.
        names: Names of the modules.
        forward: Function that runs a model on a batch.

    Returns:
        Multiply-adds of the network, and of each module with everything in it.
    """
    images, counts, starts = batch_size(batch), dict.fromkeys(names, 0.0), {}
    counter = FlopCounterMode(display=False)
    with ExitStack() as stack, torch.no_grad(), _counted_operations(), counter:
        # The counter hooks inputs that require gradients, which fails for parameters that are passed to modules
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)

        def start(name: str) -> None:
            starts[name] = counter.get_total_flops()

        def stop(name: str) -> None:
            counts[name] += counter.get_total_flops() - starts[name]

        for name in names:
            module = model.get_submodule(name)
            for handle in (
                module.register_forward_pre_hook(lambda *_, name=name: start(name)),
                module.register_forward_hook(lambda *_, name=name: stop(name)),
            ):
                stack.callback(handle.remove)
        forward(model, batch)
    # A multiply-add counts as two operations
    return counter.get_total_flops() / (2 * images), {name: count / (2 * images) for name, count in counts.items()}


@contextmanager
def _counted_operations() -> Iterator[None]:
    """Compute fused operations by their parts: torch's counter has no entry for fused attention and recurrent layers.

    oneDNN and cuDNN fuse recurrent layers, the fast path of `nn.MultiheadAttention` the whole layer.
    """
    flags = (torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled(), torch.backends.mha.get_fastpath_enabled())
    setters: list[Callable[[bool], None]] = [
        torch._C._set_mkldnn_enabled,
        torch._C._set_cudnn_enabled,
        torch.backends.mha.set_fastpath_enabled,
    ]
    try:
        for setter in setters:
            setter(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for setter, flag in zip(setters, flags, strict=True):
            setter(flag)


def affordable_images(macs: float, budget: float, limits: tuple[int, int], passes: int = 1) -> int:
    """Return the number of images for which all passes stay within a budget.

    Args:
        macs: Multiply-adds of one image in one pass.
        budget: Multiply-adds of all images in all passes.
        limits: Minimum and maximum number of images.
        passes: Number of passes.

    Examples:
        >>> [affordable_images(432, budget, (4, 64)) for budget in (1e2, 1e4, 1e6)]
        [4, 23, 64]
    """
    return max(limits[0], min(limits[1], int(budget / (macs * passes + 1))))


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer: `unit · (inputs - removed inputs) · (outputs - removed outputs)`.

    A depthwise convolution has one input channel a group, none of which is ever removed.

    Attributes:
        unit: Cost of one input channel for one output channel.
        inputs: Input channels of one group of the convolution.
        outputs: Output channels.
        consumed: Input channels of one group of the convolution per unit of each channel group.
        produced: Output channels per unit of each channel group.
    """

    unit: float
    inputs: float
    outputs: float
    consumed: Mapping[str, float] = field(default_factory=dict)
    produced: Mapping[str, float] = field(default_factory=dict)

    def after(self, removed: Mapping[str, int]) -> float:
        """Return the cost after removal of these numbers of units."""
        inputs = self.inputs - sum(channels * removed.get(name, 0) for name, channels in self.consumed.items())
        outputs = self.outputs - sum(channels * removed.get(name, 0) for name, channels in self.produced.items())
        return self.unit * inputs * outputs


Costs = Mapping[str, LayerCost]


def layer_costs(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    positions: Mapping[str, float],
    kind: Literal["macs", "params"] = "macs",
) -> dict[str, LayerCost]:
    """Return the cost of every layer as a function of the widths of the channel groups.

    Args:
        model: Network.
        groups: Channel groups of the network.
        positions: Output positions of each layer, from `count_positions`.
        kind: "macs" for multiply-adds of an image, "params" for weights.

    Raises:
        OptionError: Another kind.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 2, 1, bias=False))
        >>> units = torch.arange(4)[:, None]
        >>> costs = layer_costs(model, [ChannelGroup("0", 4, {"1": units}, {"0": units})], {"0": 10.0, "1": 10.0})
        >>> total_cost(costs, {}), total_cost(costs, {"0": 2})
        (200.0, 100.0)
    """
    if kind not in ("macs", "params"):
        raise OptionError(f'kind must be "macs" or "params", got {kind!r}')
    costs = {}
    for name, count in positions.items():
        layer: Any = model.get_submodule(name)
        weight, convs = layer.weight, getattr(layer, "groups", 1)
        unit = (count if kind == "macs" else 1.0) * weight[0, 0].numel()
        depthwise = convs > 1 and weight.shape[1] == 1
        consumed = (
            {} if depthwise else {g.name: g.consumers[name].shape[1] / convs for g in groups if name in g.consumers}
        )
        produced = {g.name: float(g.producers[name].shape[1]) for g in groups if name in g.producers}
        costs[name] = LayerCost(unit, weight.shape[1], weight.shape[0], consumed, produced)
    return costs


def unlayered_costs(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    costs: Costs,
    batch: Any,
    forward: Forward = operator.call,
) -> dict[str, LayerCost]:
    """Return the multiply-adds that no convolution or linear layer accounts for, such as the products of attention.

    Those of an attention module are proportional to its heads. All others are constant.

    Args:
        model: Network.
        groups: Channel groups of the network.
        costs: Multiply-adds of its layers, from `layer_costs`.
        batch: Small batch.
        forward: Function that runs a model on a batch.

    Examples:
        >>> recurrent = nn.LSTM(3, 4, batch_first=True)
        >>> total_cost(unlayered_costs(recurrent, [], {}, torch.zeros(2, 5, 3)), {})
        560.0
    """
    # The innermost module that holds all projections of a group of heads computes their products
    attentions = {
        _common_module([*group.producers, *group.consumers]): group for group in groups if group.kind == "heads"
    }
    rest, of_modules = count_module_macs(model, batch, list(attentions), forward)
    rest -= total_cost(costs, {})
    result = {}
    for name, group in attentions.items():
        inside = {layer: cost for layer, cost in costs.items() if not name or layer.startswith(f"{name}.")}
        products = max(0.0, of_modules[name] - total_cost(inside, {}))
        rest -= products
        result[f"{name} (products)"] = LayerCost(products / group.size, 1, group.size, {}, {group.name: 1.0})
    # A layer that computes less than its weight suggests leaves a negative rest
    return result | {"(other)": LayerCost(max(0.0, rest), 1, 1)}


def _common_module(names: Sequence[str]) -> str:
    """Return the name of the innermost module that holds all of these layers.

    Examples:
        >>> _common_module(["blocks.0.attn.qkv", "blocks.0.attn.proj"])
        'blocks.0.attn'
    """
    parts = [name.split(".")[:-1] for name in names]
    common = takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    return ".".join(level[0] for level in common)


def total_cost(costs: Costs, removed: Mapping[str, int]) -> float:
    """Return the cost of all layers after removal of these numbers of units."""
    return sum(cost.after(removed) for cost in costs.values())


def allowed_widths(size: int, min_width: float, round_to: int) -> list[int]:
    """Return, in descending order, the full width and the multiples of `round_to` above the minimum fraction of it.

    Examples:
        >>> allowed_widths(10, 0.25, 4)
        [10, 8, 4]
    """
    minimum = max(1, math.ceil(min_width * size))
    return [size, *(width for width in range(size - 1, minimum - 1, -1) if width % round_to == 0)]


def allocate(
    removal_costs: Mapping[str, Tensor],
    costs: Costs,
    target: float,
    *,
    min_width: float = 0.125,
    round_to: int | Mapping[str, int] = 1,
) -> dict[str, int]:
    """Return the widths of least total removal cost within a budget.

    Greedy: the group with the least removal cost per saved cost is reduced, to the width where that ratio is least.
    With convex removal costs and additive costs this is the optimum of the Lagrangian relaxation.

    Args:
        removal_costs: For each group (J + 1,), the removal cost of a width w at entry w; it never falls as w falls.
            Entry 0 is not used.
        costs: Cost of every layer.
        target: Budget, in the unit of the costs.
        min_width: Minimum fraction of a group's units to keep.
        round_to: Divisor of all widths but the full one; one number, or one for each group.

    Returns:
        Width of each group.

    Raises:
        OptionError: A target out of reach.

    Examples:
        >>> costs = {"a": LayerCost(1.0, 1, 8, {}, {"a": 1.0}), "b": LayerCost(1.0, 1, 8, {}, {"b": 1.0})}
        >>> removal_costs = {"a": torch.arange(8.0, -1, -1), "b": 10 * torch.arange(8.0, -1, -1)}
        >>> allocate(removal_costs, costs, 10.0)
        {'a': 2, 'b': 8}
    """
    sizes = {name: len(cost) - 1 for name, cost in removal_costs.items()}
    widths = dict(sizes)
    divisors = round_to if isinstance(round_to, Mapping) else dict.fromkeys(widths, round_to)
    allowed = {name: allowed_widths(size, min_width, divisors[name]) for name, size in sizes.items()}
    _check_reachable(costs, target, {name: sizes[name] - allowed[name][-1] for name in sizes})
    layers = {name: [c for c in costs.values() if name in c.consumed or name in c.produced] for name in widths}
    coupled = coupled_groups(layers)
    cost, removed = total_cost(costs, {}), dict.fromkeys(widths, 0)
    # Best reduction of each group, and the cost that one unit saves. Both depend on the widths of coupled groups
    reductions: dict[str, tuple[WidthReduction | None, float]] = {}
    while cost > target:
        candidates: list[tuple[WidthReduction, str]] = []
        for name, width in widths.items():
            if name not in reductions:
                saving = _saving(layers[name], removed, name, 1)
                reductions[name] = _best_reduction(removal_costs[name], allowed[name], width, saving, math.inf), saving
            best, saving = reductions[name]
            if best is not None and (width - best.width) * saving > cost - target:  # a smaller step may suffice
                best = _best_reduction(removal_costs[name], allowed[name], width, saving, cost - target)
            if best is not None:
                candidates.append((best, name))
        best, name = min(candidates, key=lambda pair: pair[0].slope)
        cost -= _saving(layers[name], removed, name, widths[name] - best.width)
        removed[name] += widths[name] - best.width
        widths[name] = best.width
        for other in coupled[name]:
            reductions.pop(other, None)
    return widths


def coupled_groups(layers: Mapping[str, Collection[LayerCost]]) -> dict[str, set[str]]:
    """Return for each group the groups that share a layer with it, itself included.

    Their savings depend on one another: a layer's cost is the product of its input and output channels.

    Args:
        layers: Layers of each group.

    Examples:
        >>> first, second = LayerCost(1.0, 3, 8, {}, {"a": 1.0}), LayerCost(1.0, 8, 4, {"a": 1.0}, {"b": 1.0})
        >>> sorted(coupled_groups({"a": [first, second], "b": [second]})["a"])
        ['a', 'b']
    """
    return {
        name: {other for other in layers for layer in costs if other in layer.consumed or other in layer.produced}
        for name, costs in layers.items()
    }


def _check_reachable(costs: Costs, target: float, removed: Mapping[str, int]) -> None:
    minimum, full = total_cost(costs, removed), total_cost(costs, {})
    if minimum > target:
        raise OptionError(
            f"cannot reach a fraction of {target / full:.3f} of the cost: {minimum / full:.3f} is left with every "
            "group at its minimum width. Raise the budget, lower min_width or round_to, or ignore fewer layers"
        )


@dataclass(frozen=True)
class WidthReduction:
    """Reduction of one group.

    Attributes:
        slope: Removal cost per saved cost.
        width: Width after the reduction.
    """

    slope: float
    width: int


def _best_reduction(
    removal_cost: Tensor, allowed: Sequence[int], width: int, saving_per_unit: float, required: float
) -> WidthReduction | None:
    """Return the reduction of least slope that saves no more than `required`; None at the minimum width."""
    grid = torch.tensor([narrower for narrower in allowed if narrower < width])
    if not len(grid):
        return None
    savings = (width - grid) * max(saving_per_unit, 1e-30)
    if bool((savings >= required).any()):
        grid = grid[: int((savings >= required).float().argmax()) + 1]
    # slope(w) = (removal cost(w) - removal cost(width)) / saved cost
    slopes = (removal_cost[grid] - removal_cost[width]) / savings[: len(grid)]
    best = int(slopes.argmin())
    return WidthReduction(float(slopes[best]), int(grid[best]))


def _saving(costs: Collection[LayerCost], removed: Mapping[str, int], name: str, units: int) -> float:
    return sum(cost.after(removed) - cost.after({**removed, name: removed[name] + units}) for cost in costs)
