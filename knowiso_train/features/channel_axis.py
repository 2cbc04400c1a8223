"""What a layer's modules say of the axis that holds its channels: 1 (convolutions, batch norms) or -1 (linear layers, layer norms)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

Axis = Literal[1, -1]

_POOLS = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle)  # NCHW only


class Channels(NamedTuple):
    """Channels that a module takes and gives, and the axis that its type fixes them to."""

    axis: Axis
    taken: int
    given: int


def known_channels(module: nn.Module) -> Channels | None:
    """Channels of a module whose type fixes them; None for activations, containers and the like."""
    if isinstance(module, _ConvNd):
        return Channels(1, module.in_channels, module.out_channels)
    if isinstance(module, nn.Linear):
        return Channels(-1, module.in_features, module.out_features)
    if isinstance(module, nn.GroupNorm):
        return Channels(1, module.num_channels, module.num_channels)
    kind, shape = type(module).__name__, getattr(module, "normalized_shape", None)
    if isinstance(shape, (tuple, list)) and len(shape) == 1:  # layer and RMS norms; timm's `...Norm2d` subclass them but normalise axis 1
        return Channels(1 if "2d" in kind else -1, shape[0], shape[0])
    width = getattr(module, "num_features", None)
    if isinstance(width, int) and (isinstance(module, _NormBase) or ("Norm" in kind and "2d" in kind)):
        return Channels(1, width, width)
    return None


def leaves(module: nn.Module) -> Iterator[Channels]:
    """Known channels inside a module in the order of registration; a module with known channels is not looked into."""
    known = known_channels(module)
    if known is not None:
        yield known
    else:
        for child in module.children():
            yield from leaves(child)


def channel_axis(module: nn.Module, shape: tuple[int, ...], *, given: bool, parents: tuple[nn.Module, ...] = ()) -> Axis | None:
    """The axis of a 4-D feature that the modules speak for, None where they do not decide.

    A container speaks through its last leaf (the first for its input): by the axis that has that leaf's channel count, and where both or neither
    have it, by the leaves' types if these agree. A module without leaves (an activation) takes the word of the layer right before it in a
    `Sequential`, else of the nearest parent whose leaves agree, else of the leaves registered right before and right after it, where these
    agree and the one before gives as many channels as that axis has.
    """
    if (known := known_channels(module)) is not None:
        return known.axis
    if isinstance(module, _POOLS):
        return 1
    inside = list(leaves(module))
    if not inside:
        if parents and (before := _before(module, parents[0])) is not None:
            return before.axis
        for parent in parents:
            axes = {leaf.axis for leaf in leaves(parent)}
            if axes:
                return axes.pop() if len(axes) == 1 else _between(module, parent, shape)
        return None
    count = inside[-1].given if given else inside[0].taken
    fits: list[Axis] = [axis for axis in (1, -1) if shape[axis] == count]
    axes = {leaf.axis for leaf in inside}
    if len(axes) == 1:
        agreed = axes.pop()
        return agreed if not fits or agreed in fits else None  # a block that permutes, or one that concatenates: the shape has to tell
    return fits[0] if len(fits) == 1 else None


def _before(module: nn.Module, parent: nn.Module) -> Channels | None:
    """What is known of the module that comes right before this one, where the order of calls is plain to see."""
    if type(parent) is not nn.Sequential:
        return None
    children = list(parent)
    index = next((i for i, child in enumerate(children) if child is module), 0)
    return known_channels(children[index - 1]) if index else None


def _between(module: nn.Module, parent: nn.Module, shape: tuple[int, ...]) -> Axis | None:
    """The axis that the neighbours of a module in the order of registration agree on."""
    before: list[Channels] = []
    after: list[Channels] = []
    side = before
    for inner in parent.modules():
        if inner is module:
            side = after
        elif (known := known_channels(inner)) is not None:
            side.append(known)
    if not before or not after or before[-1].axis != after[0].axis or before[-1].given != shape[before[-1].axis]:
        return None
    return before[-1].axis
