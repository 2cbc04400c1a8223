"""New weights of a layer in closed form: the original network's outputs from the pruned network's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from knowiso_train.disentangle.ridge import LinearMap
from knowiso_train.errors import NonFiniteError, OptionError, ShapeError
from knowiso_train.statistics import Moments

TINY = 1e-12  # of the mean variance, added to the diagonal: dependent columns stay solvable


def refit_weights(moments: Moments, weight: Tensor, ridge: float = 1e-4) -> LinearMap:
    """Minimise `‖y - Bᵀx - b‖²/n + ρ·tr(S_xx)/d·‖B - A‖²`: what the rows do not decide stays as the surviving original weights A have it.

    Args:
        moments: source: the layer's input in the pruned network, in patches; target: its output in the original network.
        weight: A, (d, c): the original weights of the columns that are left.
        ridge: relative ρ ≥ 0.

    Returns:
        Weight (d, c) and bias (c,) in float64.

    Raises:
        ShapeError: a weight that does not fit the moments.
        OptionError: a negative ridge, or moments of no rows.
        NonFiniteError: NaN or Inf in the moments.

    Example:
        >>> from knowiso_train.statistics import batch_moments
        >>> x = torch.randn(50, 3, 1, 1, dtype=torch.float64)
        >>> weight = torch.randn(3, 2, dtype=torch.float64)
        >>> y = torch.einsum("nchw,cd->ndhw", x, weight) + 1
        >>> torch.allclose(refit_weights(batch_moments(x, y), torch.zeros(3, 2), ridge=0.0).weight, weight)
        True
    """
    d, c = moments.xy.shape
    if weight.shape != (d, c):
        raise ShapeError(f"expected weight {(d, c)} as the moments have it, got {tuple(weight.shape)}")
    if not ridge >= 0:
        raise OptionError(f"ridge must be a number >= 0 (relative to the mean variance of what the layer reads), got {ridge!r}")
    if not float(moments.count) > 0:
        raise OptionError("no rows were seen; give some images")
    original = weight.detach().to(moments.xx.device, torch.float64)
    xx, xy = moments.xx.double() / moments.count, moments.xy.double() / moments.count
    if not bool(xx.isfinite().all() and xy.isfinite().all()):
        raise NonFiniteError("NaN or Inf in what the layer reads, or in what it should give")
    scale = xx.diagonal().mean()
    if scale > 0:
        eye = torch.eye(d, dtype=torch.float64, device=xx.device)
        factor = torch.linalg.cholesky(xx + (ridge + TINY) * scale * eye)
        original = original + torch.cholesky_solve(xy - xx @ original, factor)
    return LinearMap(original, moments.mean_y.double() - original.T @ moments.mean_x.double(), ridge)
