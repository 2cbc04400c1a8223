"""Ridge regression from second moments or from samples: the only ridge solvers of the library.

All minimize `‖y - Bᵀx‖² + λ ‖B - A‖²` for centered x and y. The ridge ρ is relative: `λ = ρ · tr(S)/d`, a fraction of
the mean diagonal of the Gram matrix S, called dampening in pruning (SparseGPT, GPTQ). `RidgeSolver` with more features
than samples takes that of the Gram matrix of the samples, `λ = ρ · tr(S)/n`. The solutions are

- primal: `B = A + (S + λI)⁻¹ (S_xy - S A)`,
- dual, for more features than samples: `B = A + Xᵀ (X Xᵀ + λI)⁻¹ (Y - X A)`.

Two factorizations serve them. `Spectrum` costs several times more than Cholesky, but then every further ρ is cheap, and
ρ = 0 gives the solution of minimum norm: `solve_ridge` and `RidgeSolver`, with A = 0. `solve_dampened` is Cholesky with
one ρ: `ridge_map`, `PrimalMoments` and `KernelMoments`, and `dampened_inverse` for backward elimination.
`solve_ridge_cholesky` never raises the ridge, and refuses dependent features instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from knowiso_train.errors import NonFiniteError, OptionError
from knowiso_train.ops.linalg import full_precision, gram, jittered_cholesky
from knowiso_train.regression.moments import Moments

Ridge = float | Literal["search"]

RIDGE_GRID = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
MAX_SEARCH_FEATURES = 4096  # above, an eigendecomposition takes minutes
FIXED_RIDGE = 1e-4  # relative; above MAX_SEARCH_FEATURES

DIAGONAL_JITTER = 1e-12  # relative, added to every ridge: dependent features stay solvable
ROW_CHUNK_SIZE = 4096  # samples
FLOAT32_MIN_PRODUCTS = 1e10  # above, chunks are multiplied in float32 and added in float64


@dataclass(frozen=True)
class LinearMap:
    """Affine map `y ≈ weightᵀ x + bias`.

    Attributes:
        weight: (d, c), float64.
        bias: (c,), float64.
        ridge: Relative ρ of the fit.
    """

    weight: Tensor
    bias: Tensor
    ridge: float


@dataclass(frozen=True)
class Spectrum:
    """Eigendecomposition of a Gram matrix, the costly part of a ridge regression, shared by all targets and ridges.

    Attributes:
        values: (d,), ascending and clamped at 0.
        vectors: (d, d), in columns.
        select_gram: (d, d), the selection samples' Gram matrix in these eigenvectors, or None.
    """

    values: Tensor
    vectors: Tensor
    select_gram: Tensor | None = None

    @classmethod
    def of_gram(cls, matrix: Tensor) -> Spectrum:
        """Decompose a Gram matrix (d, d), O(d³)."""
        values, vectors = torch.linalg.eigh(matrix)
        return cls(values.clamp(min=0), vectors)

    @classmethod
    def of(cls, fit: Moments, select: Moments | None = None) -> Spectrum:
        """Decompose the fitting samples' Gram matrix, and rotate that of the selection samples."""
        values, vectors = torch.linalg.eigh(fit.xx)
        return cls(values.clamp(min=0), vectors, None if select is None else vectors.T @ select.xx @ vectors)

    def rotate(self, matrix: Tensor) -> Tensor:
        """Return `Vᵀ matrix`."""
        return self.vectors.T @ matrix

    def coefficients(self, rotated: Tensor, penalty: float | Tensor, precision: float | None = None) -> Tensor:
        """Return `(Λ + penalty)⁻¹ rotated`, with 0 in directions whose eigenvalue is rounding.

        Args:
            rotated: Right-hand side in eigenvectors, (d, c).
            penalty: λ ≥ 0.
            precision: Relative rounding error ε of the matrix. None: that of its dtype.
        """
        # An eigenvalue below ε d λ_max has no correct digit: the pseudo-inverse leaves its direction out
        epsilon = torch.finfo(self.values.dtype).eps if precision is None else precision
        rounding = self.values[-1] * len(self.values) * epsilon
        inverse = torch.where(
            self.values > rounding,
            1 / (self.values + penalty).clamp(min=torch.finfo(self.values.dtype).tiny),
            torch.zeros_like(self.values),
        )
        return inverse[:, None] * rotated


