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


@dataclass(frozen=True)
class Spectrum:
    """Eigendecomposition of a source's `S_xx`, and the selection rows' `S_xx` in its eigenvectors: the costly part, shared by targets."""

    values: Tensor
    vectors: Tensor
    inner: Tensor | None

    @classmethod
    def of(cls, fit: Moments, select: Moments | None = None) -> Spectrum:
        """Of the fitting rows, O(d³)."""
        values, vectors = torch.linalg.eigh(fit.xx)
        return cls(values.clamp(min=0), vectors, None if select is None else vectors.T @ select.xx @ vectors)


def solve_ridge(fit: Moments, ridge: float | str = "search", select: Moments | None = None, spectrum: Spectrum | None = None) -> LinearMap:
    """The linear map with least `Σ‖y - Wᵀx - b‖² + ρ·tr(S_xx)/d·‖W‖²` over the fitting rows.

    Args:
        fit: moments of the fitting rows.
        ridge: relative ρ ≥ 0, or "search" for the ρ with the least unexplained energy on `select`. ρ = 0 is least squares of minimum norm.
        select: moments of other rows, for "search".
        spectrum: of the same rows, where it is known already.

    Raises:
        OptionError: a negative ridge, "search" without selection rows, or (above SEARCH_LIMIT columns) dependent regressors with no ridge.

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
        return solve_factored(fit, FIXED_RIDGE if search else float(ridge))
    spectrum = spectrum or Spectrum.of(fit, select if search else None)
    values, vectors = spectrum.values, spectrum.vectors
    rotated = vectors.T @ fit.xy
    floor = values[-1] * d * torch.finfo(values.dtype).eps  # directions that are rounding

    def coefficients(rho: float) -> Tensor:
        inverse = torch.where(values > floor, 1 / (values + rho * scale).clamp(min=torch.finfo(values.dtype).tiny), torch.zeros_like(values))
        result: Tensor = inverse[:, None] * rotated
        return result

    if search and select is not None:
        inner = vectors.T @ select.xx @ vectors if spectrum.inner is None else spectrum.inner
        cross = vectors.T @ select.xy

        def left_over(rho: float) -> float:
            a = coefficients(rho)
            return float((a * (inner @ a)).sum() - 2 * (a * cross).sum())

        chosen = min(RIDGES, key=left_over)
    else:
        chosen = float(ridge)
    weight = vectors @ coefficients(chosen)
    return LinearMap(weight, fit.mean_y - weight.T @ fit.mean_x, chosen)


def solve_factored(fit: Moments, ridge: float, floor: Tensor | float = 0.0) -> LinearMap:
    """`solve_ridge` for one given ρ by a Cholesky factorisation: much cheaper than its eigendecomposition, but without its tolerance for ρ = 0.

    Args:
        fit: moments of the fitting rows.
        ridge: relative ρ.
        floor: added to the diagonal as it is.

    Raises:
        OptionError: regressors that are dependent to rounding.
    """
    d = len(fit.mean_x)
    added = ridge * fit.xx.diagonal().mean() + floor
    factor, failed = torch.linalg.cholesky_ex(fit.xx + added * torch.eye(d, dtype=fit.xx.dtype, device=fit.xx.device))
    if failed:
        raise OptionError(
            f"{d} regressors on {int(fit.count)} rows are linearly dependent, and ridge={ridge:g} does not help; use ridge=1e-4 or more"
        )
    weight = torch.cholesky_solve(fit.xy, factor)
    return LinearMap(weight, fit.mean_y - weight.T @ fit.mean_x, ridge)
