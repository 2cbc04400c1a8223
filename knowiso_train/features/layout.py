"""Layouts of features, and their conversion to (N, C, H, W)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from knowiso_train.errors import LayoutError, ShapeError
from knowiso_train.features._tokens import TokenGrid, parse_tokens, token_grid
from knowiso_train.features.modules import named_layers, resolve_layers
from knowiso_train.features.wrappers import plain_class, unwrap_model

Layout = Literal["nchw", "nhwc", "nlc", "ncl", "nc"]
_NDIM: dict[Layout, int] = {"nchw": 4, "nhwc": 4, "nlc": 3, "ncl": 3, "nc": 2}
_CHANNEL_AXIS: dict[Layout, int] = {"nchw": 1, "nhwc": 3, "nlc": 2, "ncl": 1, "nc": 1}

Axis = Literal[1, -1]
# NCHW only
_POOLS = (
    nn.AvgPool2d,
    nn.MaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
)


@dataclass(frozen=True)
class FeatureSpec:
    """Layout of a hooked layer's tensor.

    Attributes:
        layout: Order of the axes.
        channels: Size of the channel axis.
        grid: (height, width) of the positions. None: vectors, or a sequence, which is a line (1, length).
        prefix_tokens: Number of class, distillation and register tokens before the patches, which are left out.
        suffix_tokens: Number of tokens after the patches, such as detection tokens, which are left out.
    """

    layout: Layout
    channels: int
    grid: tuple[int, int] | None = None
    prefix_tokens: int = 0
    suffix_tokens: int = 0

    @property
    def is_line(self) -> bool:
        """True for a sequence, whose positions are a line."""
        return self.layout in ("nlc", "ncl") and self.grid is None

    def to_nchw(self, tensor: Tensor) -> Tensor:
        """Convert a tensor to (N, C, H, W); a view where possible.

        Raises:
            ShapeError: Other channels or positions than described.
            LayoutError: Another number of axes.
        """
        feature = to_nchw(
            tensor, self.layout, prefix_tokens=self.prefix_tokens, suffix_tokens=self.suffix_tokens, grid=self.grid
        )
        if feature.shape[1] != self.channels or (self.grid is not None and feature.shape[2:] != self.grid):
            raise ShapeError(
                f"expected {self.channels} channels on a grid of {self.grid}, "
                f"got shape {tuple(tensor.shape)} in layout {self.layout!r}"
            )
        return feature

    def from_nchw(self, feature: Tensor, like: Tensor) -> Tensor:
        """Lay a feature back into the layer's own layout; the inverse of `to_nchw`.

        Args:
            feature: (N, C, H, W).
            like: Tensor of the layer, which gives the dtype, the device, and the prefix and suffix tokens. A quantized
                tensor also gives scale and zero point.

        Returns:
            A new tensor of the shape of `like`.

        Raises:
            ShapeError: Other images, channels or positions than those of `like`.

        Examples:
            >>> spec = FeatureSpec("nlc", 8, (4, 4), prefix_tokens=1)
            >>> tokens = torch.randn(2, 17, 8)
            >>> torch.equal(spec.from_nchw(spec.to_nchw(tokens), tokens), tokens)
            True
        """
        if like.is_quantized:
            plain = self.from_nchw(feature, like.dequantize())
            return torch.quantize_per_tensor(plain, like.q_scale(), like.q_zero_point(), like.dtype)
        expected = self.to_nchw(like)
        if feature.shape != expected.shape:
            raise ShapeError(
                f"expected a feature of shape {tuple(expected.shape)} for this layer, got {tuple(feature.shape)}"
            )
        tensor = like.clone()
        # `to_nchw` of tokens may copy; a slice of the clone is always a view
        if self.layout in ("nlc", "ncl"):
            rows = tensor.transpose(1, 2) if self.layout == "nlc" else tensor
            count = feature.shape[2] * feature.shape[3]
            rows[:, :, self.prefix_tokens : self.prefix_tokens + count] = feature.flatten(2).to(like)
        else:
            self.to_nchw(tensor).copy_(feature)
        return tensor


def to_nchw(
    tensor: Tensor,
    layout: Layout,
    *,
    prefix_tokens: int = 0,
    suffix_tokens: int = 0,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Convert a feature to (N, C, H, W); a view where possible.

    Args:
        tensor: (N, C, H, W), (N, H, W, C), (N, T, C), (N, C, T) or (N, C) according to `layout`.
        layout: "nchw", "nhwc", "nlc", "ncl" or "nc".
        prefix_tokens: Number of tokens before the patches, which are left out.
        suffix_tokens: Number of tokens after the patches, which are left out.
        grid: (height, width) of the other tokens in row-major order. None: a line, (1, T).

    Returns:
        (N, C, H, W). A vector has one position, (N, C, 1, 1).

    Raises:
        LayoutError: A layout with another number of axes.
        ShapeError: Tokens between prefix and suffix that do not fill the grid.

    Examples:
        >>> to_nchw(torch.zeros(2, 17, 8), "nlc", prefix_tokens=1, grid=(4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """
    _check(layout, tensor, "the feature")
    if layout == "nchw":
        return tensor
    if layout == "nhwc":
        return tensor.permute(0, 3, 1, 2)
    if layout == "nc":
        return tensor[:, :, None, None]
    rows = tensor.transpose(1, 2) if layout == "nlc" else tensor
    rows = rows[:, :, prefix_tokens : max(prefix_tokens, rows.shape[2] - suffix_tokens)]
    height, width = grid or (1, rows.shape[2])
    if not rows.shape[2] or height * width != rows.shape[2]:
        suffix = f" and {suffix_tokens} suffix tokens" if suffix_tokens else ""
        raise ShapeError(
            f"expected {prefix_tokens} prefix tokens and {height} × {width} patches{suffix} in layout {layout!r}, "
            f"got shape {tuple(tensor.shape)}"
        )
    return rows.reshape(*rows.shape[:2], height, width)


