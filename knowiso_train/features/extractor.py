"""Features of named layers in (N, C, H, W), and their alignment to one grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.errors import CaptureError, LayoutError, NonFiniteError, OptionError, ShapeError
from knowiso_train.features._memory import ActivationMemory
from knowiso_train.features.calls import call_model
from knowiso_train.features.hooks import FeatureTaps, Side
from knowiso_train.features.layer_options import options_of_layers
from knowiso_train.features.layout import FeatureSpec, describe_feature
from knowiso_train.features.state import check_materialized, device_of
from knowiso_train.utils.batch import get_inputs, image_size, replace_inputs, to_device


class Extractor:
    """Context manager that runs a network without gradient and returns finite features (N, C, H, W).

    Features are float32, or float64 for float64 layers. The mode and device of the network are not changed (see
    `preserve_state` and `on_device`); batches are moved to its device. The first batch determines the layout of each
    layer; later batches must have the same channels and grid.

    Args:
        model: Network, wrapped or not.
        layers: Names or globs.
        name: Role of the network in error messages, such as "source".
        at: "output", "input", or a mapping by layer name, as in `FeatureTaps`.
        layout: Layout of all layers, or a mapping by name or glob. None: inferred.
        transform: Function of the images (resolution, normalization), applied on the network's device.
        forward: Function `forward(model, batch)` that replaces `model(inputs)`, with the transformed batch.
        repeated: "error", "first" or "last" for layers that run more than once.
        autocast: Dtype of autocast around the network. None: no autocast.

    Raises:
        LayerNameError: A layer that does not exist.
        OptionError: An invalid option, or a network on the meta device.

    Examples:
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
        check_materialized(model)
        self.model = model
        self.name = name
        self.specs: dict[str, FeatureSpec] = {}
        self.steps = 0
        self._taps: FeatureTaps[Tensor] = FeatureTaps(model, layers, at=at, repeated=cast(Literal["error"], repeated))
        self._layouts = options_of_layers(layout, model, self._taps.names)
        self._transform = transform
        self._forward = forward
        self._autocast = autocast
        self._shapes: dict[str, torch.Size] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the hooked layers without wrapper prefixes."""
        return self._taps.names

    @property
    def repeated(self) -> str:
        """Choice for layers that run more than once: "error", "first" or "last"."""
        return self._taps.repeated

    def side(self, name: str) -> Side:
        """Return the side at which a layer is hooked, "input" or "output"."""
        return self._taps.side(name)

    @property
    def device(self) -> torch.device | None:
        """Device of the network's first parameter or buffer; None for a network without any."""
        return device_of(self.model)

    def run(self, batch: Any) -> dict[str, Tensor]:
        """Run the network on a batch and return its features by layer name.

        Raises:
            CaptureError: Outside the context, or a layer without exactly one floating tensor.
            LayoutError: A layout that cannot be inferred or does not fit.
            ShapeError: Other channels or another grid than before, or a first axis that is not the images.
            NonFiniteError: NaN or Inf.
            InputTypeError: A batch without recognizable images, and no `forward=`.
        """
        if not self._taps.attached:
            raise CaptureError(
                f"{self.name}: the hooks are off; use the Extractor as a context manager and call run() inside"
            )
        return self.run_prepared(self.prepare(batch))[0]

    def prepare(self, batch: Any) -> Any:
        """Return a batch on the network's device, with its images transformed."""
        if self.device is not None:
            batch = to_device(batch, self.device)
        if self._transform is not None:
            with torch.no_grad():
                batch = replace_inputs(batch, self._transform(get_inputs(batch)))
        return batch

    def run_prepared(self, batch: Any, model: nn.Module | None = None) -> tuple[dict[str, Tensor], Any]:
        """Run the network on a batch of `prepare`; return its features by layer name, and its output.

        Args:
            batch: Batch of `prepare`.
            model: The network without its wrappers. None: with them.
        """
        self._taps.clear()
        self.steps += 1
        images, size = None, None
        if self._forward is None:
            inputs = get_inputs(batch)
            images, size = len(inputs), image_size(inputs)
        output = self.call(batch, model)
        captured = self._taps.collect()
        features = {name: self._to_nchw(name, tensor, images, size) for name, tensor in captured.items()}
        self._check_finite(features)
        return features, output

    def call(self, batch: Any, model: nn.Module | None = None) -> Any:
        """Run the network without gradient and return its output; see `run_prepared` for the arguments."""
        model = self.model if model is None else model
        # Not inference_mode: tensors made in it cannot be saved for backward when a map is trained on them.
        # Hooks of a network that was compiled and run before do not fire in its compiled code
        with torch.no_grad(), self._autocasting(batch), torch.compiler.set_stance("force_eager"):
            return call_model(model, get_inputs(batch)) if self._forward is None else self._forward(model, batch)

    def discard(self) -> None:
        """Discard the captures of calls after the last `run`."""
        self._taps.clear()

    def run_within(self, batch: Any, limit: int) -> int:
        """Run the network on a batch within a memory limit, and return the bytes of its captured features.

        Args:
            batch: Batch as for `run`.
            limit: Largest number of bytes of activations, features included.

        Raises:
            CapacityError: Activations beyond the limit; the pass ends there.
        """
        memory = ActivationMemory(limit)
        try:
            with torch.no_grad(), memory:
                self.call(self.prepare(batch))
            return memory.live
        finally:
            self._taps.clear()

    def __enter__(self) -> Extractor:
        self._taps.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._taps.detach()

    def _autocasting(self, batch: Any) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast((self.device or get_inputs(batch).device).type, dtype=self._autocast)

    def _to_nchw(self, name: str, tensor: Tensor, images: int | None, size: tuple[int, int] | None) -> Tensor:
        tensor = tensor.dequantize() if tensor.is_quantized else tensor
        if not tensor.is_floating_point():
            raise CaptureError(
                f"{self.name}: layer {name!r} emitted {tensor.dtype}; a feature must be floating. Tap another layer."
            )
        if images is not None and tensor.ndim and len(tensor) != images:
            raise ShapeError(
                f"{self.name}: layer {name!r} emitted shape {tuple(tensor.shape)} for {images} images; "
                "the first axis must be the images. Tap a layer around it, such as the whole attention block."
            )
        if name not in self.specs:
            layout = self._layouts.get(name)
            self.specs[name] = describe_feature(
                name, self.model, tensor, layout, at=self._taps.side(name), input_size=size
            )
            self._shapes[name] = tensor.shape[1:]
        if tensor.shape[1:] != self._shapes[name]:
            raise ShapeError(
                f"{self.name}: layer {name!r} emitted {tuple(tensor.shape[1:])} per image at batch {self.steps}, "
                f"{tuple(self._shapes[name])} before; "
                "channels and grid must stay the same. Resize the images with transform=."
            )
        feature = self.specs[name].to_nchw(tensor)
        return feature if feature.dtype == torch.float64 else feature.float()

    def _check_finite(self, features: Mapping[str, Tensor]) -> None:
        finite = torch.stack([feature.isfinite().all().cpu() for feature in features.values()]).tolist()
        bad = [name for name, fine in zip(features, finite, strict=True) if not fine]
        if bad:
            where = features[bad[0]]
            raise NonFiniteError(
                f"{self.name}: NaN or Inf in layer {bad[0]!r}{f' and {len(bad) - 1} more' if bad[1:] else ''} "
                f"at batch {self.steps}: "
                f"{where.isnan().sum().item()} NaN and {where.isinf().sum().item()} Inf of {where.numel()} values. "
                "Check the images, the weights and the autocast dtype."
            )


