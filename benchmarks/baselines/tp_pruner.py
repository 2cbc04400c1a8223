"""Multiply-add count for all methods, and torch-pruning's pruner with a multiply-add budget.

They share no code with the library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

CONSUMER_HANDLERS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
PRODUCER_HANDLERS = (tp.prune_conv_out_channels, tp.prune_linear_out_channels)
OUTPUT_HANDLERS = (*PRODUCER_HANDLERS, tp.prune_depthwise_conv_out_channels)
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
COUNTED_LAYERS = (nn.Conv2d, nn.Linear)


class MacCounter:
    """Multiply-adds of convolutions and linear layers for one image."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.positions: dict[str, int] = {}
        with ExitStack() as stack, torch.no_grad():
            for name, layer in model.named_modules():
                if isinstance(layer, COUNTED_LAYERS):
                    handle = layer.register_forward_hook(
                        lambda m, _x, y, name=name: self.positions.update(
                            {name: y.numel() // (len(y) * m.weight.shape[0])}
                        )
                    )
                    stack.callback(handle.remove)
            model(example)

    def __call__(self, model: nn.Module) -> float:
        return float(sum(count * model.get_submodule(name).weight.numel() for name, count in self.positions.items()))

    def after(self, model: nn.Module, groups: Sequence[Any]) -> float:
        """Count the multiply-adds that would remain if torch-pruning's groups were pruned."""
        output_channels, input_channels = {}, {}
        for group in groups:
            for item in group:
                handler = item.dep.handler
                removed = (
                    output_channels
                    if handler in OUTPUT_HANDLERS
                    else input_channels
                    if handler in CONSUMER_HANDLERS
                    else None
                )
                if removed is not None:
                    removed.setdefault(item.dep.target.module, set()).update(item.idxs)
        total = 0.0
        for name, count in self.positions.items():
            layer = model.get_submodule(name)
            width, inputs = layer.weight.shape[:2]
            taps = layer.weight[0, 0].numel()
            total += (
                count
                * taps
                * (width - len(output_channels.get(layer, ())))
                * (inputs - len(input_channels.get(layer, ())))
            )
        return total


class CachedScores:
    """Importance that is computed once for each group."""

    def __init__(self, importance: Callable[[Any], Tensor | None]) -> None:
        self.importance, self.scores = importance, {}

    def __call__(self, group: Any) -> Tensor | None:
        root = group[0].dep.target.module
        if root not in self.scores:
            self.scores[root] = self.importance(group)
        return self.scores[root]


@dataclass
class BudgetPruner:
    """Pruner of torch-pruning that meets a multiply-add budget by bisection on its pruning ratio.

    Attributes:
        model: Network to prune in place.
        example: Input for tracing.
        macs: Counter of multiply-adds.
        roots: Names of the layers whose output channels may be pruned. All others are ignored.
    """

    model: nn.Module
    example: Tensor
    macs: MacCounter
    roots: Sequence[str]

    def cut(self, importance: Callable[[Any], Tensor | None], target: float, scope: str) -> float:
        """Prune to at most `target` multiply-adds and return the remaining number."""
        scores = CachedScores(importance)
        best_ratio, best_macs = 0.0, -1.0
        low, high = 0.0, 1.0
        for _ in range(18):
            ratio = (low + high) / 2
            macs = self.macs.after(self.model, list(self._pruner(scores, ratio, scope).step(interactive=True)))
            if best_macs < macs <= target:
                best_ratio, best_macs = ratio, macs
            low, high = (low, ratio) if macs <= target else (ratio, high)
        for group in self._pruner(scores, best_ratio, scope).step(interactive=True):
            group.prune()
        return self.macs(self.model)

    def remove(self, kept: Mapping[str, Sequence[int]]) -> None:
        """Prune the output channels of root layers down to the named indices."""
        graph = tp.DependencyGraph().build_dependency(self.model, self.example)
        for name, indices in kept.items():
            layer = self.model.get_submodule(name)
            removed = sorted(set(range(layer.weight.shape[0])) - set(indices))
            if removed:
                graph.get_pruning_group(layer, _output_pruning_function(layer), removed).prune()

    def consumers(self) -> dict[str, str]:
        """Map each root to the only layer that reads its channels, in their order.

        Depthwise layers and norms may be in between.
        """
        names = {module: name for name, module in self.model.named_modules()}
        graph = tp.DependencyGraph().build_dependency(self.model, self.example)
        consumers = {}
        for name in self.roots:
            layer = self.model.get_submodule(name)
            group = graph.get_pruning_group(layer, _output_pruning_function(layer), list(range(layer.weight.shape[0])))
            group_consumers = [item for item in group if item.dep.handler in CONSUMER_HANDLERS]
            if len(group_consumers) != 1 or list(group_consumers[0].idxs) != list(range(layer.weight.shape[0])):
                raise ValueError(
                    f"{name} has {len(group_consumers)} consumers, or one that reads its channels in another order; "
                    "expected one"
                )
            consumers[name] = names[group_consumers[0].dep.target.module]
        return consumers

    def _pruner(self, scores: CachedScores, ratio: float, scope: str) -> Any:
        ignored = [
            layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, COUNTED_LAYERS) and name not in self.roots and not _is_depthwise(layer)
        ]
        options: dict[str, Any] = {"global_pruning": scope == "global", "pruning_ratio": ratio}
        if scope == "local":
            widths = {name: self.model.get_submodule(name).weight.shape[0] for name in self.roots}
            kept = scale_widths(widths, ratio)
            options["pruning_ratio_dict"] = {
                self.model.get_submodule(name): 1 - (kept[name] + 1e-3) / width for name, width in widths.items()
            }
        # torch-pruning has mutable default arguments
        fresh: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
        return tp.pruner.BasePruner(self.model, self.example, scores, ignored_layers=ignored, **options, **fresh)


def scale_widths(widths: Mapping[str, int], ratio: float) -> dict[str, int]:
    """Scale widths by the same ratio.

    Layers of equal width are rounded alternately up and down, so that the multiply-adds follow the ratio closely.
    Rounding all alike changes them by up to 7 % on ResNet-56.
    """
    turn: dict[int, int] = {}
    kept = {}
    for name, width in widths.items():
        turn[width] = turn.get(width, 0) + 1
        kept[name] = max(1, min(width, int(width * (1 - ratio) + turn[width] * GOLDEN_RATIO % 1)))
    return kept


def inner_layers(model: nn.Module, example: Tensor, ignored: Sequence[str]) -> list[str]:
    """List the layers whose output channels have one producer and one consumer: widths within blocks."""
    names = {module: name for name, module in model.named_modules()}
    graph = tp.DependencyGraph().build_dependency(model, example)
    layers = []
    for group in graph.get_all_groups(ignored_layers=[model.get_submodule(name) for name in ignored]):
        handlers = [item.dep.handler for item in group]
        if sum(h in PRODUCER_HANDLERS for h in handlers) == 1 and sum(h in CONSUMER_HANDLERS for h in handlers) == 1:
            layers.append(
                next(names[item.dep.target.module] for item in group if item.dep.handler in PRODUCER_HANDLERS)
            )
    order = list(names.values())
    return sorted(layers, key=order.index)


def _is_depthwise(layer: nn.Module) -> bool:
    """Return whether a layer is a depthwise convolution, which is pruned with its producer."""
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.groups == layer.out_channels


def _output_pruning_function(layer: nn.Module) -> Any:
    return tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
