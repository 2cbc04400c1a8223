"""Grids of tokens, as a network declares them or as `layout=` states them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from math import ceil
from typing import Any, NamedTuple

from torch import nn

from knowiso_train.errors import LayoutError
from knowiso_train.features.wrappers import unwrap_model

_PREFIX_PARAMETERS = ("cls_token", "class_token", "dist_token", "distillation_token", "reg_token", "register_tokens")
# A vector for one token (CLIP of transformers and of open_clip)
_PREFIX_VECTORS = ("class_embedding",)
_STATED_TOKENS = re.compile(r"(?:(\d+)\+)?(?:(\d+)x(\d+)|line)(?:\+(\d+))?")

Grid = tuple[int, int]


class TokenGrid(NamedTuple):
    """Number of prefix and suffix tokens, and (rows, columns) of the others; None for a line of tokens."""

    prefix: int
    grid: Grid | None
    suffix: int = 0


def parse_tokens(text: str) -> TokenGrid:
    """Parse the tokens that a layout states: prefix tokens, grid and suffix tokens.

    Raises:
        LayoutError: Another form.

    Examples:
        >>> parse_tokens("1+14x14"), parse_tokens("1+8x12+100"), parse_tokens("line")
        (TokenGrid(prefix=1, grid=(14, 14), suffix=0), TokenGrid(prefix=1, grid=(8, 12), suffix=100), \
TokenGrid(prefix=0, grid=None, suffix=0))
    """
    match = _STATED_TOKENS.fullmatch(text)
    if match is None or "0" in match.group(2, 3):
        raise LayoutError(
            f"layout states the tokens {text!r}; expected prefix + rows x columns + suffix, such as '14x14', "
            "'1+14x14' or '1+14x14+100', or 'line' for the grid"
        )
    prefix, rows, columns, suffix = (None if number is None else int(number) for number in match.groups())
    return TokenGrid(prefix or 0, None if rows is None or columns is None else (rows, columns), suffix or 0)


def token_grid(name: str, parents: tuple[nn.Module, ...], tokens: int, input_size: Grid | None = None) -> TokenGrid:
    """Determine the number of prefix tokens and the grid of a layer's tokens.

    Only a declared grid is a grid: that of the patch embedding for `input_size` (else for the network's fixed input
    size), and those of the stages that timm lists in `feature_info`. The number of tokens is matched with a grid plus
    the network's prefix tokens, then with the grid alone. Tokens of a network without a patch grid are a line.

    Args:
        name: Name of the layer.
        parents: Modules that contain the layer, nearest first. The nearest one with `num_prefix_tokens` (timm) or
            class-token parameters decides.
        tokens: Number of tokens T.
        input_size: (height, width) of the images. None: unknown.

    Raises:
        LayoutError: Another number of tokens than the patch grid has, such as after dropping or merging tokens.
    """
    patches = _patch_grid(parents, input_size)
    prefix = 0 if "patch_embed" in name.split(".") else _prefix_tokens(parents)
    counts = (prefix, 0) if prefix else (0,)
    for grid in chain([] if patches is None else [patches], _stage_grids(parents, patches, input_size)):
        for count in counts:
            if grid[0] * grid[1] == tokens - count:
                return TokenGrid(count, grid)
    if tokens == 1:
        return TokenGrid(0, (1, 1))
    if patches is not None:
        raise LayoutError(
            f"the {tokens} tokens of layer {name!r} form no grid, as the network has {prefix} prefix tokens and "
            f"{patches[0]} × {patches[1]} patches: tokens were dropped, masked, merged or added. Turn that off "
            "(patch_drop_rate), or state the tokens, such as layout='nlc:1+14x14+100'"
        )
    return TokenGrid(prefix if tokens > prefix else 0, None)


def stage_info(model: nn.Module) -> list[dict[str, Any]]:
    """Return the stages that timm lists in `feature_info`; empty for other networks."""
    info = getattr(unwrap_model(model), "feature_info", None)
    stages: Any = info if isinstance(info, list) else getattr(info, "get_dicts", list)()
    return [stage for stage in stages if isinstance(stage, dict)]


def _stage_grids(parents: tuple[nn.Module, ...], patches: Grid | None, input_size: Grid | None) -> Iterator[Grid]:
    """Yield the grids of the stages, finest first."""
    stages: list[dict[str, Any]] = next((found for parent in parents if (found := stage_info(parent))), [])
    reductions = sorted({stage["reduction"] for stage in stages if isinstance(stage.get("reduction"), int)})
    for reduction in reductions:
        if input_size is not None:
            yield ceil(input_size[0] / reduction), ceil(input_size[1] / reduction)
        elif patches is not None:
            # The patch grid is that of the first stage
            yield ceil(patches[0] * reductions[0] / reduction), ceil(patches[1] * reductions[0] / reduction)


def _patch_grid(parents: tuple[nn.Module, ...], input_size: Grid | None) -> Grid | None:
    embed = next((embed for parent in parents if (embed := getattr(parent, "patch_embed", None)) is not None), None)
    sizes = getattr(embed, "dynamic_feat_size", None)
    if input_size is not None and callable(sizes):
        height, width = sizes(input_size)
        return int(height), int(width)
    grid = getattr(embed, "grid_size", None)
    if grid is not None and getattr(embed, "strict_img_size", True) is not False:
        return int(grid[0]), int(grid[1])
    return _convolved_grid(parents, input_size)


def _convolved_grid(parents: tuple[nn.Module, ...], input_size: Grid | None) -> Grid | None:
    """Return the grid of the convolution that divides images into patches: its kernel is its stride."""
    for parent in parents:
        first = next((module for module in parent.modules() if isinstance(module, nn.Conv2d)), None)
        if first is None or first.kernel_size != first.stride or min(first.stride) < 2:
            continue
        size = input_size or next((size for above in parents if (size := _image_size(above)) is not None), None)
        return None if size is None else (size[0] // first.stride[0], size[1] // first.stride[1])
    return None


def _image_size(module: nn.Module) -> Grid | None:
    """Return the input size that a network of torchvision or transformers states."""
    for owner in (module, getattr(module, "config", None)):
        size = getattr(owner, "image_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, (tuple, list)) and len(size) == 2:
            return int(size[0]), int(size[1])
    return None


def _prefix_tokens(parents: tuple[nn.Module, ...]) -> int:
    for parent in parents:
        count = getattr(parent, "num_prefix_tokens", None)
        if isinstance(count, int):
            return count
        special = [
            1 if name in _PREFIX_VECTORS else parameter.shape[1]
            for key, parameter in parent.named_parameters()
            if ((name := key.rsplit(".", 1)[-1]) in _PREFIX_PARAMETERS and parameter.ndim == 3)
            or (name in _PREFIX_VECTORS and parameter.ndim == 1)
        ]
        if special:
            return sum(special)
    return 0
