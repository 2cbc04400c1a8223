"""One unlabelled pass: second moments of what every layer reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from knowiso_train.errors import DataError, NonFiniteError
from knowiso_train.features import called_on, device_of, inputs_of, select, to_device, undisturbed
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
    device = device_of(model)
    found = InputMoments(layers, max_images, rows, merged, seed)
    with found, undisturbed(model), torch.no_grad(), tqdm(total=max_images, desc="moments", unit="image", disable=not progress) as bar:
        for batch in loader:
            images = inputs_of(batch)
            size = min(len(images), max_images - found.seen)
            batch = to_device(batch if size == len(images) else select(batch, torch.arange(size)), device or images.device)
            with found.batch(size):
                forward(model, batch) if forward is not None else model(inputs_of(batch))
            bar.update(size)
            if found.seen >= max_images:
                break
    return found.moments()


class InputMoments:
    """What `input_moments` gathers in a pass, for any pass: hooks while it is entered, and each batch within `batch`.

    Args:
        layers: by name.
        images: of these, the first ones of the pass, rows are taken.
        rows: to draw per regressor.
        merged: as for `input_moments`.
        seed: of the positions.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1))
        >>> with InputMoments({"2": model[2]}, images=6, rows=100) as found, found.batch(8):
        ...     _ = model(torch.randn(8, 3, 6, 6))
        >>> int(found.moments()["2"].moments.count)  # 16 positions of six images
        96
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], images: int, rows: int = ROWS, merged: Mapping[str, Tensor] | None = None, seed: int = 0
    ) -> None:
        self.layers, self.images, self.rows, self.merged = layers, images, rows, merged or {}
        self.seen = 0
        self._wanted = {name: len(self.merged[name]) if name in self.merged else columns_of(layer) for name, layer in layers.items()}
        self._sums: dict[str, RowSums] = {}
        self._positions: dict[str, float] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._handles: list[Any] = []
        self._size = 0
        self._quietly: Callable[[], AbstractContextManager[None]] = nullcontext

    def __enter__(self) -> InputMoments:
        self._handles = [layer.register_forward_hook(partial(self._reading, name), with_kwargs=True) for name, layer in self.layers.items()]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def batch(self, size: int, quietly: Callable[[], AbstractContextManager[None]] = nullcontext) -> Iterator[None]:
        """While a batch of so many images passes; `quietly` is entered while something is gathered."""
        self._size, self._quietly = size, quietly
        yield
        self.seen += size

    def moments(self) -> dict[str, LayerInput]:
        """Of every layer.

        Raises:
            DataError: no images, or a layer that never ran.
        """
        missing = [name for name in self.layers if name not in self._sums]
        if not self.seen or missing:
            raise DataError(
                f"{self.seen} images were seen, and these layers never ran: {missing}. Give a loader with images, and layers that they reach."
            )
        return {name: LayerInput(found.moments(), self._positions[name]) for name, found in self._sums.items()}

    def _reading(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        left = min(self._size, self.images - self.seen)
        if left > 0:
            with self._quietly():
                self._positions[name] = output.numel() / (self._size * len(layer.weight))  # type: ignore[arg-type]
                x = called_on(args, kwargs).detach()
                self._gather(name, layer, x[: len(x) * left // self._size], left)

    def _gather(self, name: str, layer: nn.Module, x: Tensor, left: int) -> None:
        found = input_rows(layer, x, math.ceil(self.rows * self._wanted[name] * left / self.images), self._generator)
        if name in self.merged:
            found = found[:, self.merged[name].to(found.device)].transpose(1, 2).flatten(0, 1)
        try:
            self._sums.setdefault(name, RowSums()).add(found.cpu() if found.device.type == "mps" else found)  # which has no float64
        except NonFiniteError as error:
            raise NonFiniteError(f"layer {name!r} reads NaN or Inf after {self.seen} images") from error
