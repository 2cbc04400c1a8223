"""Symmetric products in bands of rows, of which each leaves out what the ones above it have."""

from __future__ import annotations

from torch import Tensor


def bands(columns: int, wide: int) -> list[slice]:
    """Rows of each band.

    Example:
        >>> bands(5, 2)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + wide, columns)) for start in range(0, columns, wide)]


def mirror(total: Tensor, parts: list[slice]) -> None:
    """Fill what the bands of a (…, d, d) product have left out, in place.

    Example:
        >>> import torch
        >>> total = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
        >>> mirror(total, bands(2, 1))
        >>> total.tolist()
        [[1.0, 2.0], [2.0, 3.0]]
    """
    for band in parts[1:]:
        total[..., band, : band.start] = total[..., : band.start, band].mT
