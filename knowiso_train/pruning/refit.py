"""New weights of a layer in closed form: the original network's outputs from the pruned network's inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from knowiso_train.disentangle.ridge import LinearMap
from knowiso_train.errors import NonFiniteError, OptionError, ShapeError
from knowiso_train.pruning.factor import lower_factor
from knowiso_train.pruning.products import gram
from knowiso_train.statistics import Moments

TINY = 1e-12  # of the mean variance, added to the diagonal: dependent columns stay solvable
CHUNK = 4096  # rows
SLOW = 1e10  # products, from which on chunks are multiplied in float32 and added up in float64


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
    if not float(moments.count) > 0:
        raise OptionError("no rows were seen; give some images")
    xx, xy = moments.xx.double() / moments.count, moments.xy.double() / moments.count
    found = RowMoments(moments.mean_x.double()[None], moments.mean_y.double()[None], xx[None], xy[None])
    solved = found.weight(weight.detach().to(xx.device, torch.float64)[None], ridge=ridge)
    return LinearMap(solved[0], found.bias(solved)[0], ridge)


@dataclass(frozen=True)
class RowMoments:
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
    def of(cls, x: Tensor, y: Tensor) -> RowMoments:
        """From rows (R, G, d) and (R, G, o).

        Raises:
            NonFiniteError: NaN or Inf in the rows.

        Example:
            >>> RowMoments.of(torch.randn(20, 2, 3), torch.randn(20, 2, 4)).xy.shape
            torch.Size([2, 3, 4])
        """
        mean_x, mean_y = x.mean(0, dtype=torch.float64), y.mean(0, dtype=torch.float64)
        if not bool(mean_x.isfinite().all() and mean_y.isfinite().all()):
            raise NonFiniteError("NaN or Inf in what the layer reads, or in what it should give")
        rows, groups, d = x.shape
        xx = x.new_zeros(groups, d, d, dtype=torch.float64)
        xy = x.new_zeros(groups, d, y.shape[2], dtype=torch.float64)
        kind = torch.float32 if rows * groups * d * d > SLOW else torch.float64

        def parts() -> Iterator[Tensor]:
            for of_x, of_y in zip(torch.split(x, CHUNK), torch.split(y, CHUNK), strict=True):
                left, right = (of_x - mean_x.to(x)).to(kind).permute(1, 2, 0), (of_y - mean_y.to(y)).to(kind).transpose(0, 1)
                xy.add_(left @ right)
                yield left

        gram(parts(), xx)
        return cls(mean_x, mean_y, xx / rows, xy / rows)

    def restricted(self, at: Tensor) -> RowMoments:
        """Of these columns alone.

        Example:
            >>> x, y = torch.randn(30, 1, 3), torch.randn(30, 1, 2)
            >>> torch.allclose(RowMoments.of(x, y).restricted(torch.tensor([2, 0])).xx, RowMoments.of(x[:, :, [2, 0]], y).xx)
            True
        """
        return RowMoments(self.mean_x[:, at], self.mean_y, self.xx[:, at][:, :, at], self.xy[:, at])

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
            raise OptionError(f"ridge must be a number >= 0 (relative to the mean variance of what the layer reads), got {ridge!r}")
        if not bool(self.xx.diagonal(dim1=1, dim2=2).isfinite().all() and self.xy.isfinite().all()):  # no entry is beyond the diagonal's
            raise NonFiniteError("NaN or Inf in what the layer reads, or in what it should give")
        left = torch.ones_like(self.mean_x) if keep is None else keep.to(self.mean_x)
        start = original * left[..., None]
        if math.isinf(ridge):
            return start
        missing = (self.xy - self.xx @ start) * left[..., None]
        scale = (self.xx.diagonal(dim1=1, dim2=2) * left).sum(1) / left.sum(1).clamp_min(1)  # (G,)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        diagonal = torch.where(left > 0, (ridge + TINY) * scale[:, None], scale[:, None])  # what is gone stands apart, with nothing to explain
        factor = lower_factor(self.xx * left[:, :, None] * left[:, None], diagonal)
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
            >>> abs(RowMoments.of(x, y).left(weight, total) - missing / total) < 1e-9
            True
        """
        explained = float((weight * (2 * self.xy - self.xx @ weight)).sum())
        return 1 - explained / total if total > 0 else 0.0


@dataclass(frozen=True)
class DualMoments:
    """What `RowMoments` is, for layers with more regressors than rows: the same weights from the rows' products with each other.

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
    def of(cls, x: Tensor, y: Tensor) -> DualMoments:
        """From rows (R, G, d) and (R, G, o).

        Raises:
            NonFiniteError: NaN or Inf in the rows.

        Example:
            >>> x, y, a = torch.randn(20, 1, 50).double(), torch.randn(20, 1, 2).double(), torch.zeros(1, 50, 2).double()
            >>> torch.allclose(DualMoments.of(x, y).weight(a, ridge=0.1), RowMoments.of(x, y).weight(a, ridge=0.1))
            True
        """
        of_x, of_y = x.double().transpose(0, 1), y.double().transpose(0, 1)
        mean_x, mean_y = of_x.mean(1), of_y.mean(1)
        if not bool(mean_x.isfinite().all() and mean_y.isfinite().all()):
            raise NonFiniteError("NaN or Inf in what the layer reads, or in what it should give")
        return cls(mean_x, mean_y, of_x - mean_x[:, None], of_y - mean_y[:, None])

    def restricted(self, at: Tensor) -> DualMoments:
        """Of these columns alone."""
        return DualMoments(self.mean_x[:, at], self.mean_y, self.x[:, :, at], self.y)

    def weight(self, original: Tensor, keep: Tensor | None = None, ridge: float = 1e-4) -> Tensor:
        """(G, d, o), see `RowMoments.weight`: `A + Xᵀ(XXᵀ + nλ)⁻¹(Y - XA)`."""
        left = torch.ones_like(self.mean_x) if keep is None else keep.to(self.mean_x)
        x, start = self.x * left[:, None], original * left[..., None]
        if math.isinf(ridge):
            return start
        products = x @ x.mT
        trace = products.diagonal(dim1=1, dim2=2).sum(1) / left.sum(1).clamp_min(1)  # rows times the mean variance
        diagonal = ((ridge + TINY) * torch.where(trace > 0, trace, torch.ones_like(trace)))[:, None].expand(-1, x.shape[1])
        factor = lower_factor(products, diagonal)
        return start + x.mT @ torch.cholesky_solve(self.y - x @ start, factor)

    def bias(self, weight: Tensor) -> Tensor:
        """(G, o): the intercept that goes with a weight."""
        return _intercept(self.mean_x, self.mean_y, weight)

    def variance(self, weight: Tensor) -> Tensor:
        """(G, o): variance of what a weight gives on the rows."""
        return (self.x @ weight).square().mean(1)


def _intercept(mean_x: Tensor, mean_y: Tensor, weight: Tensor) -> Tensor:
    return mean_y - (weight.mT @ mean_x[..., None])[..., 0]
