"""Layers as regressions: im2col of their inputs, and their weights as matrices.

The columns of a sample run over the row of the patch, then the column of the patch, then the channel. Patches can then
be copied in runs of C values. Weight matrices have the same order. `patch_rows` serves all positions of square
zero-padded patches; `gather_patches` serves single positions of any convolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.errors import InputTypeError, ShapeError


def patch_rows(x: Tensor, kernel_size: int, positions: Tensor | None = None) -> Tensor:
    """Return zero-padded k×k patches as samples.

    Args:
        x: (N, C, H, W).
        kernel_size: Odd k.
        positions: Indices into the H·W grid, (N, P). Default: all positions.

    Returns:
        (N · P, k² · C), P = H · W by default; samples of one image are consecutive.

    Examples:
        >>> patch_rows(torch.zeros(2, 3, 4, 5), 3).shape
        torch.Size([40, 27])
    """
    _, _, height, width = x.shape
    rows = x.permute(0, 2, 3, 1)
    if positions is not None:
        return _rows_at(rows, kernel_size, positions)
    if kernel_size > 1:
        margin = kernel_size // 2
        rows = F.pad(rows, (0, 0, margin, margin, margin, margin)).contiguous()
        # One shifted view of the grid for each cell of the patch
        rows = torch.cat(
            [rows[:, i : i + height, j : j + width] for i in range(kernel_size) for j in range(kernel_size)], dim=-1
        )
    return rows.reshape(-1, rows.shape[3])


def _rows_at(x: Tensor, kernel_size: int, positions: Tensor) -> Tensor:
    """Return the zero-padded patches of (N, H, W, C) at positions (N, P), without those of other positions."""
    width, margin = x.shape[2], kernel_size // 2
    x = F.pad(x, (0, 0, margin, margin, margin, margin))
    image = torch.arange(len(x), device=x.device)[:, None]
    patches = _patches_at(x, image, positions // width, positions % width, (kernel_size, kernel_size), (1, 1))
    return patches.flatten(0, 1).flatten(1)


def _patches_at(
    x: Tensor, image: Tensor, row: Tensor, column: Tensor, kernel_size: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """Return the cells of patches whose first cells are at given images, rows and columns.

    Args:
        x: Padded input, (N, H, W, C).
        image: Indices of images, broadcast with `row` and `column`.
        row: Rows of the first cells, (N, P).
        column: Columns of the first cells, (N, P).
        kernel_size: (k_h, k_w).
        dilation: Distance of neighboring cells, vertical and horizontal.

    Returns:
        (N, P, k_h · k_w, C).
    """
    offsets = (torch.arange(size, device=x.device) * step for size, step in zip(kernel_size, dilation, strict=True))
    down, right = torch.cartesian_prod(*offsets).T
    return x[image[..., None], row[..., None] + down, column[..., None] + right]


def gather_patches(layer: nn.Conv2d, x: Tensor, positions: Tensor) -> Tensor:
    """Return the patches of a convolution's input at given positions of its output as samples.

    Args:
        layer: Convolution of any kernel, stride, padding, dilation and groups.
        x: Its input, (N, C, H, W).
        positions: Flat indices into the output's grid, (N, P).

    Returns:
        (N · P, G, d), in the order of `grouped_weight`.

    Examples:
        >>> layer, x = nn.Conv2d(4, 6, 3, stride=2), torch.randn(2, 4, 7, 7)
        >>> rows = gather_patches(layer, x, torch.arange(9).expand(2, -1))
        >>> y = torch.einsum("rgd,gdo->rgo", rows, grouped_weight(layer)).flatten(1) + layer.bias
        >>> torch.allclose(y, layer(x).flatten(2).transpose(1, 2).flatten(0, 1), atol=1e-5)
        True
    """
    positions = positions.to(x.device)
    left, right, top, bottom = conv_padding(layer, *x.shape[2:])
    if left + right + top + bottom:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, (left, right, top, bottom), mode=mode)
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    channels_last = x.permute(0, 2, 3, 1)
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1  # of the output
    # The patch of output (r, c) begins at (r · s, c · s) of the padded input
    windows, area = len(x) // len(positions), width * ((x.shape[2] - dh * (kh - 1) - 1) // sh + 1)
    image = torch.arange(len(positions), device=x.device)[:, None] * windows + positions // area
    row, column = positions % area // width * sh, positions % width * sw
    patches = _patches_at(channels_last, image, row, column, layer.kernel_size, layer.dilation)
    num_images, count, area, channels = patches.shape
    grouped = patches.view(num_images * count, area, layer.groups, channels // layer.groups)
    return grouped.transpose(1, 2).flatten(2)


def input_rows(layer: nn.Module, x: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Return about `rows` samples of a layer's input, at random positions that all images share.

    Args:
        layer: nn.Conv2d of one group (any kernel, stride, padding, dilation) or nn.Linear.
        x: Input of the layer, (N, C, H, W), or (…, C) for a linear layer.
        rows: Maximum number of samples, rounded up to the same number for every image.
        generator: Random numbers of the positions, on the CPU.

    Returns:
        (R, d), in the order of `regression_weight`.

    Raises:
        InputTypeError: Another layer.
        ShapeError: An input that does not fit the layer.

    Examples:
        >>> input_rows(nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.zeros(2, 3, 8, 8), 10, torch.Generator()).shape
        torch.Size([10, 27])
    """
    num_input_features(layer)
    if isinstance(layer, nn.Linear):
        flat = x.reshape(-1, x.shape[-1])
        return flat if len(flat) <= rows else flat[torch.randperm(len(flat), generator=generator)[:rows].to(x.device)]
    if not isinstance(layer, nn.Conv2d) or x.ndim != 4 or x.shape[1] != layer.in_channels:
        raise ShapeError(f"expected an input (N, C, H, W) of {layer}, got {tuple(x.shape)}")
    count = math.ceil(rows / len(x))
    positions = torch.randperm(num_output_positions(layer, *x.shape[2:]), generator=generator)[:count]
    return gather_patches(layer, x, positions.expand(len(x), -1))[:, 0]


