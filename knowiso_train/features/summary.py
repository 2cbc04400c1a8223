"""Stages and layers of a network with the sizes of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import LayoutError, ShapeError
from knowiso_train.features._tokens import stage_info
from knowiso_train.features.layout import describe_feature
from knowiso_train.features.modules import named_layers
from knowiso_train.features.recording import record_outputs
from knowiso_train.features.state import preserve_state


def named_stages(model: nn.Module) -> set[str]:
    """Return the last layers of the stages that timm lists in `feature_info`; empty for other networks."""
    return {stage["module"] for stage in stage_info(model) if "module" in stage}


def stage_grids(
    model: nn.Module, run: Callable[[], Any], input_size: tuple[int, int] | None = None
) -> dict[str, tuple[int, int]]:
    """Return the grid of every stage's last layer, in the network's order.

    Stages are those that timm lists. In other networks the last module on each grid ends a stage, among the outermost
    modules that output maps or tokens. Networks of transformers nest them in modules that output other objects.

    Args:
        model: Network.
        run: Function that runs it on a small batch.
        input_size: (height, width) of the network's input. None: unknown.

    Examples:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.Flatten())
        >>> stage_grids(network, lambda: network(torch.zeros(2, 3, 16, 16)))
        {'1': (8, 8), '2': (4, 4)}
    """
    layers, named = named_layers(model), named_stages(model)
    recorded = [name for name in layers if name in named] or list(layers)
    # A compiled network would not call hooks that are registered after its compilation.
    with (
        preserve_state(model),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        record_outputs({name: layers[name] for name in recorded}, _without_memory) as outputs,
    ):
        run()
    grids = {
        name: grid
        for name in (recorded if named else _outermost(recorded, outputs))
        # A module that is used more than once, such as a shared activation, ends no stage
        if len(emitted := outputs.get(name, [])) == 1
        and (grid := _grid(name, model, emitted[0], input_size)) is not None
    }
    return grids if named else {name: grid for grid, name in {grid: name for name, grid in grids.items()}.items()}


def _outermost(names: Sequence[str], outputs: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return the modules that output tensors, without those inside another one."""
    outermost: list[str] = []
    for name in names:  # a module comes before its children
        if any(isinstance(output, Tensor) for output in outputs.get(name, ())) and not any(
            name.startswith(f"{outer}.") for outer in outermost
        ):
            outermost.append(name)
    return outermost


def _grid(name: str, model: nn.Module, output: Any, input_size: tuple[int, int] | None) -> tuple[int, int] | None:
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim not in (3, 4):
        return None
    try:
        height, width = describe_feature(name, model, output, input_size=input_size).to_nchw(output).shape[2:]
    except (LayoutError, ShapeError):
        return None
    return (height, width) if height * width > 1 else None


@dataclass(frozen=True)
class LayerSummary:
    """Name, class, channels and grid of a layer, with a note if it cannot be measured."""

    name: str
    kind: str
    channels: int | None
    grid: tuple[int, int] | None
    note: str = ""

    @property
    def depth(self) -> int:
        """Number of dotted segments."""
        return self.name.count(".") + 1


def layer_summary(model: nn.Module, images: Tensor) -> list[LayerSummary]:
    """Run a network and return a summary of every layer.

    Args:
        model: Network. Its mode is not changed.
        images: (N, C, H, W) with N of at least 2, so that the batch axis differs from axes of size 1.

    Examples:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
        >>> [(line.name, line.channels, line.grid) for line in layer_summary(network, torch.rand(2, 3, 6, 6))]
        [('0', 8, (4, 4)), ('1', 128, None)]
    """
    layers = named_layers(model)
    with preserve_state(model), torch.no_grad(), record_outputs(layers, _without_memory) as outputs:
        model(images)
    return [_line(name, layer, outputs.get(name, []), model, images) for name, layer in layers.items()]


def _without_memory(output: Any) -> Any:
    """Return a tensor of the same shape and dtype without memory, or the class name of another value."""
    return (
        torch.empty(output.shape, dtype=output.dtype, device="meta")
        if isinstance(output, Tensor)
        else output.__class__.__name__
    )


def _line(name: str, layer: nn.Module, emitted: list[Any], model: nn.Module, images: Tensor) -> LayerSummary:
    kind = type(layer).__name__
    if not emitted:
        return LayerSummary(name, kind, None, None, "did not run")
    output = emitted[0]
    if not isinstance(output, Tensor):
        return LayerSummary(name, kind, None, None, f"emits a {output}, not a tensor")
    if output.ndim == 0 or len(output) != len(images):
        return LayerSummary(name, kind, None, None, f"shape {tuple(output.shape)}: the first axis is not the images")
    try:
        spec = describe_feature(name, model, output, input_size=(images.shape[2], images.shape[3]))
        grid = (1, spec.to_nchw(output).shape[3]) if spec.is_line else spec.grid
    except (LayoutError, ShapeError):
        return LayerSummary(name, kind, None, None, f"shape {tuple(output.shape)}: pass layout=")
    return LayerSummary(name, kind, spec.channels, grid, f"runs {len(emitted)} times" if len(emitted) > 1 else "")