def solve_ridge(
    fit: Moments, ridge: Ridge = "search", select: Moments | None = None, spectrum: Spectrum | None = None
) -> LinearMap:
    """Return the linear map that minimizes `Σ‖y - Wᵀx - b‖² + ρ·tr(S_xx)/d·‖W‖²` over the fitting samples.

    Args:
        fit: Moments of the fitting samples.
        ridge: Relative ρ ≥ 0, or "search" for the ρ of `RIDGE_GRID` with the least error on `select`. ρ = 0 is least
            squares of minimum norm.
        select: Moments of other samples, for "search".
        spectrum: Decomposition of `fit.xx`. Default: computed here.

    Raises:
        OptionError: A negative ridge, "search" without selection samples, or (above MAX_SEARCH_FEATURES) dependent
            features without a ridge.

    Examples:
        >>> from knowiso_train.regression import batch_moments
        >>> x = torch.randn(64, 3, 1, 1, dtype=torch.float64)
        >>> weight = solve_ridge(batch_moments(x, 2 * x), 0.0).weight
        >>> torch.allclose(weight, 2 * torch.eye(3, dtype=torch.float64))
        True
    """
    search = ridge == "search"
    if search and (select is None or select.count < 1):
        raise OptionError('ridge="search" needs selection images; give some, or a number such as ridge=1e-4')
    if not search and (isinstance(ridge, str) or not ridge >= 0):
        raise OptionError(
            f'ridge must be "search" or a number >= 0 (relative to the mean variance of the source), got {ridge!r}'
        )
    scale = fit.xx.diagonal().mean()
    if not scale > 0:
        # A constant source explains nothing beyond the mean
        return LinearMap(torch.zeros_like(fit.xy), fit.mean_y.clone(), 0.0)
    if len(fit.mean_x) > MAX_SEARCH_FEATURES:
        return solve_ridge_cholesky(fit, FIXED_RIDGE if search else float(ridge))
    spectrum = spectrum or Spectrum.of(fit, select if search else None)
    rotated = spectrum.rotate(fit.xy)
    rho = _search_ridge(spectrum, rotated, select, scale) if search and select is not None else float(ridge)
    weight = spectrum.vectors @ spectrum.coefficients(rotated, rho * scale)
    return LinearMap(weight, fit.mean_y - weight.T @ fit.mean_x, rho)


def _search_ridge(spectrum: Spectrum, rotated: Tensor, select: Moments, scale: Tensor) -> float:
    """Return the ridge of the grid with the least squared error on the selection samples."""
    vectors = spectrum.vectors
    select_gram = vectors.T @ select.xx @ vectors if spectrum.select_gram is None else spectrum.select_gram
    select_cross = spectrum.rotate(select.xy)

    def error(rho: float) -> float:
        # ‖Y - X V a‖² = const + tr(aᵀ Vᵀ S_xx V a) - 2 tr(aᵀ Vᵀ S_xy), on centered selection samples
        a = spectrum.coefficients(rotated, rho * scale)
        return float((a * (select_gram @ a)).sum() - 2 * (a * select_cross).sum())

    return min(RIDGE_GRID, key=error)


def solve_ridge_cholesky(fit: Moments, ridge: float, floor: Tensor | float = 0.0) -> LinearMap:
    """Solve `solve_ridge` for one ρ by Cholesky: much cheaper, but without its tolerance for ρ = 0.

    Args:
        fit: Moments of the fitting samples.
        ridge: Relative ρ.
        floor: Absolute addition to λ.

    Raises:
        OptionError: Features that are dependent to rounding.
    """
    d = len(fit.mean_x)
    penalty = ridge * fit.xx.diagonal().mean() + floor
    factor, failed = torch.linalg.cholesky_ex(fit.xx + penalty * torch.eye(d, dtype=fit.xx.dtype, device=fit.xx.device))
    if failed:
        raise OptionError(
            f"{d} features of {int(fit.count)} samples are linearly dependent at ridge={ridge:g}; "
            "use ridge=1e-4 or more"
        )
    weight = torch.cholesky_solve(fit.xy, factor)
    return LinearMap(weight, fit.mean_y - weight.T @ fit.mean_x, ridge)


