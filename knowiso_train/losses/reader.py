"""Captured features as (N, C, H, W), with their gradient, whatever the grid of the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from knowiso_train.errors import CaptureError, ShapeError
from knowiso_train.features import FeatureSpec, describe


class FeatureReader:
    """Layout of one network's layers, inferred once for every input size.

    Args:
        model: the network.
        names: bare names of its tapped layers.
        role: of the network, for messages.
        layout: of all layers or by name; inferred where it says nothing.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], role: str, layout: str | Mapping[str, str] | None = None) -> None:
        self.names, self.role = tuple(names), role
        self.channels: dict[str, int] = {}
        self.without_grid: set[str] = set()  # layers whose tokens, when last read, had no known grid
        self._model, self.layout = model, layout
        self._layouts: dict[tuple[str, int], str] = {}
        self._specs: dict[tuple[str, torch.Size, tuple[int, int] | None], FeatureSpec] = {}

    def read(self, captured: Mapping[str, Tensor], images: int | None = None, size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Features by layer name, in the layer's dtype.

        Args:
            captured: what each layer emitted.
            images: number of images, where known.
            size: (height, width) of the images, where known.

        Raises:
            CaptureError: a feature that is not floating.
            ShapeError: another number of images, or other channels than before.
            LayoutError: a layout that cannot be inferred.
        """
        return {name: self.read_layer(name, captured[name], images, size) for name in self.names}

    def read_layer(self, name: str, tensor: Tensor, images: int | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """Feature of one layer; as `read`."""
        if not tensor.is_floating_point():
            raise CaptureError(f"{self.role}: layer {name!r} emitted {tensor.dtype}; a feature must be floating. Pair another layer.")
        if not tensor.ndim or (images is not None and len(tensor) != images):
            raise ShapeError(
                f"{self.role}: layer {name!r} emitted shape {tuple(tensor.shape)} for {images} images; the first axis must be the images. "
                "Layers inside windowed attention, or with the batch on another axis, cannot be used: pair a layer around them."
            )
        key = (name, tensor.shape[1:], size)
        if key not in self._specs:
            layout = self.layout.get(name) if isinstance(self.layout, Mapping) else self.layout
            layout = layout or self._layouts.get((name, tensor.ndim))  # a layer keeps its layout; one batch's shape may say less than another's
            spec = describe(name, self._model, tensor, layout, input_size=size)
            if spec.channels != self.channels.setdefault(name, spec.channels):
                raise ShapeError(
                    f"{self.role}: layer {name!r} emitted {spec.channels} channels, {self.channels[name]} before. "
                    "Make a new IsomorphismLoss after the network's layers have changed."
                )
            self._specs[key], self._layouts[name, tensor.ndim] = spec, spec.layout
        spec = self._specs[key]
        (self.without_grid.add if spec.layout in ("nlc", "ncl") and spec.grid is None else self.without_grid.discard)(name)
        return spec.to_nchw(tensor)
