"""Ridge regression from second moments or from rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from knowiso_train.errors import NonFiniteError, OptionError, ShapeError
from knowiso_train.ops.linalg import gram, jittered_cholesky
from knowiso_train.regression.moments import Moments

RIDGE_GRID = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FIXED_RIDGE = 1e-4  # above SEARCH_LIMIT columns, where an eigendecomposition takes minutes
MAX_SEARCH_FEATURES = 4096

DIAGONAL_JITTER = 1e-12  # of the mean variance, added to the diagonal: dependent columns stay solvable
ROW_CHUNK_SIZE = 4096  # rows
FLOAT32_MIN_PRODUCTS = 1e10  # products, from which on chunks are multiplied in float32 and added up in float64


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


def solve_ridge(
    fit: Moments, ridge: float | str = "search", select: Moments | None = None, spectrum: Spectrum | None = None
) -> LinearMap:
    """The linear map with least `Σ‖y - Wᵀx - b‖² + ρ·tr(S_xx)/d·‖W‖²` over the fitting rows.

    Args:
        fit: moments of the fitting rows.
        ridge: relative ρ ≥ 0, or "search" for the ρ with the least unexplained energy on `select`. ρ = 0 is least
            squares of minimum norm.
        select: moments of other rows, for "search".
        spectrum: of the same rows, where it is known already.

    Raises:
        OptionError: a negative ridge, "search" without selection rows, or (above SEARCH_LIMIT columns) dependent
            regressors with no ridge.

    Example:
        >>> from knowiso_train.regression import batch_moments
        >>> x = torch.randn(64, 3, 1, 1, dtype=torch.float64)
        >>> bool(torch.allclose(solve_ridge(batch_moments(x, 2 * x), 0.0).weight, 2 * torch.eye(3, dtype=torch.float64)))
        True
    """
    d = len(fit.mean_x)
    search = ridge == "search"
    if search and (select is None or select.count < 1):
        raise OptionError('ridge="search" needs selection images; give some, or a number such as ridge=1e-4')
    if not search and (isinstance(ridge, str) or not ridge >= 0):
        raise OptionError(
            f'ridge must be "search" or a number >= 0 (relative to the mean variance of the source), got {ridge!r}'
        )
    scale = fit.xx.diagonal().mean()
    if not scale > 0:  # a constant source explains nothing but the mean
        return LinearMap(torch.zeros_like(fit.xy), fit.mean_y.clone(), 0.0)
    if d > MAX_SEARCH_FEATURES:
        return solve_ridge_cholesky(fit, FIXED_RIDGE if search else float(ridge))
    spectrum = spectrum or Spectrum.of(fit, select if search else None)
    values, vectors = spectrum.values, spectrum.vectors
    rotated = vectors.T @ fit.xy
    floor = values[-1] * d * torch.finfo(values.dtype).eps  # directions that are rounding

    def coefficients(rho: float) -> Tensor:
        inverse = torch.where(
            values > floor,
            1 / (values + rho * scale).clamp(min=torch.finfo(values.dtype).tiny),
            torch.zeros_like(values),
        )
        result: Tensor = inverse[:, None] * rotated
        return result

    if search and select is not None:
        inner = vectors.T @ select.xx @ vectors if spectrum.inner is None else spectrum.inner
        cross = vectors.T @ select.xy

        def left_over(rho: float) -> float:
            a = coefficients(rho)
            return float((a * (inner @ a)).sum() - 2 * (a * cross).sum())

        chosen = min(RIDGE_GRID, key=left_over)
    else:
        chosen = float(ridge)
    weight = vectors @ coefficients(chosen)
    return LinearMap(weight, fit.mean_y - weight.T @ fit.mean_x, chosen)


def solve_ridge_cholesky(fit: Moments, ridge: float, floor: Tensor | float = 0.0) -> LinearMap:
    """`solve_ridge` for one given ρ by a Cholesky factorization: much cheaper than its eigendecomposition, but without its tolerance for ρ = 0.

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