def dampening(mean_diagonal: Tensor, ridge: float) -> Tensor:
    """Return the penalty λ = (ρ + ε) · s for mean diagonals s, which count as 1 where they are 0.

    Examples:
        >>> dampening(torch.tensor([2.0, 0.0]), 0.5).tolist()
        [1.0, 0.5]
    """
    return (ridge + DIAGONAL_JITTER) * torch.where(mean_diagonal > 0, mean_diagonal, torch.ones_like(mean_diagonal))


def solve_dampened(matrix: Tensor, cross: Tensor, penalty: Tensor) -> Tensor:
    """Return `(matrix + diag(penalty))⁻¹ cross` by Cholesky; the penalty grows where rounding makes the sum indefinite.

    Args:
        matrix: (…, d, d), positive semidefinite up to rounding.
        cross: (…, d, c).
        penalty: (…, d), positive.

    Raises:
        NonFiniteError: Values that are not finite.

    Examples:
        >>> solve_dampened(torch.eye(2), torch.ones(2, 1), torch.ones(2)).flatten().tolist()
        [0.5, 0.5]
    """
    return torch.cholesky_solve(cross, jittered_cholesky(matrix, penalty))


def dampened_inverse(matrix: Tensor, ridge: float) -> Tensor:
    """Return `(S + λI)⁻¹` for a Gram matrix S (d, d) and a relative ridge.

    Examples:
        >>> torch.allclose(dampened_inverse(torch.eye(2).double(), 1.0), 0.5 * torch.eye(2).double())
        True
    """
    penalty = dampening(matrix.diagonal().mean(), ridge)
    return torch.cholesky_inverse(jittered_cholesky(matrix, penalty.expand(len(matrix))))


