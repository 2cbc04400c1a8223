"""Calibration images, and second moments of the inputs of layers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from knowiso_train.errors import DataError, NonFiniteError, OptionError, ShapeError
from knowiso_train.features.hooks import call_input
from knowiso_train.features.state import device_of, preserve_state
from knowiso_train.ops.im2col import input_rows, num_input_features
from knowiso_train.regression.moments import Moments, RowSums
from knowiso_train.utils.batch import batch_size, check_loader, get_inputs, index_batch, to_device

Forward = Callable[[nn.Module, Any], Any]

SAMPLES_PER_FEATURE = 20  # per regressor; more rows of the same images move nothing


def check_counts(least: int = 1, **counts: Any) -> None:
    """Raises:
    OptionError: something that is no integer of at least that much.

    Example:
        >>> check_counts(rows=20, max_images=64)
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
            raise OptionError(f"{name} must be an integer >= {least}, got {value!r}")


class Calibration:
    """The first images of a loader, and how a network is called on them. Labels may be there; they are never read.

    Args:
        loader: batches of images, see `knowiso_train.features.inputs_of`.
        max_images: to take.
        device: for the images; None leaves them.
        forward: `forward(model, batch)` for networks that need more than images.

    Raises:
        DataError: a loader without images.
        InputTypeError: no loader.
        OptionError: fewer than one image.

    Example:
        >>> images = Calibration([torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)], max_images=5)
        >>> images.count, [len(batch) for batch in images]
        (5, [3, 2])
    """

    def __init__(
        self, loader: Iterable[Any], max_images: int = 1024, device: Any = None, forward: Forward | None = None
    ) -> None:
        check_counts(max_images=max_images)
        if torch.is_inference_mode_enabled():
            raise OptionError(
                "torch.inference_mode() is on, and what is made in it can be neither traced nor trained; call this outside of it"
            )
        check_loader(loader, again=False)
        # A C function, so that no frame of this module lies between the caller and the layers' hooks
        self.forward: Forward = operator.call if forward is None else forward
        self._batches: list[Any] = []
        self.count = 0
        for batch in loader:
            batch = get_inputs(batch) if forward is None else batch
            size = min(batch_size(batch), max_images - self.count)
            batch = batch if size == batch_size(batch) else index_batch(batch, torch.arange(size))
            self._batches.append(batch if device is None else to_device(batch, device))
            self.count += size
            if self.count >= max_images:
                break
        if not self.count:
            raise DataError("the loader gave no images; some hundred are needed, labels are not")

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def first(self, images: int) -> Any:
        """The first images, as one batch."""
        return _joined(self.slice(0, images)._batches)

    def split(self, share: float, most: int) -> tuple[Calibration, Calibration]:
        """The first images, and the last ones: at most this share of them and so many; all of them twice where they are too few to be parted.

        Example:
            >>> images = Calibration([torch.zeros(6, 1), torch.zeros(4, 1)])
            >>> [[part.count for part in images.split(share, 3)] for share in (0.25, 0.5, 0.05)]
            [[8, 2], [7, 3], [10, 10]]
        """
        last = min(most, int(share * self.count))
        if not last:
            return self, self
        return self.slice(0, self.count - last), self.slice(self.count - last, self.count)

    def slice(self, start: int, stop: int) -> Calibration:
        batches: list[Any] = []
        seen = 0
        for batch in self._batches:
            size = batch_size(batch)
            first, last = max(0, start - seen), min(size, stop - seen)
            if first < last:
                batches.append(batch if last - first == size else index_batch(batch, torch.arange(first, last)))
            seen += size
        return Calibration(batches, stop - start, None, self.forward)

    def batches(self, size: int) -> Iterator[Any]:
        """Every image, in batches of at most this size.

        Example:
            >>> [len(batch) for batch in Calibration([torch.zeros(3, 1), torch.zeros(4, 1)]).batches(5)]
            [5, 2]
        """
        for start in range(0, self.count, size):
            yield _joined(self.slice(start, min(start + size, self.count))._batches)

    def concatenate(self) -> Any:
        """Every image, as one batch."""
        return _joined(self._batches)


def _joined(batches: list[Any]) -> Any:
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Tensor):
        if not first.ndim:
            return first
        sizes = sorted({tuple(batch.shape[1:]) for batch in batches})
        if len(sizes) > 1:
            raise ShapeError(
                f"expected images of one size, got {' and '.join(map(str, sizes))}; resize or crop them in the loader"
            )
        return torch.cat(batches)
    if isinstance(first, Mapping):
        return {key: _joined([batch[key] for batch in batches]) for key in first}
    if isinstance(first, (tuple, list)):
        return [_joined(list(items)) for items in zip(*batches, strict=True)]
    return first


@dataclass(frozen=True)
class LayerInput:
    """What one layer reads.

    Attributes:
        moments: of its input rows as the source.
        positions: at which it works for one image: H' · W' of a convolution, tokens of a linear layer.
    """

    moments: Moments
    positions: float


def input_moments(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Mapping[str, nn.Module],
    *,
    max_images: int = 512,
    rows: int = SAMPLES_PER_FEATURE,
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
        merged: for layers with too many regressors, (J, m) regressors of each of J units: moments are then those of J
            regressors, over m times as
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
    with (
        found,
        preserve_state(model),
        torch.no_grad(),
        tqdm(total=max_images, desc="moments", unit="image", disable=not progress) as bar,
    ):
        for batch in loader:
            images = get_inputs(batch)
            size = min(len(images), max_images - found.seen)
            batch = to_device(
                batch if size == len(images) else index_batch(batch, torch.arange(size)), device or images.device
            )
            with found.batch(size):
                forward(model, batch) if forward is not None else model(get_inputs(batch))
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
        self,
        layers: Mapping[str, nn.Module],
        images: int,
        rows: int = SAMPLES_PER_FEATURE,
        merged: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.layers, self.images, self.rows, self.merged = layers, images, rows, merged or {}
        self.seen = 0
        self._wanted = {
            name: len(self.merged[name]) if name in self.merged else num_input_features(layer)
            for name, layer in layers.items()
        }
        self._sums: dict[str, RowSums] = {}
        self._positions: dict[str, float] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._handles: list[Any] = []
        self._size = 0
        self._quietly: Callable[[], AbstractContextManager[None]] = nullcontext

    def __enter__(self) -> InputMoments:
        self._handles = [
            layer.register_forward_hook(partial(self._reading, name), with_kwargs=True)
            for name, layer in self.layers.items()
        ]
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

    def _reading(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        left = min(self._size, self.images - self.seen)
        if left > 0:
            with self._quietly():
                self._positions[name] = output.numel() / (self._size * len(layer.weight))  # type: ignore[arg-type]
                x = call_input(args, kwargs).detach()
                self._gather(name, layer, x[: len(x) * left // self._size], left)

    def _gather(self, name: str, layer: nn.Module, x: Tensor, left: int) -> None:
        found = input_rows(layer, x, math.ceil(self.rows * self._wanted[name] * left / self.images), self._generator)
        if name in self.merged:
            found = found[:, self.merged[name].to(found.device)].transpose(1, 2).flatten(0, 1)
        try:
            # Which has no float64
            self._sums.setdefault(name, RowSums()).add(found.cpu() if found.device.type == "mps" else found)
        except NonFiniteError as error:
            raise NonFiniteError(f"layer {name!r} reads NaN or Inf after {self.seen} images") from error
