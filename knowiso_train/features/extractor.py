"""Features of named layers in (N, C, H, W), and their alignment to one grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.errors import CaptureError, NonFiniteError, OptionError, ShapeError
from knowiso_train.features.hooks import FeatureTaps, Side
from knowiso_train.features.layout import FeatureSpec, describe_feature
from knowiso_train.features.state import device_of
from knowiso_train.utils.batch import get_inputs, image_size, replace_inputs, to_device


class Extractor:
    """Runs one network, without gradient, and returns its features in one form: (N, C, H, W), finite, float32 (float64 where the layer emitted that).

    A context manager: the hooks are on within it. The network's mode and device are left alone (see `undisturbed` and
        `on_device`), and batches
    follow the network. The layout of every layer is settled by the first batch; later batches must have the same
    channels and grid, in any number.

    Args:
        model: the network, wrapped or not.
        layers: names or globs.
        name: of the network's role, for messages ("source").
        at: "output", "input", or by layer name, as in `FeatureTaps`.
        layout: of all layers, or by layer name (names of other networks are passed over); what is not given is
            inferred.
        transform: applied to the images before this network (resolution, normalization), on the network's device.
        forward: `forward(model, batch)` in place of `model(inputs)`; receives the whole batch, on the network's device,
            its images transformed.
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
            raise OptionError(
                f"repeated must be 'error', 'first' or 'last' where one feature per layer is needed, got {repeated!r}"
            )
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
            InputTypeError: a batch without recognizable images, and no `forward=`.
        """
        if not self._taps.attached:
            raise CaptureError(
                f"{self.name}: the hooks are off; use the Extractor as a context manager and call run() inside"
            )
        self._taps.clear()
        self.steps += 1
        # Not inference_mode: its tensors could not be saved for backward where a map is trained on them
        with torch.no_grad():
            images, size = self._call(batch)
            captured = self._taps.collect()
            features = {name: self._to_nchw(name, tensor, images, size) for name, tensor in captured.items()}
        self._check_finite(features)
        return features

    def __enter__(self) -> Extractor:
        self._taps.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._taps.detach()

    def _call(self, batch: Any) -> tuple[int | None, tuple[int, int] | None]:
        """Run the network; number and size of its images where it is called on images."""
        device = self.device
        if device is not None:
            batch = to_device(batch, device)
        if self._transform is not None:
            batch = replace_inputs(batch, self._transform(get_inputs(batch)))
        with self._autocasting(device, batch):
            if self._forward is not None:
                self._forward(self.model, batch)
                return None, None
            inputs = get_inputs(batch)
            self.model(inputs)
        return len(inputs), image_size(inputs)

    def _autocasting(self, device: torch.device | None, batch: Any) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast((device or get_inputs(batch).device).type, dtype=self._autocast)

    def _to_nchw(self, name: str, tensor: Tensor, images: int | None, size: tuple[int, int] | None) -> Tensor:
        if not tensor.is_floating_point():
            raise CaptureError(
                f"{self.name}: layer {name!r} emitted {tensor.dtype}; a feature must be floating. Tap another layer."
            )
        if images is not None and tensor.ndim and len(tensor) != images:
            raise ShapeError(
                f"{self.name}: layer {name!r} emitted shape {tuple(tensor.shape)} for {images} images; the first axis must be the images. "
                "Layers inside windowed attention, or with the batch on another axis, cannot be used: tap a layer around them."
            )
        if name not in self.specs:
            layout = self._layout.get(name) if isinstance(self._layout, Mapping) else self._layout
            self.specs[name] = describe_feature(
                name, self.model, tensor, layout, at=self._taps.side(name), input_size=size
            )
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


def align(source: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample a source feature to the target's grid.

    Only the source is ever resampled: the shares are shares of the target's variance, which resampling would change.
        Along an axis where the source
    is finer it is average-pooled (adaptive); where it is coarser it is interpolated linearly (`align_corners=False`).
    Where both occur, pooling comes
    first. A single position is broadcast.

    Args:
        source: (N, C, H, W).
        grid: (height, width) of the target.

    Returns:
        (N, C, height, width), differentiable, in the source's dtype; the source itself where the grids are equal, a
        view of a single position.

    Raises:
        ShapeError: a source without four axes or without positions, or a grid that is not two positive sizes.

    Example:
        >>> align(torch.randn(2, 8, 16, 4), (8, 8)).shape
        torch.Size([2, 8, 8, 8])
    """
    if source.ndim != 4 or 0 in source.shape[2:]:
        raise ShapeError(
            f"expected a source feature of shape (N, C, H, W) with at least one position, got {tuple(source.shape)}; see to_nchw"
        )
    if len(grid) != 2 or min(grid) < 1:
        raise ShapeError(f"expected a grid of two positive sizes (height, width), got {tuple(grid)}")
    height, width = source.shape[2:]
    if (height, width) == tuple(grid):
        return source
    if height == width == 1:
        return source.expand(-1, -1, *grid)
    pooled = min(height, grid[0]), min(width, grid[1])
    if pooled != (height, width):
        source = F.adaptive_avg_pool2d(source, pooled)
    if pooled != tuple(grid):
        source = F.interpolate(source, size=tuple(grid), mode="bilinear", align_corners=False)
    return source


class FeatureReader:
    """Layout of one network's layers, inferred once for every input size.

    Args:
        model: the network.
        names: bare names of its tapped layers.
        role: of the network, for messages.
        layout: of all layers or by name; inferred where it says nothing.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], role: str, layout: str | Mapping[str, str] | None = None
    ) -> None:
        self.names, self.role = tuple(names), role
        self.channels: dict[str, int] = {}
        self.without_grid: set[str] = set()  # layers whose tokens, when last read, had no known grid
        self._model, self.layout = model, layout
        self._layouts: dict[tuple[str, int], str] = {}
        self._specs: dict[tuple[str, torch.Size, tuple[int, int] | None], FeatureSpec] = {}

    def read(
        self, captured: Mapping[str, Tensor], images: int | None = None, size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
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

    def read_layer(
        self, name: str, tensor: Tensor, images: int | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Feature of one layer; as `read`."""
        if not tensor.is_floating_point():
            raise CaptureError(
                f"{self.role}: layer {name!r} emitted {tensor.dtype}; a feature must be floating. Pair another layer."
            )
        if not tensor.ndim or (images is not None and len(tensor) != images):
            raise ShapeError(
                f"{self.role}: layer {name!r} emitted shape {tuple(tensor.shape)} for {images} images; the first axis must be the images. "
                "Layers inside windowed attention, or with the batch on another axis, cannot be used: pair a layer around them."
            )
        key = (name, tensor.shape[1:], size)
        if key not in self._specs:
            layout = self.layout.get(name) if isinstance(self.layout, Mapping) else self.layout
            # A layer keeps its layout; one batch's shape may say less than another's
            layout = layout or self._layouts.get((name, tensor.ndim))
            spec = describe_feature(name, self._model, tensor, layout, input_size=size)
            if spec.channels != self.channels.setdefault(name, spec.channels):
                raise ShapeError(
                    f"{self.role}: layer {name!r} emitted {spec.channels} channels, {self.channels[name]} before. "
                    "Make a new IsomorphismLoss after the network's layers have changed."
                )
            self._specs[key], self._layouts[name, tensor.ndim] = spec, spec.layout
        spec = self._specs[key]
        (self.without_grid.add if spec.layout in ("nlc", "ncl") and spec.grid is None else self.without_grid.discard)(
            name
        )
        return spec.to_nchw(tensor)