def ridge_map(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """Return `(XᵀX + λI)⁻¹ XᵀY` for centered samples, (D_x, D_y).

    Examples:
        >>> x = torch.randn(50, 4, dtype=torch.float64)
        >>> torch.allclose(ridge_map(x, x @ torch.ones(4, 2).double(), 1e-12), torch.ones(4, 2).double())
        True
    """
    matrix = x.T @ x
    return solve_dampened(matrix, x.T @ y, dampening(matrix.diagonal().mean(), ridge).expand(len(matrix)))


class RidgeSolver:
    """Ridge regression with intercept for any targets and ridges on the same samples.

    One eigendecomposition of the smaller Gram matrix serves all. Ridges are relative to its mean eigenvalue.

    Args:
        features: Samples, (N, D), float64.

    Examples:
        >>> x = torch.randn(40, 3, dtype=torch.float64)
        >>> weight, bias = RidgeSolver(x).solve(x @ torch.ones(3, 1).double() + 5, 1e-12)
        >>> weight.flatten().round().tolist(), round(float(bias))
        ([1.0, 1.0, 1.0], 5)
    """

    def __init__(self, features: Tensor) -> None:
        self.mean = features.mean(0)
        self.rows = features - self.mean
        self.primal = len(features) >= features.shape[1]
        self.spectrum = Spectrum.of_gram(self.rows.T @ self.rows if self.primal else self.rows @ self.rows.T)
        self.scale = self.spectrum.values.mean().clamp_min(torch.finfo(self.rows.dtype).tiny)

    def solve(self, targets: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """Return weight (D, C) and bias (C,) for targets (N, C)."""
        target_mean = targets.mean(0)
        centered = targets - target_mean
        # Primal: W = V (Λ + λ)⁻¹ Vᵀ XᵀY. Dual: W = Xᵀ V (Λ + λ)⁻¹ Vᵀ Y.
        rotated = self.spectrum.rotate(self.rows.T @ centered if self.primal else centered)
        solution = self.spectrum.vectors @ self.spectrum.coefficients(rotated, ridge * self.scale)
        weight = solution if self.primal else self.rows.T @ solution
        return weight, target_mean - self.mean @ weight

    def predict(self, targets: Tensor, ridge: float) -> Tensor:
        """Return the predictions for the same samples after a fit to targets (N, C)."""
        weight, _ = self.solve(targets, ridge)
        return self.rows @ weight + targets.mean(0)


class _GroupMeans:
    """Base of the regressions of a layer's G groups: means, and the intercept that follows from them."""

    mean_x: Tensor
    mean_y: Tensor

    def bias(self, weight: Tensor) -> Tensor:
        """Return the optimal intercept for a weight, (G, o)."""
        return self.mean_y - (weight.mT @ self.mean_x[..., None])[..., 0]


@dataclass(frozen=True)
class PrimalMoments(_GroupMeans):
    """Average moments of the inputs and targets of each of a layer's G groups, for primal ridge regression.

    Attributes:
        mean_x: (G, d).
        mean_y: (G, o).
        xx: (G, d, d), `Σ (x - mean)(x - mean)ᵀ / R` over R samples.
        xy: (G, d, o), `Σ (x - mean)(y - mean)ᵀ / R`.
    """

    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> PrimalMoments:
        """Compute the moments of samples (R, G, d) and (R, G, o).

        Raises:
            NonFiniteError: NaN or Inf in the samples.

        Examples:
            >>> PrimalMoments.of(torch.randn(20, 2, 3), torch.randn(20, 2, 4)).xy.shape
            torch.Size([2, 3, 4])
        """
        mean_x, mean_y = x.mean(0, dtype=torch.float64), y.mean(0, dtype=torch.float64)
        _check_finite(mean_x, mean_y)
        count, groups, d = x.shape
        xx = x.new_zeros(groups, d, d, dtype=torch.float64)
        xy = x.new_zeros(groups, d, y.shape[2], dtype=torch.float64)
        product_dtype = torch.float32 if count * groups * d * d > FLOAT32_MIN_PRODUCTS else torch.float64
        with full_precision(x.device):
            for x_chunk, y_chunk in zip(torch.split(x, ROW_CHUNK_SIZE), torch.split(y, ROW_CHUNK_SIZE), strict=True):
                centered_x = (x_chunk.to(product_dtype) - mean_x.to(product_dtype)).permute(1, 2, 0)
                centered_y = (y_chunk.to(product_dtype) - mean_y.to(product_dtype)).transpose(0, 1)
                xy.add_(centered_x @ centered_y)
                gram([centered_x], xx)
        return cls(mean_x, mean_y, xx / count, xy / count)

    def restricted(self, columns: Tensor) -> PrimalMoments:
        """Return the moments of these features alone.

        Examples:
            >>> x, y = torch.randn(30, 1, 3), torch.randn(30, 1, 2)
            >>> a = PrimalMoments.of(x, y).restricted(torch.tensor([2, 0]))
            >>> torch.allclose(a.xx, PrimalMoments.of(x[:, :, [2, 0]], y).xx)
            True
        """
        return PrimalMoments(
            self.mean_x[:, columns], self.mean_y, self.xx[:, columns][:, :, columns], self.xy[:, columns]
        )

    def weight(self, original: Tensor, keep: Tensor | None = None, ridge: float = 1e-4) -> Tensor:
        """Return the weights that minimize `‖y - Bᵀx - b‖²/R + λ ‖B - A‖²`, (G, d, o).

        Directions that the samples do not determine keep the original weights A.

        Args:
            original: A, (G, d, o), float64.
            keep: Nonzero for the features that remain, (G, d); weights of the others become 0. Default: all.
            ridge: Relative ρ ≥ 0; ∞ returns A.

        Raises:
            OptionError: A negative ridge.
            NonFiniteError: Moments that are not finite.

        Examples:
            >>> x, a = torch.randn(50, 1, 3).double(), torch.randn(1, 3, 2).double()
            >>> y = torch.einsum("rgd,gdo->rgo", x, a) + 1
            >>> torch.allclose(PrimalMoments.of(x, y).weight(torch.zeros_like(a), ridge=0.0), a)
            True
        """
        if not ridge >= 0:
            raise OptionError(
                f"ridge must be a number >= 0 (relative to the mean variance of the layer's input), got {ridge!r}"
            )
        # |S_ij| ≤ √(S_ii S_jj), so the diagonal is enough
        _check_finite(self.xx.diagonal(dim1=1, dim2=2), self.xy)
        mask = torch.ones_like(self.mean_x) if keep is None else keep.to(self.mean_x)
        start = original * mask[..., None]
        if math.isinf(ridge):
            return start
        residual = (self.xy - self.xx @ start) * mask[..., None]
        mean_diagonal = (self.xx.diagonal(dim1=1, dim2=2) * mask).sum(1) / mask.sum(1).clamp_min(1)  # (G,)
        mean_diagonal = torch.where(mean_diagonal > 0, mean_diagonal, torch.ones_like(mean_diagonal))[:, None]
        # A removed feature becomes a block of its own: a positive diagonal, and 0 on the right-hand side
        penalty = torch.where(mask > 0, dampening(mean_diagonal, ridge), mean_diagonal)
        return start + solve_dampened(self.xx * mask[:, :, None] * mask[:, None], residual, penalty)

    def variance(self, weight: Tensor) -> Tensor:
        """Return the variance of a weight's outputs, (G, o)."""
        return (weight * (self.xx @ weight)).sum(1)

    def unexplained(self, weight: Tensor, total: float) -> float:
        """Return the share of the targets' variance that a weight leaves unexplained.

        Args:
            weight: (G, d, o).
            total: Variance of y, summed over outputs.

        Examples:
            >>> x, y = torch.randn(30, 1, 3).double(), torch.randn(30, 1, 2).double()
            >>> weight, total = torch.randn(1, 3, 2).double(), y.var(0, correction=0).sum().item()
            >>> residual = (y - torch.einsum("rgd,gdo->rgo", x, weight)).var(0, correction=0).sum().item()
            >>> abs(PrimalMoments.of(x, y).unexplained(weight, total) - residual / total) < 1e-9
            True
        """
        # Var(y - Bᵀx) = Var(y) - tr(Bᵀ (2 S_xy - S_xx B))
        explained = float((weight * (2 * self.xy - self.xx @ weight)).sum())
        return 1 - explained / total if total > 0 else 0.0


@dataclass(frozen=True)
class KernelMoments(_GroupMeans):
    """Centered samples for dual ridge regression: the weights of `PrimalMoments` for more features than samples.

    Attributes:
        mean_x: (G, d).
        mean_y: (G, o).
        x: (G, R, d), centered.
        y: (G, R, o), centered.
    """

    mean_x: Tensor
    mean_y: Tensor
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> KernelMoments:
        """Center samples (R, G, d) and (R, G, o).

        Raises:
            NonFiniteError: NaN or Inf in the samples.

        Examples:
            >>> x, y = torch.randn(20, 1, 50).double(), torch.randn(20, 1, 2).double()
            >>> a = torch.zeros(1, 50, 2).double()
            >>> torch.allclose(KernelMoments.of(x, y).weight(a, ridge=0.1), PrimalMoments.of(x, y).weight(a, ridge=0.1))
            True
        """
        x, y = x.double().transpose(0, 1), y.double().transpose(0, 1)
        mean_x, mean_y = x.mean(1), y.mean(1)
        _check_finite(mean_x, mean_y)
        return cls(mean_x, mean_y, x - mean_x[:, None], y - mean_y[:, None])

    def restricted(self, columns: Tensor) -> KernelMoments:
        """Return the samples of these features alone."""
        return KernelMoments(self.mean_x[:, columns], self.mean_y, self.x[:, :, columns], self.y)

    def weight(self, original: Tensor, keep: Tensor | None = None, ridge: float = 1e-4) -> Tensor:
        """Return the weights of `PrimalMoments.weight`, (G, d, o)."""
        mask = torch.ones_like(self.mean_x) if keep is None else keep.to(self.mean_x)
        x, start = self.x * mask[:, None], original * mask[..., None]
        if math.isinf(ridge):
            return start
        # Dual form: B = A + Xᵀ (X Xᵀ + λI)⁻¹ (Y - X A), with λ from the same mean diagonal, tr(XᵀX) / d = tr(X Xᵀ) / d
        kernel = x @ x.mT
        mean_diagonal = kernel.diagonal(dim1=1, dim2=2).sum(1) / mask.sum(1).clamp_min(1)
        penalty = dampening(mean_diagonal, ridge)[:, None].expand(-1, x.shape[1])
        return start + x.mT @ solve_dampened(kernel, self.y - x @ start, penalty)

    def variance(self, weight: Tensor) -> Tensor:
        """Return the variance of a weight's outputs, (G, o)."""
        return (self.x @ weight).square().mean(1)


def _check_finite(*tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise NonFiniteError("NaN or Inf in the input or the target of the layer")