def refit_weights(moments: Moments, weight: Tensor, ridge: float = 1e-4) -> LinearMap:
    """Minimize `‖y - Bᵀx - b‖²/n + ρ·tr(S_xx)/d·‖B - A‖²`: what the rows do not decide stays as the surviving original weights A have it.

    Args:
        moments: source: the layer's input in the pruned network, in patches; target: its output in the original
            network.
        weight: A, (d, c): the original weights of the columns that are left.
        ridge: relative ρ ≥ 0.

    Returns:
        Weight (d, c) and bias (c,) in float64.

    Raises:
        ShapeError: a weight that does not fit the moments.
        OptionError: a negative ridge, or moments of no rows.
        NonFiniteError: NaN or Inf in the moments.

    Example:
        >>> from knowiso_train.regression import batch_moments
        >>> x = torch.randn(50, 3, 1, 1, dtype=torch.float64)
        >>> weight = torch.randn(3, 2, dtype=torch.float64)
        >>> y = torch.einsum("nchw,cd->ndhw", x, weight) + 1
        >>> torch.allclose(refit_weights(batch_moments(x, y), torch.zeros(3, 2), ridge=0.0).weight, weight)
        True
    """
    d, c = moments.xy.shape
    if weight.shape != (d, c):
        raise ShapeError(f"expected weight {(d, c)} as the moments have it, got {tuple(weight.shape)}")
    if not float(moments.count) > 0:
        raise OptionError("no rows were seen; give some images")
    xx, xy = moments.xx.double() / moments.count, moments.xy.double() / moments.count
    found = PrimalMoments(moments.mean_x.double()[None], moments.mean_y.double()[None], xx[None], xy[None])
    solved = found.weight(weight.detach().to(xx.device, torch.float64)[None], ridge=ridge)
    return LinearMap(solved[0], found.bias(solved)[0], ridge)


def ridge_map(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """`(XᵀX + ρ·tr(XᵀX)/d·I)⁻¹ XᵀY` for centered rows, (D_x, D_y).

    Example:
        >>> x = torch.randn(50, 4, dtype=torch.float64)
        >>> torch.allclose(ridge_map(x, x @ torch.ones(4, 2).double(), 1e-12), torch.ones(4, 2).double())
        True
    """
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny))
    found: Tensor = torch.linalg.solve(gram, x.T @ y)
    return found


