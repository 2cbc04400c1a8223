"""One network run on batches: its features, layer by layer, as (N, C, H, W)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from knowiso_train.errors import CaptureError, NonFiniteError, OptionError, ShapeError
from knowiso_train.features.batches import image_size, inputs_of, to_device, with_inputs
from knowiso_train.features.layout import FeatureSpec, describe
from knowiso_train.features.placement import device_of
from knowiso_train.features.taps import FeatureTaps, Side


class Extractor:
    """Runs one network, without gradient, and returns its features in one form: (N, C, H, W), finite, float32 (float64 where the layer emitted that).

    A context manager: the hooks are on within it. The network's mode and device are left alone (see `undisturbed` and `on_device`), and batches
    follow the network. The layout of every layer is settled by the first batch; later batches must have the same channels and grid, in any number.

    Args:
        model: the network, wrapped or not.
        layers: names or globs.
        name: of the network's role, for messages ("source").
        at: "output", "input", or by layer name, as in `FeatureTaps`.
        layout: of all layers, or by layer name (names of other networks are passed over); what is not given is inferred.
        transform: applied to the images before this network (resolution, normalisation), on the network's device.
        forward: `forward(model, batch)` in place of `model(inputs)`; receives the whole batch, on the network's device, its images transformed.
        repeated: "error", "first" or "last", for layers that fire more than once.
        autocast: dtype for autocast around the network.

    Raises:
        LayerNameError: a layer that does not exist.
        OptionError: an option without meaning.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(4))
        >>> with Extractor(network, ["0", "2"]) as extractor:
        ...     features = extractor.run(torch.randn(2, 3, 8, 8))
        >>> [tuple(feature.shape) for feature in features.values()]
        [(2, 8, 6, 6), (2, 4, 1, 1)]
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str],
        *,
        name: str = "network",
        at: Side | Mapping[str, Side] = "output",
        layout: str | Mapping[str, str] | None = None,
        transform: Callable[[Any], Any] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        repeated: str = "error",
        autocast: torch.dtype | None = None,
    ) -> None:
        if repeated not in ("error", "first", "last"):
            raise OptionError(f"repeated must be 'error', 'first' or 'last' where one feature per layer is needed, got {repeated!r}")
        self.model = model
        self.name = name
        self.specs: dict[str, FeatureSpec] = {}
        self.steps = 0
        self._taps: FeatureTaps[Tensor] = FeatureTaps(model, layers, at=at, repeated=cast(Literal["error"], repeated))
        self._layout = layout
        self._transform = transform
        self._forward = forward
        self._autocast = autocast
        self._shapes: dict[str, torch.Size] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Bare names of the tapped layers."""
        return self._taps.names

    @property
    def device(self) -> torch.device | None:
        """Where the network's first parameter or buffer is; None for a network without any."""
        return device_of(self.model)

    def run(self, batch: Any) -> dict[str, Tensor]:
        """Features of one batch by layer name.

        Raises:
            CaptureError: outside the context, or a layer that did not give one floating tensor.
            LayoutError: a layout that cannot be inferred, or does not fit.
            ShapeError: other channels or another grid than before, or another number of images than the batch has.
            NonFiniteError: NaN or Inf.
            InputTypeError: a batch without recognisable images, and no `forward=`.
        """
        if not self._taps.attached:
            raise CaptureError(f"{self.name}: the hooks are off; use the Extractor as a context manager and call run() inside")
        self._taps.clear()
        self.steps += 1
        with torch.no_grad():  # not inference_mode: its tensors could not be saved for backward where a map is trained on them
            images, size = self._call(batch)
            captured = self._taps.collect()
            features = {name: self._to_nchw(name, tensor, images, size) for name, tensor in captured.items()}
        self._check_finite(features)
        return features

    def __enter__(self) -> Extractor:
        self._taps.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._taps.detach()

    def _call(self, batch: Any) -> tuple[int | None, tuple[int, int] | None]:
        """Run the network; number and size of its images where it is called on images."""
        device = self.device
        if device is not None:
            batch = to_device(batch, device)
        if self._transform is not None:
            batch = with_inputs(batch, self._transform(inputs_of(batch)))
        with self._autocasting(device, batch):
            if self._forward is not None:
                self._forward(self.model, batch)
                return None, None
            inputs = inputs_of(batch)
            self.model(inputs)
        return len(inputs), image_size(inputs)

    def _autocasting(self, device: torch.device | None, batch: Any) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast((device or inputs_of(batch).device).type, dtype=self._autocast)

    def _to_nchw(self, name: str, tensor: Tensor, images: int | None, size: tuple[int, int] | None) -> Tensor:
        if not tensor.is_floating_point():
            raise CaptureError(f"{self.name}: layer {name!r} emitted {tensor.dtype}; a feature must be floating. Tap another layer.")
        if images is not None and tensor.ndim and len(tensor) != images:
            raise ShapeError(
                f"{self.name}: layer {name!r} emitted shape {tuple(tensor.shape)} for {images} images; the first axis must be the images. "
                "Layers inside windowed attention, or with the batch on another axis, cannot be used: tap a layer around them."
            )
        if name not in self.specs:
            layout = self._layout.get(name) if isinstance(self._layout, Mapping) else self._layout
            self.specs[name] = describe(name, self.model, tensor, layout, at=self._taps.side(name), input_size=size)
            self._shapes[name] = tensor.shape[1:]
        if tensor.shape[1:] != self._shapes[name]:
            raise ShapeError(
                f"{self.name}: layer {name!r} emitted {tuple(tensor.shape[1:])} per image at batch {self.steps}, {tuple(self._shapes[name])} before; "
                "channels and grid must stay the same. Bring the images to one size with transform=."
            )
        feature = self.specs[name].to_nchw(tensor)
        return feature if feature.dtype == torch.float64 else feature.float()

    def _check_finite(self, features: Mapping[str, Tensor]) -> None:
        finite = torch.stack([feature.isfinite().all().cpu() for feature in features.values()]).tolist()
        bad = [name for name, fine in zip(features, finite, strict=True) if not fine]
        if bad:
            where = features[bad[0]]
            raise NonFiniteError(
                f"{self.name}: NaN or Inf in layer {bad[0]!r}{f' and {len(bad) - 1} more' if bad[1:] else ''} at batch {self.steps}: "
                f"{where.isnan().sum().item()} NaN and {where.isinf().sum().item()} Inf of {where.numel()} values. "
                "Check the images, the weights and the autocast dtype."
            )
