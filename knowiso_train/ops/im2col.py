"""Rows of a regression from the inputs of convolutions and linear layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.errors import InputTypeError, ShapeError


def patch_rows(x: Tensor, kernel_size: int, positions: Tensor | None = None) -> Tensor:
    """Rows of k×k patches with zero padding; columns go by row of the patch, column of the patch, channel.

    That order lets every patch be copied in runs of C values. `conv_weight` brings a solution back to a convolution's
    order.

    Args:
        x: (N, C, H, W).
        kernel_size: odd k.
        positions: (N, P) indices into the H·W grid; all positions when None.

    Returns:
        (N · P, k² · C), P = H · W when `positions` is None; rows of one image are consecutive.

    Example:
        >>> patch_rows(torch.zeros(2, 3, 4, 5), 3).shape
        torch.Size([40, 27])
    """
    _, _, height, width = x.shape
    rows = x.permute(0, 2, 3, 1)
    if kernel_size > 1:
        margin = kernel_size // 2
        rows = F.pad(rows, (0, 0, margin, margin, margin, margin)).contiguous()
        rows = torch.cat(
            [rows[:, i : i + height, j : j + width] for i in range(kernel_size) for j in range(kernel_size)], dim=-1
        )
    rows = rows.flatten(1, 2)
    if positions is not None:
        rows = rows.gather(1, positions.unsqueeze(2).expand(-1, -1, rows.shape[2]))
    return rows.reshape(-1, rows.shape[2])


def conv_weight(weight: Tensor, kernel_size: int) -> Tensor:
    """(k² · C, C_out) regression weights in the order of `patch_rows` → a convolution's (C_out, C, k, k).

    Example:
        >>> conv_weight(torch.zeros(27, 5), 3).shape
        torch.Size([5, 3, 3, 3])
    """
    return weight.T.reshape(weight.shape[1], kernel_size, kernel_size, -1).permute(0, 3, 1, 2)


def num_input_features(layer: nn.Module) -> int:
    """d, the number of regressors of a layer: C · k_h · k_w, or the linear layer's inputs.

    Raises:
        InputTypeError: another layer than a linear one or a two-dimensional convolution of one group.

    Example:
        >>> num_input_features(nn.Conv2d(3, 8, 3))
        27
    """
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
    raise InputTypeError(f"expected nn.Linear or nn.Conv2d of one group, got {type(layer).__name__}")


def input_rows(layer: nn.Module, x: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """About `rows` rows of what the layer reads, in the order of `pruning.regression_weight`.

    Args:
        layer: nn.Conv2d of one group (any kernel, stride, padding, dilation) or nn.Linear.
        x: its input, (N, C, H, W), or (…, C) for a linear layer.
        rows: at most this many, rounded up to the same positions of every image; all, where there are fewer.
        generator: of the positions, on the CPU.

    Returns:
        (R, d).

    Raises:
        InputTypeError: another layer.
        ShapeError: an input that the layer cannot read.

    Example:
        >>> input_rows(nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.zeros(2, 3, 8, 8), 10, torch.Generator()).shape
        torch.Size([10, 27])
    """
    num_input_features(layer)
    if isinstance(layer, nn.Linear):
        flat = x.reshape(-1, x.shape[-1])
        return flat if len(flat) <= rows else flat[torch.randperm(len(flat), generator=generator)[:rows].to(x.device)]
    if not isinstance(layer, nn.Conv2d) or x.ndim != 4 or x.shape[1] != layer.in_channels:
        raise ShapeError(f"expected an input (N, C, H, W) of {layer}, got {tuple(x.shape)}")
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    left, right, top, bottom = conv_padding(layer, *x.shape[2:])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, (left, right, top, bottom), mode=mode) if left + right + top + bottom else x
    height, width = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1, (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    at = torch.randperm(height * width, generator=generator)[: math.ceil(rows / len(x))].to(x.device)
    lines, columns = at // width * sh, at % width * sw
    # Each (N, C, P)
    taps = [padded[:, :, lines + i * dh, columns + j * dw] for i in range(kh) for j in range(kw)]
    return torch.stack(taps, 1).permute(0, 3, 1, 2).flatten(2).flatten(0, 1)


def is_plain_linear_op(layer: nn.Module) -> bool:
    """Whether a layer gives `weight · what it reads`: linear layers, convolutions, and timm's with TensorFlow's padding.

    Subclasses with a forward pass of their own, such as those that standardize their weights, do something else.

    Example:
        >>> is_plain_linear_op(nn.Conv2d(2, 2, 1, groups=2)), is_plain_linear_op(nn.ReLU())
        (True, False)
    """
    if isinstance(layer, nn.Linear):
        return type(layer).forward is nn.Linear.forward
    return isinstance(layer, nn.Conv2d) and (type(layer).forward is nn.Conv2d.forward or _pads_itself(layer))


def conv_padding(layer: nn.Conv2d, height: int, width: int) -> tuple[int, int, int, int]:
    """Left, right, top, bottom, for an input of this size.

    Example:
        >>> conv_padding(nn.Conv2d(1, 1, 4, padding="same"), 8, 8)
        (1, 2, 1, 2)
    """
    if _pads_itself(layer):  # as many outputs as strides fit into the input
        sizes = zip((height, width), layer.kernel_size, layer.stride, layer.dilation, strict=True)
        over = [
            max((-(-size // stride) - 1) * stride + dilation * (k - 1) + 1 - size, 0)
            for size, k, stride, dilation in sizes
        ]
    elif layer.padding == "valid":
        return 0, 0, 0, 0
    elif layer.padding == "same":
        over = [dilation * (k - 1) for dilation, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    else:
        vertical, horizontal = (int(p) for p in layer.padding)
        return horizontal, horizontal, vertical, vertical
    return over[1] // 2, over[1] - over[1] // 2, over[0] // 2, over[0] - over[0] // 2


def _pads_itself(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv2dSame"


def num_groups(layer: nn.Module) -> int:
    """Groups of a convolution, 1 for a linear layer.

    Raises:
        InputTypeError: another layer.

    Example:
        >>> num_groups(nn.Conv2d(4, 8, 3, groups=2)), num_groups(nn.Linear(2, 2))
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
    groups = num_groups(layer)
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
    return (
        regression.view(groups, d // weight.shape[1], weight.shape[1], width).permute(0, 3, 2, 1).reshape(weight.shape)
    )


@dataclass(frozen=True)
class SampledPositions:
    """Random positions of every image.

    Attributes:
        index: (N, P), flat positions of a layer's output, in each image others.
    """

    index: Tensor

    @classmethod
    def draw(cls, images: int, places: int, rows: int, generator: torch.Generator) -> SampledPositions:
        """Of `places` positions as many in each image as give `rows` altogether, at most all.

        Example:
            >>> SampledPositions.draw(4, 100, 10, torch.Generator().manual_seed(0)).index.shape
            torch.Size([4, 3])
        """
        each = min(places, math.ceil(rows / images))
        if each == places:
            return cls(torch.arange(places).expand(images, -1))
        return cls(torch.rand(images, places, generator=generator).topk(each, sorted=False).indices)

    def part(self, start: int, stop: int) -> SampledPositions:
        """Of some of the images."""
        return SampledPositions(self.index[start:stop])

    def outputs(self, y: Tensor, *, conv: bool) -> Tensor:
        """(R, C): what a layer gives, (N, C, H, W) for a convolution and (…, C) for a linear layer, image after image.

        Raises:
            ShapeError: an output that does not hold these images and positions.
        """
        flat = y.flatten(2).transpose(1, 2) if conv else y.reshape(len(self.index), -1, y.shape[-1])
        if len(flat) != len(self.index) or int(self.index.max()) >= flat.shape[1]:
            raise ShapeError(
                f"an output of shape {tuple(y.shape)} does not hold {len(self.index)} images of the same size as before"
            )
        at = self.index.to(y.device)
        return flat.gather(1, at[..., None].expand(-1, -1, flat.shape[2])).flatten(0, 1)

    def inputs(self, layer: nn.Module, x: Tensor) -> Tensor:
        """(R, G, d): what a layer reads, in the order of `grouped_weight`.

        Args:
            layer: nn.Linear, or nn.Conv2d of any kernel, stride, padding, dilation and groups.
            x: its input.

        Example:
            >>> layer, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), torch.randn(2, 4, 8, 8)
            >>> at = SampledPositions.draw(2, 16, 6, torch.Generator().manual_seed(0))
            >>> found = torch.einsum("rgd,gdo->rgo", at.inputs(layer, x), grouped_weight(layer)).flatten(1) + layer.bias
            >>> torch.allclose(found, at.outputs(layer(x), conv=True), atol=1e-5)
            True
        """
        if not isinstance(layer, nn.Conv2d):
            return self.outputs(x, conv=False)[:, None]
        left, right, top, bottom = conv_padding(layer, *x.shape[2:])
        if left + right + top + bottom:
            x = F.pad(
                x, (left, right, top, bottom), mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode
            )
        padded = x.permute(0, 2, 3, 1)
        (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
        width = (padded.shape[2] - dw * (kw - 1) - 1) // sw + 1
        at = self.index.to(x.device)
        image, line, column = torch.arange(len(x), device=x.device)[:, None], at // width * sh, at % width * sw
        # (N, P, taps, C)
        taps = torch.stack([padded[image, line + i * dh, column + j * dw] for i in range(kh) for j in range(kw)], 2)
        images, each, count, channels = taps.shape
        return taps.view(images * each, count, layer.groups, channels // layer.groups).transpose(1, 2).flatten(2)


def regression_weight(weight: Tensor) -> Tensor:
    """A convolution's (C_out, C, k, k) or a linear layer's (C_out, C) weight as a regression's (k² · C, C_out), in the order of `ops.patch_rows`.

    Example:
        >>> regression_weight(torch.zeros(5, 3, 3, 3)).shape
        torch.Size([27, 5])
    """
    return weight.T if weight.ndim == 2 else weight.permute(2, 3, 1, 0).flatten(0, 2)


def conv_columns(channels: int, kernel_size: int = 1) -> Tensor:
    """(C, k²): the columns of each channel among those of `ops.patch_rows`.

    Example:
        >>> conv_columns(2, 3)[1].tolist()
        [1, 3, 5, 7, 9, 11, 13, 15, 17]
    """
    return torch.arange(kernel_size**2 * channels).view(-1, channels).T.contiguous()
