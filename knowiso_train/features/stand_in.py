"""The module whose hook sees a layer's tensor also where the layer itself is not called."""

from __future__ import annotations

from typing import Literal

from torch import nn


def stand_in(layer: nn.Module, side: Literal["input", "output"], root: nn.Module) -> nn.Module:
    """The last child of a plain `nn.Sequential` (the first for its input), which emits the same tensor; other layers stand for themselves.

    Networks call the children one by one where they checkpoint gradients, so that the container's own hooks never fire. A child that is used in
    several places, or a container with hooks of its own, which may change the tensor, is left as it is.

    Args:
        layer: the layer that is tapped.
        side: what is tapped of it.
        root: the network, bare.
    """
    used = [id(module) for _, module in root.named_modules(remove_duplicate=False)] if type(layer) is nn.Sequential else []
    while type(layer) is nn.Sequential and len(layer) and not layer._forward_hooks and not layer._forward_pre_hooks:
        child = layer[-1 if side == "output" else 0]
        if used.count(id(child)) != 1:
            break
        layer = child
    return layer