def describe_feature(
    name: str,
    model: nn.Module,
    tensor: Tensor,
    layout: str | None = None,
    *,
    at: Literal["input", "output"] = "output",
    input_size: tuple[int, int] | None = None,
) -> FeatureSpec:
    """Determine the channels, grid and layout of a hooked layer.

    Args:
        name: Name of the layer without wrapper prefixes.
        model: Network, wrapped or not.
        tensor: Captured tensor of the layer.
        layout: Layout of the tensor. None: inferred, see `infer_layout`. For tokens it can state prefix tokens, grid
            and suffix tokens, such as "nlc:1+14x14", "nlc:1+14x14+100" or "nlc:line".
        at: Side of the layer that the tensor was captured at.
        input_size: (height, width) of the network's input, which identifies oblong grids. None: unknown.

    Raises:
        LayoutError: A layout that cannot be inferred, or does not fit the tensor.
        LayerNameError: No such layer.

    Examples:
        >>> describe_feature("0", nn.Sequential(nn.Conv2d(3, 8, 3)), torch.zeros(1, 8, 6, 6))
        FeatureSpec(layout='nchw', channels=8, grid=(6, 6), prefix_tokens=0, suffix_tokens=0)
    """
    (name,) = resolve_layers(model, name)
    tokens: TokenGrid | None = None
    if layout is None:
        chosen = infer_layout(name, named_layers(model)[name], tensor, model, at=at, input_size=input_size)
    else:
        chosen, tokens = _parse_layout(layout)
        _check(chosen, tensor, f"layer {name!r}")
    channels = tensor.shape[_CHANNEL_AXIS[chosen]]
    if chosen == "nc":
        return FeatureSpec(chosen, channels)
    if chosen in ("nchw", "nhwc"):
        height, width = tensor.shape[2:] if chosen == "nchw" else tensor.shape[1:3]
        return FeatureSpec(chosen, channels, (height, width))
    if tokens is None:
        count = tensor.shape[1 if chosen == "nlc" else 2]
        tokens = token_grid(name, _parents(name, model), count, input_size)
    return FeatureSpec(chosen, channels, tokens.grid, tokens.prefix, tokens.suffix)


def _parse_layout(layout: str) -> tuple[Layout, TokenGrid | None]:
    """Return the order of the axes, and the tokens if the layout states them after a colon."""
    axes, _, tokens = layout.partition(":") if isinstance(layout, str) else (layout, "", "")
    if not tokens:
        return cast(Layout, axes), None
    if axes not in ("nlc", "ncl"):
        raise LayoutError(f"tokens can be stated for layouts 'nlc' and 'ncl' alone, got {layout!r}")
    return cast(Layout, axes), parse_tokens(tokens)


