"""The ends of a network's stages: the layers that people pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import LayoutError
from knowiso_train.features.layout import describe
from knowiso_train.features.names import bare, named_layers
from knowiso_train.features.state import undisturbed


def named_stages(model: nn.Module) -> set[str]:
    """Layers that timm names as the ends of the network's stages (`feature_info`); empty where it names none."""
    info = getattr(bare(model), "feature_info", None)
    found: Any = info if isinstance(info, list) else getattr(info, "get_dicts", list)()
    return {item["module"] for item in found if isinstance(item, dict) and "module" in item}


def stage_grids(model: nn.Module, run: Callable[[], Any]) -> dict[str, tuple[int, int]]:
    """Grid of every stage's last layer, in the network's order.

    Stages are what timm names; in other networks, of the children of the network that emit maps or tokens, the last one on each grid.

    Args:
        model: the network.
        run: runs it on a small batch.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.Flatten())
        >>> stage_grids(network, lambda: network(torch.zeros(2, 3, 16, 16)))
        {'1': (8, 8), '2': (4, 4)}
    """
    layers, named = named_layers(model), named_stages(model)
    wanted = [name for name in layers if name in named] or [name for name in layers if "." not in name]
    emitted: dict[str, Any] = {}
    handles = [layers[name].register_forward_hook(lambda module, args, output, name=name: emitted.setdefault(name, output)) for name in wanted]
    try:
        with undisturbed(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            run()
    finally:
        for handle in handles:
            handle.remove()
    grids = {name: grid for name in wanted if (grid := _grid(name, model, emitted.get(name))) is not None}
    return grids if named else {name: grid for grid, name in {grid: name for name, grid in grids.items()}.items()}


def _grid(name: str, model: nn.Module, output: Any) -> tuple[int, int] | None:
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim not in (3, 4):
        return None
    try:
        grid = describe(name, model, output).grid
    except LayoutError:
        return None
    return grid if grid is not None and grid[0] * grid[1] > 1 else None
