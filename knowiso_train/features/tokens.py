"""Where the tokens of a vision transformer lie: how many come before the patches, and the grid of the patches."""

from __future__ import annotations

from math import ceil, isqrt
from typing import NamedTuple

from torch import nn

_PREFIX_PARAMETERS = ("cls_token", "class_token", "dist_token", "distillation_token", "reg_token", "register_tokens")

Grid = tuple[int, int]


class TokenGrid(NamedTuple):
    """Prefix tokens, and (rows, columns) of the rest; None where the rest has no known grid."""

    prefix: int
    grid: Grid | None


def token_grid(name: str, parents: tuple[nn.Module, ...], tokens: int, input_size: Grid | None = None) -> TokenGrid:
    """Prefix count and grid of a layer with this many tokens.

    The patch grid is the one for `input_size` if that is known, else `patch_embed.grid_size` of a network with a fixed input size. A count that is
    the grid plus the network's prefix tokens, or the grid alone, is taken for that; then the same of the grid divided by 2, 3, ... (pooled stages).
    A network without a known grid is taken to have a square one.

    Args:
        name: of the layer.
        parents: modules that contain the layer, nearest first; the nearest with `num_prefix_tokens` (timm) or class-token parameters decides.
        tokens: T.
        input_size: (height, width) of the images.
    """
    embed = next((embed for parent in parents if (embed := getattr(parent, "patch_embed", None)) is not None), None)
    grid = _patch_grid(embed, input_size)
    prefix = 0 if "patch_embed" in name.split(".") else _prefix_tokens(parents)
    counts = (prefix, 0) if prefix else (0,)
    if grid is None:
        flexible = getattr(embed, "strict_img_size", True) is False  # the grid may be oblong, so a square count without prefix would be a guess
        for count in counts[:1] if flexible else counts:
            if root := _square_root(tokens - count):
                return TokenGrid(count, (root, root))
        return TokenGrid(prefix if flexible and tokens > prefix else 0, None)
    for divisors in (range(1, 2), range(2, max(grid) + 1)):
        for count in counts:
            for divisor in divisors:
                pooled = ceil(grid[0] / divisor), ceil(grid[1] / divisor)
                if pooled[0] * pooled[1] == tokens - count:
                    return TokenGrid(count, pooled)
    return TokenGrid(0, None)


def _patch_grid(embed: nn.Module | None, input_size: Grid | None) -> Grid | None:
    sizes = getattr(embed, "dynamic_feat_size", None)
    if input_size is not None and callable(sizes):
        height, width = sizes(input_size)
        return int(height), int(width)
    grid = getattr(embed, "grid_size", None)
    if grid is None or getattr(embed, "strict_img_size", True) is False:
        return None
    return int(grid[0]), int(grid[1])


def _prefix_tokens(parents: tuple[nn.Module, ...]) -> int:
    for parent in parents:
        count = getattr(parent, "num_prefix_tokens", None)
        if isinstance(count, int):
            return count
        special = [p.shape[1] for key, p in parent.named_parameters() if key.rsplit(".", 1)[-1] in _PREFIX_PARAMETERS and p.ndim == 3]
        if special:
            return sum(special)
    return 0


def _square_root(count: int) -> int:
    root = isqrt(max(count, 0))
    return root if root * root == count else 0
