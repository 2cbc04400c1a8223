"""Where the rows of a regression are taken: the same random positions of every image in two networks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.errors import InputTypeError, ShapeError
from knowiso_train.pruning.rows import padding_of


def groups_of(layer: nn.Module) -> int:
    """Groups of a convolution, 1 for a linear layer.

    Raises:
        InputTypeError: another layer.

    Example:
        >>> groups_of(nn.Conv2d(4, 8, 3, groups=2)), groups_of(nn.Linear(2, 2))
        (2, 1)
    """
    if isinstance(layer, nn.Linear):
        return 1
    if isinstance(layer, nn.Conv2d):
        return layer.groups
    raise InputTypeError(f"expected nn.Linear or nn.Conv2d, got {type(layer).__name__}")


def grouped_weight(layer: nn.Module) -> Tensor:
    """(G, d, o): a layer's weight as one regression for each group; d runs over taps, then over the group's input channels.

    Example:
        >>> grouped_weight(nn.Conv2d(4, 6, 3, groups=2)).shape
        torch.Size([2, 18, 3])
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    groups = groups_of(layer)
    if weight.ndim == 2:
        return weight.T[None]
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1).permute(0, 3, 2, 1).flatten(1, 2)


def ungrouped_weight(layer: nn.Module, regression: Tensor) -> Tensor:
    """The inverse of `grouped_weight`, in the shape of the layer's weight.

    Example:
        >>> layer = nn.Conv2d(4, 6, (3, 1), groups=2)
        >>> torch.equal(ungrouped_weight(layer, grouped_weight(layer)), layer.weight)
        True
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if weight.ndim == 2:
        return regression[0].T
    groups, d, width = regression.shape
    return regression.view(groups, d // weight.shape[1], weight.shape[1], width).permute(0, 3, 2, 1).reshape(weight.shape)


@dataclass(frozen=True)
class Positions:
    """Random positions of every image.

    Attributes:
        index: (N, P), flat positions of a layer's output, in each image others.
    """

    index: Tensor

    @classmethod
    def draw(cls, images: int, places: int, rows: int, generator: torch.Generator) -> Positions:
        """Of `places` positions as many in each image as give `rows` altogether, at most all.

        Example:
            >>> Positions.draw(4, 100, 10, torch.Generator().manual_seed(0)).index.shape
            torch.Size([4, 3])
        """
        each = min(places, math.ceil(rows / images))
        if each == places:
            return cls(torch.arange(places).expand(images, -1))
        return cls(torch.rand(images, places, generator=generator).topk(each, sorted=False).indices)

    def part(self, start: int, stop: int) -> Positions:
        """Of some of the images."""
        return Positions(self.index[start:stop])

    def outputs(self, y: Tensor, *, conv: bool) -> Tensor:
        """(R, C): what a layer gives, (N, C, H, W) for a convolution and (…, C) for a linear layer, image after image.

        Raises:
            ShapeError: an output that does not hold these images and positions.
        """
        flat = y.flatten(2).transpose(1, 2) if conv else y.reshape(len(self.index), -1, y.shape[-1])
        if len(flat) != len(self.index) or int(self.index.max()) >= flat.shape[1]:
            raise ShapeError(f"an output of shape {tuple(y.shape)} does not hold {len(self.index)} images of the same size as before")
        at = self.index.to(y.device)
        return flat.gather(1, at[..., None].expand(-1, -1, flat.shape[2])).flatten(0, 1)

    def inputs(self, layer: nn.Module, x: Tensor) -> Tensor:
        """(R, G, d): what a layer reads, in the order of `grouped_weight`.

        Args:
            layer: nn.Linear, or nn.Conv2d of any kernel, stride, padding, dilation and groups.
            x: its input.

        Example:
            >>> layer, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), torch.randn(2, 4, 8, 8)
            >>> at = Positions.draw(2, 16, 6, torch.Generator().manual_seed(0))
            >>> found = torch.einsum("rgd,gdo->rgo", at.inputs(layer, x), grouped_weight(layer)).flatten(1) + layer.bias
            >>> torch.allclose(found, at.outputs(layer(x), conv=True), atol=1e-5)
            True
        """
        if not isinstance(layer, nn.Conv2d):
            return self.outputs(x, conv=False)[:, None]
        left, right, top, bottom = padding_of(layer, *x.shape[2:])
        if left + right + top + bottom:
            x = F.pad(x, (left, right, top, bottom), mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
        padded = x.permute(0, 2, 3, 1)
        (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
        width = (padded.shape[2] - dw * (kw - 1) - 1) // sw + 1
        at = self.index.to(x.device)
        image, line, column = torch.arange(len(x), device=x.device)[:, None], at // width * sh, at % width * sw
        taps = torch.stack([padded[image, line + i * dh, column + j * dw] for i in range(kh) for j in range(kw)], 2)  # (N, P, taps, C)
        images, each, count, channels = taps.shape
        return taps.view(images * each, count, layer.groups, channels // layer.groups).transpose(1, 2).flatten(2)
