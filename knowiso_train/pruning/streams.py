"""Layers that emit the same tensor shape before and after pruning: the residual streams, at the ends of the blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.features import named_layers, undisturbed

NO_BLOCKS = (nn.Sequential, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)  # timm's norms hold an activation
FEATURE_AXES = 3  # (N, L, C) or more: a vector for each image is the output's business


def shared_layers(pruned: nn.Module, original: nn.Module, run: Callable[[nn.Module], Any]) -> list[str]:
    """Names of the blocks whose outputs can be compared entry by entry, in forward order.

    A block is a module with modules inside, no norm and no `Sequential`, that emits one map or sequence of one shape in both networks. A stage gives
    its blocks, and a transformer block stands for its attention: of nested ones the outermost is taken whose inner ones share a grid. Where there are
    none, as in a plain sequence of layers, the layers themselves.

    Args:
        pruned: the pruned network.
        original: the network before pruning.
        run: runs a network on a small batch.

    Returns:
        Names; empty where every width was cut, as in networks without residual streams.

    Example:
        >>> make = lambda width: nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, 4, 1), nn.ReLU())
        >>> shared_layers(make(2), make(8), lambda network: network(torch.zeros(1, 3, 5, 5)))
        ['2', '3']
    """
    of_pruned, of_original = _emitted(pruned, run), _emitted(original, run)
    shapes = {name: shape for name, (shape, _) in of_original.items() if name in of_pruned and of_pruned[name][0] == shape}
    layers = named_layers(original)
    blocks = [name for name in shapes if any(True for _ in layers[name].children())]
    distinct: dict[int, str] = {}  # a stage emits the tensor of its last block: the innermost module stands for it
    for name in sorted(blocks, key=lambda name: name.count("."), reverse=True):
        if not isinstance(layers[name], NO_BLOCKS):
            distinct.setdefault(of_original[name][1], name)
    found = set(distinct.values())
    for name in list(found):
        if len({shapes[inner][2:] for inner in found if inner.startswith(f"{name}.")}) > 1:
            found.discard(name)  # a backbone within a wrapper
    outermost = [name for name in shapes if name in found and not any(name.startswith(f"{other}.") for other in found)]
    return outermost or [name for name in shapes if name not in blocks]


def _emitted(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, tuple[torch.Size, int]]:
    """By layer, in forward order: shape and identity of the output, of layers that run once and emit one tensor."""
    seen: dict[str, list[Any]] = {}
    handles = [
        layer.register_forward_hook(lambda module, args, output, name=name: seen.setdefault(name, []).append(output))
        for name, layer in named_layers(model).items()
    ]
    try:
        with undisturbed(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    once = {name: outputs[0] for name, outputs in seen.items() if len(outputs) == 1}
    return {
        name: (output.shape, id(output))
        for name, output in once.items()
        if isinstance(output, Tensor) and output.is_floating_point() and output.ndim >= FEATURE_AXES
    }