def align(source: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample a source feature to the target's grid.

    Only the source is resampled, because resampling the target would change the variance that shares refer to. An axis
    with a finer source is average-pooled (adaptive), then an axis with a coarser source is interpolated linearly
    (`align_corners=False`). A single position is broadcast. Lines (1, L) are resampled along their length.

    Args:
        source: (N, C, H, W).
        grid: (height, width) of the target.

    Returns:
        (N, C, height, width), differentiable, in the source's dtype. The source itself if the grids are equal, a view
        of a single position.

    Raises:
        ShapeError: A source without four axes or without positions, or a grid that is not two positive sizes.

    Examples:
        >>> align(torch.randn(2, 8, 16, 4), (8, 8)).shape
        torch.Size([2, 8, 8, 8])
    """
    if source.ndim != 4 or 0 in source.shape[2:]:
        raise ShapeError(
            "expected a source feature of shape (N, C, H, W) with at least one position, "
            f"got {tuple(source.shape)}; see to_nchw"
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


def check_line(line: Tensor, other: Tensor, what: str) -> None:
    """Check that a line of positions can be aligned with the positions of another feature.

    Args:
        line: (N, C, 1, L).
        other: (N, D, H, W).
        what: Role and layer of the line, for the error message.

    Raises:
        LayoutError: A feature map, whose rows a line cannot have.
    """
    if line.shape[3] > 1 and other.shape[2] > 1:
        raise LayoutError(
            f"{what}: its {line.shape[3]} tokens form no grid, so they cannot be aligned with the other network's "
            f"{other.shape[2]} × {other.shape[3]} positions. State the tokens, such as layout='nlc:1+14x14', or pair a "
            "pooled layer"
        )


class FeatureReader:
    """Converter of one network's captured tensors to (N, C, H, W), with the layout inferred once per input size.

    Args:
        model: Network.
        names: Names of its hooked layers without wrapper prefixes.
        role: Role of the network in error messages.
        layout: Layout of all layers, or a mapping by name or glob. None: inferred.
        sides: Side of each layer that its tensors are captured at. Default: all outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        role: str,
        layout: str | Mapping[str, str] | None = None,
        sides: Mapping[str, Side] | None = None,
    ) -> None:
        self.names, self.role = tuple(names), role
        self.channels: dict[str, int] = {}
        # (height, width) in the last batch of layers (N, C, H, W) or (N, H, W, C); not of tokens and vectors
        self.grids: dict[str, tuple[int, int]] = {}
        # Layers whose positions were a line in the last batch.
        self.lines: set[str] = set()
        self.model, self._sides = model, sides or {}
        self._stated_layouts = options_of_layers(layout, model, self.names)
        self._layouts: dict[tuple[str, int], str] = {}
        self._specs: dict[tuple[str, torch.Size, tuple[int, int] | None], FeatureSpec] = {}

    def read(
        self, captured: Mapping[str, Tensor], images: int | None = None, size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Convert captured tensors to features by layer name, in the layer's dtype.

        Args:
            captured: Tensor of each layer.
            images: Number of images. None: unknown.
            size: (height, width) of the images. None: unknown.

        Raises:
            CaptureError: A feature that is not floating.
            ShapeError: Another number of images, or other channels than before.
            LayoutError: A layout that cannot be inferred.
        """
        return {name: self.read_layer(name, captured[name], images, size) for name in self.names}

    def read_layer(
        self, name: str, tensor: Tensor, images: int | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Convert the tensor of one layer; see `read`."""
        if not tensor.is_floating_point():
            raise CaptureError(
                f"{self.role}: layer {name!r} emitted {tensor.dtype}; a feature must be floating. Pair another layer."
            )
        if not tensor.ndim or (images is not None and len(tensor) != images):
            raise ShapeError(
                f"{self.role}: layer {name!r} emitted shape {tuple(tensor.shape)} for {images} images; "
                "the first axis must be the images. Pair a layer around it, such as the whole attention block."
            )
        key = (name, tensor.shape[1:], size)
        if key not in self._specs:
            # The layout of a layer does not change, but some shapes alone do not determine it.
            layout = self._stated_layouts.get(name) or self._layouts.get((name, tensor.ndim))
            at = self._sides.get(name, "output")
            spec = describe_feature(name, self.model, tensor, layout, at=at, input_size=size)
            if spec.channels != self.channels.setdefault(name, spec.channels):
                raise ShapeError(
                    f"{self.role}: layer {name!r} emitted {spec.channels} channels, {self.channels[name]} before. "
                    "Pass features of the same layer. Make a new IsomorphismLoss after a change of the network."
                )
            self._specs[key], self._layouts[name, tensor.ndim] = spec, spec.layout
        spec = self._specs[key]
        (self.lines.add if spec.is_line else self.lines.discard)(name)
        if spec.grid is not None and spec.layout in ("nchw", "nhwc"):
            self.grids[name] = spec.grid
        return spec.to_nchw(tensor)
