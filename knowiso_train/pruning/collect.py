"""One unlabelled pass: second moments of what every layer reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from knowiso_train.errors import DataError, NonFiniteError
from knowiso_train.features import device_of, inputs_of, select, to_device, undisturbed
from knowiso_train.pruning.products import RowSums
from knowiso_train.pruning.rows import columns_of, input_rows
from knowiso_train.statistics import Moments


@dataclass(frozen=True)
class LayerInput:
    """What one layer reads.

    Attributes:
        moments: of its input rows as the source.
        positions: at which it works for one image: H' · W' of a convolution, tokens of a linear layer.
    """

    moments: Moments
    positions: float


ROWS = 20  # per regressor; more rows of the same images move nothing


def input_moments(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Mapping[str, nn.Module],
    *,
    max_images: int = 512,
    rows: int = ROWS,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    merged: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, LayerInput]:
    """Moments of the input rows of linear layers and convolutions, with positions drawn at random; labels are never read.

    Args:
        model: the network; its mode and random state are as before afterwards, also after an error.
        loader: batches of images, see `knowiso_train.features.inputs_of`.
        layers: by name; linear layers and convolutions of one group.
        max_images: to look at.
        rows: to draw per regressor of a layer, over all images.
        forward: `forward(model, batch)` for networks that need more than images.
        merged: for layers with too many regressors, (J, m) regressors of each of J units: moments are then those of J regressors, over m times as
            many rows.
        seed: of the positions.
        progress: whether to show a bar.

    Raises:
        DataError: no images, or a layer that never ran.
        NonFiniteError: NaN or Inf in what a layer reads.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1))
        >>> found = input_moments(model, [torch.randn(8, 3, 6, 6)], {"2": model[2]}, progress=False)
        >>> found["2"].moments.xx.shape
        torch.Size([4, 4])
        >>> found["2"].positions
        16.0
    """
    merged = merged or {}
    wanted = {name: len(merged[name]) if name in merged else columns_of(layer) for name, layer in layers.items()}
    sums: dict[str, RowSums] = {}
    positions: dict[str, float] = {}
    generator, device = torch.Generator().manual_seed(seed), device_of(model)
    seen = 0

    def reading(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            x: Tensor = inputs[0].detach()
            positions[name] = output.numel() / (size * _width(layer))
            found = input_rows(layer, x, math.ceil(rows * wanted[name] * size / max_images), generator)
            if name in merged:
                found = found[:, merged[name].to(found.device)].transpose(1, 2).flatten(0, 1)
            try:
                sums.setdefault(name, RowSums()).add(found.cpu() if found.device.type == "mps" else found)  # which has no float64
            except NonFiniteError as error:
                raise NonFiniteError(f"layer {name!r} reads NaN or Inf after {seen} images") from error

        return hook

    handles = [layer.register_forward_hook(reading(name)) for name, layer in layers.items()]
    try:
        with undisturbed(model), torch.no_grad(), tqdm(total=max_images, desc="moments", unit="image", disable=not progress) as bar:
            for batch in loader:
                images = inputs_of(batch)
                size = min(len(images), max_images - seen)
                batch = to_device(batch if size == len(images) else select(batch, torch.arange(size)), device or images.device)
                forward(model, batch) if forward is not None else model(inputs_of(batch))
                seen += size
                bar.update(size)
                if seen >= max_images:
                    break
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in layers if name not in sums]
    if not seen or missing:
        raise DataError(f"{seen} images were seen, and these layers never ran: {missing}. Give a loader with images, and layers that they reach.")
    return {name: LayerInput(found.moments(), positions[name]) for name, found in sums.items()}


def _width(layer: nn.Module) -> int:
    weight: Any = layer.weight
    return len(weight)
