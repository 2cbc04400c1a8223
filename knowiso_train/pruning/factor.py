"""Cholesky factors of second moments, which rounding may have made indefinite."""

from __future__ import annotations

import torch
from torch import Tensor

from knowiso_train.errors import NonFiniteError

STRONGER, TRIES = 10.0, 16


def lower_factor(matrix: Tensor, added: Tensor) -> Tensor:
    """L with `L Lᵀ = matrix + diag(added)`. Moments that were multiplied in float32 may have eigenvalues a little below zero, where the rows do not
    fill the space; what is added then grows tenfold until the factor exists.

    Args:
        matrix: (…, d, d), symmetric.
        added: (…, d), to the diagonal, positive.

    Raises:
        NonFiniteError: no such factor: NaN or Inf in the moments.

    Example:
        >>> tilted = torch.diag(torch.tensor([1.0, -1e-6], dtype=torch.float64))
        >>> lower_factor(tilted, torch.full((2,), 1e-7, dtype=torch.float64)).diagonal()[1].item() ** 2 > 0
        True
    """
    for _ in range(TRIES):
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag_embed(added))
        if not bool(failed.any()):
            return factor
        added = STRONGER * added
    raise NonFiniteError("the moments of what a layer reads are not finite, or too large to factor; check the images and the weights")
