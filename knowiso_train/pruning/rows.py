"""What a convolution or linear layer reads, as the rows of a regression, at positions drawn at random."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowiso_train.errors import InputTypeError, ShapeError


def columns_of(layer: nn.Module) -> int:
    """d, the number of regressors of a layer: C · k_h · k_w, or the linear layer's inputs.

    Raises:
        InputTypeError: another layer than a linear one or a two-dimensional convolution of one group.

    Example:
        >>> columns_of(nn.Conv2d(3, 8, 3))
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
    columns_of(layer)
    if isinstance(layer, nn.Linear):
        flat = x.reshape(-1, x.shape[-1])
        return flat if len(flat) <= rows else flat[torch.randperm(len(flat), generator=generator)[:rows].to(x.device)]
    if not isinstance(layer, nn.Conv2d) or x.ndim != 4 or x.shape[1] != layer.in_channels:
        raise ShapeError(f"expected an input (N, C, H, W) of {layer}, got {tuple(x.shape)}")
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    left, right, top, bottom = padding_of(layer, *x.shape[2:])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, (left, right, top, bottom), mode=mode) if left + right + top + bottom else x
    height, width = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1, (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    at = torch.randperm(height * width, generator=generator)[: math.ceil(rows / len(x))].to(x.device)
    lines, columns = at // width * sh, at % width * sw
    taps = [padded[:, :, lines + i * dh, columns + j * dw] for i in range(kh) for j in range(kw)]  # each (N, C, P)
    return torch.stack(taps, 1).permute(0, 3, 1, 2).flatten(2).flatten(0, 1)


def readable(layer: nn.Module) -> bool:
    """Whether a layer gives `weight · what it reads`: linear layers, convolutions, and timm's with TensorFlow's padding.

    Subclasses with a forward pass of their own, such as those that standardise their weights, do something else.

    Example:
        >>> readable(nn.Conv2d(2, 2, 1, groups=2)), readable(nn.ReLU())
        (True, False)
    """
    if isinstance(layer, nn.Linear):
        return type(layer).forward is nn.Linear.forward
    return isinstance(layer, nn.Conv2d) and (type(layer).forward is nn.Conv2d.forward or _pads_itself(layer))


def padding_of(layer: nn.Conv2d, height: int, width: int) -> tuple[int, int, int, int]:
    """Left, right, top, bottom, for an input of this size.

    Example:
        >>> padding_of(nn.Conv2d(1, 1, 4, padding="same"), 8, 8)
        (1, 2, 1, 2)
    """
    if _pads_itself(layer):  # as many outputs as strides fit into the input
        sizes = zip((height, width), layer.kernel_size, layer.stride, layer.dilation, strict=True)
        over = [max((-(-size // stride) - 1) * stride + dilation * (k - 1) + 1 - size, 0) for size, k, stride, dilation in sizes]
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
