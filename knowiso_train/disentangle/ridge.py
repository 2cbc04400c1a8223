"""Order 0 in closed form: ridge regression from moments, its ridge chosen on other images (DESIGN: `W = (S_xx + ρ·tr(S_xx)/d·I)⁻¹ S_xy`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from knowiso_train.errors import OptionError
from knowiso_train.statistics import Moments

RIDGES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FIXED_RIDGE = 1e-4  # above SEARCH_LIMIT columns, where an eigendecomposition takes minutes
SEARCH_LIMIT = 4096


@dataclass(frozen=True)
class LinearMap:
    """`y ≈ weightᵀ x + bias`: weight (d, c), bias (c,), float64; `ridge` relative to the mean eigenvalue of S_xx."""

    weight: Tensor
    bias: Tensor
    ridge: float


def solve_ridge(fit: Moments, ridge: float | str = "search", select: Moments | None = None) -> LinearMap:
    """The linear map with least `Σ‖y - Wᵀx - b‖² + ρ·tr(S_xx)/d·‖W‖²` over the fitting rows.

    Args:
        fit: moments of the fitting rows.
        ridge: relative ρ ≥ 0, or "search" for the ρ with the least unexplained energy on `select`. ρ = 0 is least squares of minimum norm.
        select: moments of other rows, for "search".

    Raises:
        OptionError: a negative ridge, or "search" without selection rows.

    Example:
        >>> from knowiso_train.statistics import batch_moments
        >>> x = torch.randn(64, 3, 1, 1, dtype=torch.float64)
        >>> bool(torch.allclose(solve_ridge(batch_moments(x, 2 * x), 0.0).weight, 2 * torch.eye(3, dtype=torch.float64)))
        True
    """
    d = len(fit.mean_x)
    search = ridge == "search"
    if search and (select is None or select.count < 1):
        raise OptionError('ridge="search" needs selection images; give some, or a number such as ridge=1e-4')
    if not search and (isinstance(ridge, str) or not ridge >= 0):
        raise OptionError(f'ridge must be "search" or a number >= 0 (relative to the mean variance of the source), got {ridge!r}')
    scale = fit.xx.diagonal().mean()
    if not scale > 0:  # a constant source explains nothing but the mean
        return LinearMap(torch.zeros_like(fit.xy), fit.mean_y.clone(), 0.0)
    if d > SEARCH_LIMIT:
        chosen = FIXED_RIDGE if search else float(ridge)
        factor = torch.linalg.cholesky(fit.xx + max(chosen, 1e-12) * scale * torch.eye(d, dtype=fit.xx.dtype, device=fit.xx.device))
        weight = torch.cholesky_solve(fit.xy, factor)
        return LinearMap(weight, fit.mean_y - weight.T @ fit.mean_x, chosen)
    values, vectors = torch.linalg.eigh(fit.xx)
    values = values.clamp(min=0)
    rotated = vectors.T @ fit.xy
    floor = values[-1] * d * torch.finfo(values.dtype).eps  # directions that are rounding

    def coefficients(rho: float) -> Tensor:
        inverse = torch.where(values > floor, 1 / (values + rho * scale).clamp(min=torch.finfo(values.dtype).tiny), torch.zeros_like(values))
        result: Tensor = inverse[:, None] * rotated
        return result

    if search and select is not None:
        inner, cross = vectors.T @ select.xx @ vectors, vectors.T @ select.xy

        def left_over(rho: float) -> float:
            a = coefficients(rho)
            return float((a * (inner @ a)).sum() - 2 * (a * cross).sum())

        chosen = min(RIDGES, key=left_over)
    else:
        chosen = float(ridge)
    weight = vectors @ coefficients(chosen)
    return LinearMap(weight, fit.mean_y - weight.T @ fit.mean_x, chosen)