def infer_layout(
    name: str,
    module: nn.Module,
    tensor: Tensor,
    model: nn.Module,
    *,
    at: Literal["input", "output"] = "output",
    input_size: tuple[int, int] | None = None,
) -> Layout:
    """Infer the layout of a feature from its shape and from the modules that produce it.

    Two axes are a vector. Three are tokens (N, T, C), unless the modules have their channels on axis 1. Four axes are
    decided by these rules, in order:

    1. Convolutions, batch norms and pooling to one position output NCHW.
    2. timm's `output_fmt` of the module itself is trusted.
    3. The positions are the two neighboring axes that are equal, or that have the aspect ratio of an oblong
       `input_size`. The modules determine the channel axis (see `channel_axis`). Either may decide alone.
    4. `output_fmt` of a containing module.

    Raises:
        LayoutError: Shape and modules contradict each other, neither decides, or the tensor has 1 or more than 4 axes.

    Examples:
        >>> block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        >>> infer_layout("0", block, torch.zeros(1, 5, 7, 8), nn.Sequential(block))
        'nhwc'
    """
    shape = tuple(tensor.shape)
    stated = getattr(module, "output_fmt", None) if at == "output" else None
    if len(shape) == 2:
        return "nc"
    if len(shape) == 3:
        return _stated(stated, 3) or _sequence(module, shape, at)
    if len(shape) != 4:
        raise LayoutError(
            f"layer {name!r} has shape {shape}; expected 2 axes (vectors), 3 (tokens) or 4 (maps). Tap another layer."
        )
    if (known := known_channels(module)) is not None and known.axis == 1:
        return "nchw"
    # Pooled to one position, often inside a head of linear layers.
    if shape[2] == shape[3] == 1 < shape[1]:
        return "nchw"
    if (own := _stated(stated, 4)) is not None:
        return own
    by_shape = _layout_from_shape(shape, input_size)
    parents = _parents(name, model)
    axis = channel_axis(module, shape, given=at == "output", parents=parents)
    by_modules: Layout | None = None if axis is None else ("nchw" if axis == 1 else "nhwc")
    if by_shape and by_modules and by_shape != by_modules:
        raise LayoutError(
            f"layer {name!r}: its shape {shape} implies {by_shape!r}, its modules imply {by_modules!r}. Pass layout=."
        )
    around = next((fmt for parent in parents if (fmt := getattr(parent, "output_fmt", None)) is not None), None)
    found = by_shape or by_modules or _stated(around, 4)
    if found is None:
        raise LayoutError(
            f"layer {name!r}: neither its shape {shape} nor its modules distinguish NCHW from NHWC. "
            "Pass layout='nchw' or layout='nhwc'."
        )
    return found


def _check(layout: str, tensor: Tensor, what: str) -> None:
    axes = _NDIM.get(cast(Layout, layout))
    if axes is None:
        raise LayoutError(f"layout must be one of {tuple(_NDIM)}, got {layout!r}")
    if tensor.ndim != axes:
        raise LayoutError(f"layout {layout!r} needs {axes} axes, but {what} has shape {tuple(tensor.shape)}")


def _layout_from_shape(shape: tuple[int, ...], input_size: tuple[int, int] | None) -> Layout | None:
    nchw, nhwc = _positions(shape[2:], input_size), _positions(shape[1:3], input_size)
    if nchw == nhwc:
        return None
    return "nchw" if nchw else "nhwc"


def _positions(axes: tuple[int, ...], input_size: tuple[int, int] | None) -> bool:
    """Return True if two axes can be height and width."""
    height, width = axes
    if input_size is None or input_size[0] == input_size[1]:
        return height == width
    of_height, of_width = input_size
    # h = H/s ± 1 and w = W/s ± 1 for a common stride s, hence |hW − wH| < H + W.
    return abs(height * of_width - width * of_height) < of_height + of_width


def _sequence(module: nn.Module, shape: Sequence[int], at: str) -> Layout:
    if (known := known_channels(module)) is not None:
        return "ncl" if known.axis == 1 else "nlc"
    inside = list(modules_with_known_channels(module))
    count = (inside[-1].given if at == "output" else inside[0].taken) if inside else None
    return "ncl" if count == shape[1] and count != shape[2] else "nlc"


