"""What can be tapped in a network: every layer with the shape that it emits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from knowiso_train.errors import LayoutError
from knowiso_train.features import describe, named_layers, undisturbed


@dataclass(frozen=True)
class LayerLine:
    """One layer: its name, its class, what it emits, and why it could not be measured where that is so."""

    name: str
    kind: str
    channels: int | None
    grid: tuple[int, int] | None
    note: str = ""

    @property
    def depth(self) -> int:
        """Number of dotted segments."""
        return self.name.count(".") + 1


def outline(model: nn.Module, images: Tensor) -> list[LayerLine]:
    """Every layer with the shape that it emits for these images.

    Args:
        model: the network; its mode is as before when this returns.
        images: a small batch, at least two so that the batch axis can be told from others.

    Example:
        >>> [(line.name, line.channels, line.grid) for line in outline(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), torch.rand(2, 3, 6, 6))]
        [('0', 8, (4, 4)), ('1', 128, None)]
    """
    layers = named_layers(model)
    emitted: dict[str, list[Any]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_hook(lambda module, inputs, output, name=name: emitted[name].append(_sized(output))) for name, layer in layers.items()
    ]
    try:
        with undisturbed(model), torch.no_grad():
            model.eval()
            model(images)
            return [_line(name, layer, emitted[name], model, images) for name, layer in layers.items()]
    finally:
        for handle in handles:
            handle.remove()


def _sized(output: Any) -> Any:
    """Shape and dtype are all that is asked of a tensor, so its memory is not kept."""
    return torch.empty(output.shape, dtype=output.dtype, device="meta") if isinstance(output, Tensor) else output.__class__.__name__


def _line(name: str, layer: nn.Module, emitted: list[Any], model: nn.Module, images: Tensor) -> LayerLine:
    kind = type(layer).__name__
    if not emitted:
        return LayerLine(name, kind, None, None, "did not run")
    output = emitted[0]
    if not isinstance(output, Tensor):
        return LayerLine(name, kind, None, None, f"emits a {output}, not a tensor")
    if output.ndim == 0 or len(output) != len(images):
        return LayerLine(name, kind, None, None, f"shape {tuple(output.shape)}: the first axis is not the images")
    try:
        spec = describe(name, model, output, input_size=(images.shape[2], images.shape[3]))
    except LayoutError:
        return LayerLine(name, kind, None, None, f"shape {tuple(output.shape)}: say which with layout=")
    return LayerLine(name, kind, spec.channels, spec.grid, f"runs {len(emitted)} times" if len(emitted) > 1 else "")
