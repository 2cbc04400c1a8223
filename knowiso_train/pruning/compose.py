"""Pruning in several steps: what is left of the first original."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from knowiso_train.pruning.twin import Kept, kept_indices, take, tensor_shapes


def composed(first: Mapping[str, Kept], then: Mapping[str, Kept], original: nn.Module | Mapping[str, Sequence[int]]) -> dict[str, Kept]:
    """What two prunings, one after the other, kept of the original's entries.

    Args:
        first: kept by the first, of the original.
        then: kept by the second, of what the first left.
        original: the network before both, or its `tensor_shapes`.

    Returns:
        As of `kept_indices`. Tensors that pruning added are left out.

    Raises:
        ShapeError: a second pruning of something else than the first left.

    Example:
        >>> composed({"weight": [None, [0, 2, 3]]}, {"weight": [[1], [0, 2]]}, {"weight": (2, 4)})
        {'weight': [[1], [0, 3]]}
    """
    shapes = tensor_shapes(original) if isinstance(original, nn.Module) else original
    flat = {}
    for name in dict.fromkeys([*first, *then]):
        if name not in shapes:
            continue
        left = torch.arange(math.prod(shapes[name])).view(tuple(shapes[name]))
        for kept in (first, then):
            left = take(left, kept[name]) if name in kept else left
        flat[name] = left
    return kept_indices(flat, shapes)