def _stated(fmt: Any, ndim: int) -> Layout | None:
    """Return the layout that timm's `output_fmt` states, an enum or a string; None if the number of axes differs."""
    word = str(getattr(fmt, "value", fmt)).lower()
    return next((layout for layout, axes in _NDIM.items() if layout == word and axes == ndim), None)


def _parents(name: str, model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the modules that contain the layer, nearest first, the network last."""
    layers = named_layers(model)
    around = []
    while "." in name:
        name = name.rsplit(".", 1)[0]
        around.append(layers[name])
    return (*around, unwrap_model(model))


class ModuleChannels(NamedTuple):
    """Channel axis of a module type, and its numbers of input and output channels."""

    axis: Axis
    taken: int
    given: int


def known_channels(module: nn.Module) -> ModuleChannels | None:
    """Return the channels of a module whose type determines them; None for activations, containers and others."""
    if isinstance(module, _ConvNd):
        return ModuleChannels(1, module.in_channels, module.out_channels)
    if isinstance(module, nn.Linear):
        return ModuleChannels(-1, module.in_features, module.out_features)
    if isinstance(module, nn.GroupNorm):
        return ModuleChannels(1, module.num_channels, module.num_channels)
    kind, shape = type(module).__name__, getattr(module, "normalized_shape", None)
    # Layer and RMS norms. timm's `...Norm2d` classes inherit from them but normalize axis 1.
    if isinstance(shape, (tuple, list)) and len(shape) == 1:
        return ModuleChannels(1 if "2d" in kind else -1, shape[0], shape[0])
    width = getattr(module, "num_features", None)
    if isinstance(width, int) and (isinstance(module, _NormBase) or ("Norm" in kind and "2d" in kind)):
        return ModuleChannels(1, width, width)
    return None


def modules_with_known_channels(module: nn.Module) -> Iterator[ModuleChannels]:
    """Yield the channels of the outermost submodules with known channels, in order of registration."""
    known = known_channels(module)
    if known is not None:
        yield known
    else:
        for child in module.children():
            yield from modules_with_known_channels(child)


def channel_axis(
    module: nn.Module, shape: tuple[int, ...], *, given: bool, parents: tuple[nn.Module, ...] = ()
) -> Axis | None:
    """Determine the channel axis of a 4-D feature from the modules; None if they do not decide.

    A container is represented by its last leaf (the first for its input): by the axis with that leaf's number of
    channels, and if both or neither have it, by the common axis of all leaves. A module without leaves, such as an
    activation, has the axis of the layer before it in a `Sequential`, else of the nearest parent whose leaves agree.
    Otherwise the leaves registered before and after it decide, if they agree and the number of channels fits.
    """
    if (known := known_channels(module)) is not None:
        return known.axis
    if isinstance(module, _POOLS):
        return 1
    inside = list(modules_with_known_channels(module))
    if not inside:
        if parents and (before := _before(module, parents[0])) is not None:
            return before.axis
        for parent in parents:
            axes = {leaf.axis for leaf in modules_with_known_channels(parent)}
            if axes:
                return axes.pop() if len(axes) == 1 else _between(module, parent, shape)
        return None
    count = inside[-1].given if given else inside[0].taken
    fits: list[Axis] = [axis for axis in (1, -1) if shape[axis] == count]
    axes = {leaf.axis for leaf in inside}
    if len(axes) == 1:
        agreed = axes.pop()
        # A block that permutes or concatenates: only the shape can confirm the axis.
        return agreed if not fits or agreed in fits else None
    return fits[0] if len(fits) == 1 else None


def _before(module: nn.Module, parent: nn.Module) -> ModuleChannels | None:
    """Return the channels of the preceding module in a Sequential; None for other parents."""
    if not isinstance(parent, nn.Sequential) or plain_class(parent) is not nn.Sequential:
        return None
    children = list(parent)
    index = next((i for i, child in enumerate(children) if child is module), 0)
    return known_channels(children[index - 1]) if index else None


def _between(module: nn.Module, parent: nn.Module, shape: tuple[int, ...]) -> Axis | None:
    """Return the axis on which the modules registered before and after a module agree."""
    before: list[ModuleChannels] = []
    after: list[ModuleChannels] = []
    side = before
    for inner in parent.modules():
        if inner is module:
            side = after
        elif (known := known_channels(inner)) is not None:
            side.append(known)
    if not before or not after or before[-1].axis != after[0].axis or before[-1].given != shape[before[-1].axis]:
        return None
    return before[-1].axis