@dataclass(frozen=True)
class SampledPositions:
    """Random positions of a layer's output, different ones in each image.

    Attributes:
        index: Flat positions, (N, P).
    """

    index: Tensor

    @classmethod
    def draw(cls, images: int, num_positions: int, rows: int, generator: torch.Generator) -> SampledPositions:
        """Draw about `rows` positions altogether, the same number in each image.

        Args:
            images: N.
            num_positions: Size of the grid.
            rows: Number of positions in all images, rounded up; at most all are drawn.
            generator: Random numbers, on the CPU.

        Examples:
            >>> SampledPositions.draw(4, 100, 10, torch.Generator().manual_seed(0)).index.shape
            torch.Size([4, 3])
        """
        count = min(num_positions, math.ceil(rows / images))
        if count == num_positions:
            return cls(torch.arange(num_positions).expand(images, -1))
        # The positions of the largest of independent uniform numbers are a random subset
        return cls(torch.rand(images, num_positions, generator=generator).topk(count, sorted=False).indices)

    def part(self, start: int, stop: int) -> SampledPositions:
        """Return the positions of images `start:stop`."""
        return SampledPositions(self.index[start:stop])

    def outputs(self, y: Tensor, *, conv: bool) -> Tensor:
        """Return a layer's outputs at these positions, (R, C), image after image.

        Args:
            y: (N, C, H, W) of a convolution, (…, C) of a linear layer.
            conv: True for a convolution.

        Raises:
            ShapeError: An output without these images and positions.
        """
        flat = y.flatten(2).transpose(1, 2) if conv else y
        images, num_rows = len(self.index), flat.numel() // max(1, flat.shape[-1])
        if num_rows % images or int(self.index.max()) >= num_rows // images:
            raise ShapeError(
                f"an output of shape {tuple(y.shape)} does not hold {images} images of the same size as before"
            )
        index = self.index.to(y.device)
        return (
            flat.reshape(images, -1, flat.shape[-1])
            .gather(1, index[..., None].expand(-1, -1, flat.shape[-1]))
            .flatten(0, 1)
        )

    def inputs(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return a layer's inputs at these positions, (R, G, d), in the order of `grouped_weight`.

        Args:
            layer: nn.Linear, or nn.Conv2d of any kernel, stride, padding, dilation and groups.
            x: Its input.

        Examples:
            >>> layer, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), torch.randn(2, 4, 8, 8)
            >>> positions = SampledPositions.draw(2, 16, 6, torch.Generator().manual_seed(0))
            >>> y = torch.einsum("rgd,gdo->rgo", positions.inputs(layer, x), grouped_weight(layer)).flatten(1)
            >>> torch.allclose(y + layer.bias, positions.outputs(layer(x), conv=True), atol=1e-5)
            True
        """
        return (
            gather_patches(layer, x, self.index)
            if isinstance(layer, nn.Conv2d)
            else self.outputs(x, conv=False)[:, None]
        )


def weight_to_matrix(weight: Tensor, groups: int = 1) -> Tensor:
    """Return a layer's weight as one regression for each group.

    Args:
        weight: (C_out, C_in / G, k_h, k_w), or (C_out, C_in).
        groups: G.

    Returns:
        (G, d, C_out / G); d runs over the cells of the kernel, then over the group's input channels.

    Examples:
        >>> weight_to_matrix(torch.zeros(6, 2, 3, 3), groups=2).shape
        torch.Size([2, 18, 3])
    """
    if weight.ndim == 2:
        return weight.T[None]
    # (G, C_out / G, C_in / G, cells) → (G, cells, C_in / G, C_out / G)
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1).permute(0, 3, 2, 1).flatten(1, 2)


def matrix_to_weight(matrix: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return the inverse of `weight_to_matrix` for a weight of this shape.

    Examples:
        >>> weight = torch.randn(6, 2, 3, 1)
        >>> torch.equal(matrix_to_weight(weight_to_matrix(weight, 3), weight.shape), weight)
        True
    """
    if len(shape) == 2:
        return matrix[0].T
    groups, d, width = matrix.shape
    return matrix.reshape(groups, d // shape[1], shape[1], width).permute(0, 3, 2, 1).reshape(shape)


def regression_weight(weight: Tensor) -> Tensor:
    """Return the weight of a layer of one group as a matrix, (d, C_out).

    Examples:
        >>> regression_weight(torch.zeros(5, 3, 3, 3)).shape
        torch.Size([27, 5])
    """
    return weight_to_matrix(weight)[0]


def conv_weight(matrix: Tensor, kernel_size: int) -> Tensor:
    """Return a matrix (k² · C, C_out) as the weight of a convolution, (C_out, C, k, k).

    Examples:
        >>> conv_weight(torch.zeros(27, 5), 3).shape
        torch.Size([5, 3, 3, 3])
    """
    channels = len(matrix) // kernel_size**2
    return matrix_to_weight(matrix[None], (matrix.shape[1], channels, kernel_size, kernel_size))


def grouped_weight(layer: nn.Module) -> Tensor:
    """Return a layer's weight as one regression for each group, (G, d, o).

    Examples:
        >>> grouped_weight(nn.Conv2d(4, 6, 3, groups=2)).shape
        torch.Size([2, 18, 3])
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight_to_matrix(weight, num_groups(layer))


def ungrouped_weight(layer: nn.Module, matrix: Tensor) -> Tensor:
    """Return the inverse of `grouped_weight`, in the shape of the layer's weight.

    Examples:
        >>> layer = nn.Conv2d(4, 6, (3, 1), groups=2)
        >>> torch.equal(ungrouped_weight(layer, grouped_weight(layer)), layer.weight)
        True
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return matrix_to_weight(matrix, weight.shape)


@torch.no_grad()
def write_weight(conv: nn.Conv2d, matrix: Tensor, bias: Tensor) -> None:
    """Copy a matrix (d, C_out) into a convolution of one group, and the bias if it has one."""
    conv.weight.copy_(matrix_to_weight(matrix[None], conv.weight.shape))
    if conv.bias is not None:
        conv.bias.copy_(bias)


def conv_columns(channels: int, kernel_size: int = 1) -> Tensor:
    """Return the columns of each channel in the matrix of a convolution, (C, k²).

    Examples:
        >>> conv_columns(2, 3)[1].tolist()
        [1, 3, 5, 7, 9, 11, 13, 15, 17]
    """
    return torch.arange(kernel_size**2 * channels).view(-1, channels).T.contiguous()


def num_input_features(layer: nn.Module) -> int:
    """Return d, the number of input features of a layer's regression: C · k_h · k_w, or those of a linear layer.

    Raises:
        InputTypeError: Another layer than a linear one or a two-dimensional convolution of one group.

    Examples:
        >>> num_input_features(nn.Conv2d(3, 8, 3))
        27
    """
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
    raise InputTypeError(f"expected nn.Linear or nn.Conv2d of one group, got {type(layer).__name__}")


def num_groups(layer: nn.Module) -> int:
    """Return the groups of a convolution, 1 for a linear layer.

    Raises:
        InputTypeError: Another layer.

    Examples:
        >>> num_groups(nn.Conv2d(4, 8, 3, groups=2)), num_groups(nn.Linear(2, 2))
        (2, 1)
    """
    if isinstance(layer, nn.Linear):
        return 1
    if isinstance(layer, nn.Conv2d):
        return layer.groups
    raise InputTypeError(f"expected nn.Linear or nn.Conv2d, got {type(layer).__name__}")


def is_plain_linear_op(layer: nn.Module) -> bool:
    """Return True if a layer computes `weight · input + bias` and nothing else.

    These are linear layers, convolutions, and timm's convolutions with TensorFlow's padding. Subclasses with their own
    forward pass, such as those that standardize their weights, are not.

    Examples:
        >>> is_plain_linear_op(nn.Conv2d(2, 2, 1, groups=2)), is_plain_linear_op(nn.ReLU())
        (True, False)
    """
    if isinstance(layer, nn.Linear):
        return type(layer).forward is nn.Linear.forward
    return isinstance(layer, nn.Conv2d) and (type(layer).forward is nn.Conv2d.forward or _has_dynamic_padding(layer))


def conv_padding(layer: nn.Conv2d, height: int, width: int) -> tuple[int, int, int, int]:
    """Return the padding of an input of this size: left, right, top, bottom.

    Examples:
        >>> conv_padding(nn.Conv2d(1, 1, 4, padding="same"), 8, 8)
        (1, 2, 1, 2)
    """
    if _has_dynamic_padding(layer):
        # TensorFlow's "same": ⌈size / stride⌉ outputs need (⌈size / stride⌉ - 1) · stride + dilation · (k - 1) + 1
        # inputs
        axes = zip((height, width), layer.kernel_size, layer.stride, layer.dilation, strict=True)
        total = [
            max((-(-size // stride) - 1) * stride + dilation * (k - 1) + 1 - size, 0)
            for size, k, stride, dilation in axes
        ]
    elif layer.padding == "valid":
        return 0, 0, 0, 0
    elif layer.padding == "same":
        total = [dilation * (k - 1) for dilation, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    else:
        vertical, horizontal = (int(p) for p in layer.padding)
        return horizontal, horizontal, vertical, vertical
    # An odd total puts the larger half at the right and at the bottom
    return total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2


def num_output_positions(layer: nn.Conv2d, height: int, width: int) -> int:
    """Return the number of output positions for an input of this size.

    Examples:
        >>> num_output_positions(nn.Conv2d(3, 8, 3, stride=2, padding=1), 8, 8)
        16
    """
    left, right, top, bottom = conv_padding(layer, height, width)
    padded = (height + top + bottom, width + left + right)
    axes = zip(padded, layer.kernel_size, layer.stride, layer.dilation, strict=True)
    return math.prod((size - dilation * (k - 1) - 1) // stride + 1 for size, k, stride, dilation in axes)


def _has_dynamic_padding(layer: nn.Module) -> bool:
    # By name: the class is timm's, which is imported in `loading` alone
    return type(layer).__name__ == "Conv2dSame"
