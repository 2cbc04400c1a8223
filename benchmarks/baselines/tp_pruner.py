"""Multiply-adds counted for everybody, and torch-pruning's pruner brought to a number of them. Kept apart from the library: nothing is shared."""

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
    """Multiply-adds of convolutions and linear layers for one image; one count for everybody."""

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
        """What would be left if torch-pruning's groups were cut."""
        made, read = {}, {}
        for group in groups:
            for item in group:
                lost = (
                    made
                    if item.dep.handler in OUTPUT_HANDLERS
                    else read
                    if item.dep.handler in CONSUMER_HANDLERS
                    else None
                )
                if lost is not None:
                    lost.setdefault(item.dep.target.module, set()).update(item.idxs)
        total = 0.0
        for name, count in self.positions.items():
            layer = model.get_submodule(name)
            width, reads = layer.weight.shape[:2]
            taps = layer.weight[0, 0].numel()
            total += count * taps * (width - len(made.get(layer, ()))) * (reads - len(read.get(layer, ())))
        return total


class CachedScores:
    """An importance that is asked once for each group."""

    def __init__(self, importance: Callable[[Any], Tensor | None]) -> None:
        self.importance, self.known = importance, {}

    def __call__(self, group: Any) -> Tensor | None:
        root = group[0].dep.target.module
        if root not in self.known:
            self.known[root] = self.importance(group)
        return self.known[root]


@dataclass
class BudgetPruner:
    """torch-pruning's pruner, brought to a number of multiply-adds by bisection on its pruning ratio.

    Attributes:
        model: pruned in place.
        example: an input to trace.
        macs: the count.
        roots: layers whose output channels may go; all others are ignored.
    """

    model: nn.Module
    example: Tensor
    macs: MacCounter
    roots: Sequence[str]

    def cut(self, importance: Callable[[Any], Tensor | None], target: float, scope: str) -> float:
        """Prune to at most `target` multiply-adds; returns what is left."""
        scores = CachedScores(importance)
        best, least = 0.0, -1.0
        low, high = 0.0, 1.0
        for _ in range(18):
            ratio = (low + high) / 2
            left = self.macs.after(self.model, list(self._pruner(scores, ratio, scope).step(interactive=True)))
            if left <= target and left > least:
                best, least = ratio, left
            low, high = (low, ratio) if left <= target else (ratio, high)
        for group in self._pruner(scores, best, scope).step(interactive=True):
            group.prune()
        return self.macs(self.model)

    def remove(self, kept: Mapping[str, Sequence[int]]) -> None:
        """Cut the output channels of root layers down to those named."""
        graph = tp.DependencyGraph().build_dependency(self.model, self.example)
        for name, indices in kept.items():
            layer = self.model.get_submodule(name)
            gone = sorted(set(range(layer.weight.shape[0])) - set(indices))
            if gone:
                graph.get_pruning_group(layer, _output_pruning_function(layer), gone).prune()

    def consumers(self) -> dict[str, str]:
        """The one layer that reads each root's channels, in its channels' order; depthwise layers and norms in between."""
        names = {module: name for name, module in self.model.named_modules()}
        graph = tp.DependencyGraph().build_dependency(self.model, self.example)
        found = {}
        for name in self.roots:
            layer = self.model.get_submodule(name)
            group = graph.get_pruning_group(layer, _output_pruning_function(layer), list(range(layer.weight.shape[0])))
            readers = [item for item in group if item.dep.handler in CONSUMER_HANDLERS]
            if len(readers) != 1 or list(readers[0].idxs) != list(range(layer.weight.shape[0])):
                raise ValueError(f"{name} has {len(readers)} readers, or one that mixes its channels up")
            found[name] = names[readers[0].dep.target.module]
        return found

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
        # Mutable defaults there
        fresh: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
        return tp.pruner.BasePruner(self.model, self.example, scores, ignored_layers=ignored, **options, **fresh)


def scale_widths(widths: Mapping[str, int], ratio: float) -> dict[str, int]:
    """What is left of each width when the same share goes everywhere.

    Of layers of one width some are rounded up and some down, so that the multiply-adds follow the ratio closely:
    rounding all alike jumps by up to
    7 % on ResNet-56.
    """
    turn: dict[int, int] = {}
    kept = {}
    for name, width in widths.items():
        turn[width] = turn.get(width, 0) + 1
        kept[name] = max(1, min(width, int(width * (1 - ratio) + turn[width] * GOLDEN_RATIO % 1)))
    return kept


def inner_layers(model: nn.Module, example: Tensor, ignored: Sequence[str]) -> list[str]:
    """Layers that alone write channels which one layer alone reads: widths inside of blocks, no residual stream."""
    names = {module: name for name, module in model.named_modules()}
    graph = tp.DependencyGraph().build_dependency(model, example)
    found = []
    for group in graph.get_all_groups(ignored_layers=[model.get_submodule(name) for name in ignored]):
        handlers = [item.dep.handler for item in group]
        if sum(h in PRODUCER_HANDLERS for h in handlers) == 1 and sum(h in CONSUMER_HANDLERS for h in handlers) == 1:
            found.append(next(names[item.dep.target.module] for item in group if item.dep.handler in PRODUCER_HANDLERS))
    order = list(names.values())
    return sorted(found, key=order.index)


def _is_depthwise(layer: nn.Module) -> bool:
    """Goes with what writes its channels."""
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.groups == layer.out_channels


def _output_pruning_function(layer: nn.Module) -> Any:
    return tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