class RidgeSolver:
    """Ridge regression with intercept of any targets on the same rows, from one eigendecomposition of the smaller Gram matrix.

    Ridges are relative to the mean eigenvalue over `min(N, D)` directions.

    Args:
        features: rows (N, D), float64.

    Example:
        >>> x = torch.randn(40, 3, dtype=torch.float64)
        >>> weight, bias = RidgeSolver(x).solve(x @ torch.ones(3, 1).double() + 5, 1e-12)
        >>> weight.flatten().round().tolist(), round(float(bias))
        ([1.0, 1.0, 1.0], 5)
    """

    def __init__(self, features: Tensor) -> None:
        self.mean = features.mean(0)
        self.rows = features - self.mean
        self.tall = len(features) >= features.shape[1]
        gram = self.rows.T @ self.rows if self.tall else self.rows @ self.rows.T
        values, self.vectors = torch.linalg.eigh(gram)
        self.values = values.clamp(min=0)
        self.scale = self.values.mean().clamp_min(torch.finfo(gram.dtype).tiny)

    def solve(self, targets: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """Weight (D, C) and bias (C,) for targets (N, C)."""
        center = targets.mean(0)
        centered = targets - center
        rotated = self.vectors.T @ (self.rows.T @ centered if self.tall else centered)
        inner = self.vectors @ (rotated / (self.values + ridge * self.scale)[:, None])
        weight = inner if self.tall else self.rows.T @ inner
        return weight, center - self.mean @ weight

    def fitted(self, targets: Tensor, ridge: float) -> Tensor:
        """Predictions for the same rows, (N, C)."""
        weight, _ = self.solve(targets, ridge)
        return self.rows @ weight + targets.mean(0)


@dataclass(frozen=True)
class PrimalMoments:
    """Means and second moments about them of what each of a layer's G groups reads and should give, per row, float64.

    Attributes:
        mean_x: (G, d).
        mean_y: (G, o).
        xx: (G, d, d).
        xy: (G, d, o).
    """

    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> PrimalMoments:
        """From rows (R, G, d) and (R, G, o).

        Raises:
            NonFiniteError: NaN or Inf in the rows.

        Example:
            >>> PrimalMoments.of(torch.randn(20, 2, 3), torch.randn(20, 2, 4)).xy.shape
            torch.Size([2, 3, 4])
        """
        mean_x, mean_y = x.mean(0, dtype=torch.float64), y.mean(0, dtype=torch.float64)
        if not bool(mean_x.isfinite().all() and mean_y.isfinite().all()):
            raise NonFiniteError("NaN or Inf in what the layer reads, or in what it should give")
        rows, groups, d = x.shape
        xx = x.new_zeros(groups, d, d, dtype=torch.float64)
        xy = x.new_zeros(groups, d, y.shape[2], dtype=torch.float64)
        kind = torch.float32 if rows * groups * d * d > FLOAT32_MIN_PRODUCTS else torch.float64

        def parts() -> Iterator[Tensor]:
            for of_x, of_y in zip(torch.split(x, ROW_CHUNK_SIZE), torch.split(y, ROW_CHUNK_SIZE), strict=True):
                left, right = (
                    (of_x - mean_x.to(x)).to(kind).permute(1, 2, 0),
                    (of_y - mean_y.to(y)).to(kind).transpose(0, 1),
                )
                xy.add_(left @ right)
                yield left

        gram(parts(), xx)
        return cls(mean_x, mean_y, xx / rows, xy / rows)

    def restricted(self, at: Tensor) -> PrimalMoments:
        """Of these columns alone.

        Example:
            >>> x, y = torch.randn(30, 1, 3), torch.randn(30, 1, 2)
            >>> torch.allclose(PrimalMoments.of(x, y).restricted(torch.tensor([2, 0])).xx, PrimalMoments.of(x[:, :, [2, 0]], y).xx)
            True
        """
        return PrimalMoments(self.mean_x[:, at], self.mean_y, self.xx[:, at][:, :, at], self.xy[:, at])

    def weight(self, original: Tensor, keep: Tensor | None = None, ridge: float = 1e-4) -> Tensor:
        """(G, d, o): the weights that `refit_weights` describes.

        Args:
            original: (G, d, o) float64, A.
            keep: (G, d), the columns that are left; weights of the others become 0. None is all.
            ridge: relative ρ ≥ 0; ∞ leaves A.

        Raises:
            OptionError: a negative ridge.
            NonFiniteError: moments that are not finite.
        """
        if not ridge >= 0:
            raise OptionError(
                f"ridge must be a number >= 0 (relative to the mean variance of what the layer reads), got {ridge!r}"
            )
        # No entry is beyond the diagonal's
        if not bool(self.xx.diagonal(dim1=1, dim2=2).isfinite().all() and self.xy.isfinite().all()):
            raise NonFiniteError("NaN or Inf in what the layer reads, or in what it should give")
        left = torch.ones_like(self.mean_x) if keep is None else keep.to(self.mean_x)
        start = original * left[..., None]
        if math.isinf(ridge):
            return start
        missing = (self.xy - self.xx @ start) * left[..., None]
        scale = (self.xx.diagonal(dim1=1, dim2=2) * left).sum(1) / left.sum(1).clamp_min(1)  # (G,)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        # What is gone stands apart, with nothing to explain
        diagonal = torch.where(left > 0, (ridge + DIAGONAL_JITTER) * scale[:, None], scale[:, None])
        factor = jittered_cholesky(self.xx * left[:, :, None] * left[:, None], diagonal)
        return start + torch.cholesky_solve(missing, factor)

    def bias(self, weight: Tensor) -> Tensor:
        """(G, o): the intercept that goes with a weight."""
        return _intercept(self.mean_x, self.mean_y, weight)

    def variance(self, weight: Tensor) -> Tensor:
        """(G, o): variance of what a weight gives on the rows."""
        return (weight * (self.xx @ weight)).sum(1)

    def left(self, weight: Tensor, total: float) -> float:
        """Share of the variance of what the layer should give that a weight leaves unexplained.

        Args:
            weight: (G, d, o).
            total: variance of y, summed over outputs.

        Example:
            >>> x, y, weight = torch.randn(30, 1, 3).double(), torch.randn(30, 1, 2).double(), torch.randn(1, 3, 2).double()
            >>> total = y.var(0, correction=0).sum().item()
            >>> missing = (y - torch.einsum("rgd,gdo->rgo", x, weight)).var(0, correction=0).sum().item()
            >>> abs(PrimalMoments.of(x, y).left(weight, total) - missing / total) < 1e-9
            True
        """
        explained = float((weight * (2 * self.xy - self.xx @ weight)).sum())
        return 1 - explained / total if total > 0 else 0.0


@dataclass(frozen=True)
class KernelMoments:
    """What `PrimalMoments` is, for layers with more regressors than rows: the same weights from the rows' products with each other.

    Attributes:
        mean_x: (G, d).
        mean_y: (G, o).
        x: (G, R, d), about the mean.
        y: (G, R, o), about the mean.
    """

    mean_x: Tensor
    mean_y: Tensor
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> KernelMoments:
        """From rows (R, G, d) and (R, G, o).

        Raises:
            NonFiniteError: NaN or Inf in the rows.

        Example:
            >>> x, y, a = torch.randn(20, 1, 50).double(), torch.randn(20, 1, 2).double(), torch.zeros(1, 50, 2).double()
            >>> torch.allclose(KernelMoments.of(x, y).weight(a, ridge=0.1), PrimalMoments.of(x, y).weight(a, ridge=0.1))
            True
        """
        of_x, of_y = x.double().transpose(0, 1), y.double().transpose(0, 1)
        mean_x, mean_y = of_x.mean(1), of_y.mean(1)
        if not bool(mean_x.isfinite().all() and mean_y.isfinite().all()):
            raise NonFiniteError("NaN or Inf in what the layer reads, or in what it should give")
        return cls(mean_x, mean_y, of_x - mean_x[:, None], of_y - mean_y[:, None])

    def restricted(self, at: Tensor) -> KernelMoments:
        """Of these columns alone."""
        return KernelMoments(self.mean_x[:, at], self.mean_y, self.x[:, :, at], self.y)

    def weight(self, original: Tensor, keep: Tensor | None = None, ridge: float = 1e-4) -> Tensor:
        """(G, d, o), see `RowMoments.weight`: `A + Xᵀ(XXᵀ + nλ)⁻¹(Y - XA)`."""
        left = torch.ones_like(self.mean_x) if keep is None else keep.to(self.mean_x)
        x, start = self.x * left[:, None], original * left[..., None]
        if math.isinf(ridge):
            return start
        products = x @ x.mT
        # Rows times the mean variance
        trace = products.diagonal(dim1=1, dim2=2).sum(1) / left.sum(1).clamp_min(1)
        diagonal = ((ridge + DIAGONAL_JITTER) * torch.where(trace > 0, trace, torch.ones_like(trace)))[:, None].expand(
            -1, x.shape[1]
        )
        factor = jittered_cholesky(products, diagonal)
        return start + x.mT @ torch.cholesky_solve(self.y - x @ start, factor)

    def bias(self, weight: Tensor) -> Tensor:
        """(G, o): the intercept that goes with a weight."""
        return _intercept(self.mean_x, self.mean_y, weight)

    def variance(self, weight: Tensor) -> Tensor:
        """(G, o): variance of what a weight gives on the rows."""
        return (self.x @ weight).square().mean(1)


def _intercept(mean_x: Tensor, mean_y: Tensor, weight: Tensor) -> Tensor:
    return mean_y - (weight.mT @ mean_x[..., None])[..., 0]
