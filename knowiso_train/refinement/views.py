"""What several networks say of the same images, each brought to the same size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowiso_train.errors import NonFiniteError, ShapeError


@dataclass(frozen=True)
class Scaling:
    """`(x - mean) / scale`: mean 0 and a mean variance of 1 over the channels; one scale for all, so directions keep their relative sizes."""

    mean: Tensor
    scale: float

    @classmethod
    def of(cls, features: Tensor, name: str = "the features") -> Scaling:
        """Of rows (N, D).

        Raises:
            ShapeError: not (N, D) with at least two rows.
            NonFiniteError: NaN or Inf.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ShapeError(f"{name}: expected (images, channels) with two images or more, got {tuple(features.shape)}")
        rows = features.double()
        if not bool(rows.isfinite().all()):
            raise NonFiniteError(f"{name}: NaN or Inf in the features; check the images and the weights")
        mean = rows.mean(0)
        scale = float((rows - mean).square().mean().sqrt())
        return cls(mean, scale if scale > 0 else 1.0)

    def __call__(self, features: Tensor) -> Tensor:
        """Rows (N, D) in float64."""
        return (features.double() - self.mean) / self.scale


def ridge_map(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """`(XᵀX + ρ·tr(XᵀX)/d·I)⁻¹ XᵀY` for centred rows, (D_x, D_y).

    Example:
        >>> x = torch.randn(50, 4, dtype=torch.float64)
        >>> torch.allclose(ridge_map(x, x @ torch.ones(4, 2).double(), 1e-12), torch.ones(4, 2).double())
        True
    """
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny))
    found: Tensor = torch.linalg.solve(gram, x.T @ y)
    return found


def isomorphic_parts(views: Sequence[Tensor], ridge: float, width: int | None = None) -> list[Tensor]:
    """Of every view the part from which the others can be told at order 0, as features of its own: (D_i, w) maps, one for each view.

    The regression of all other views on view i has the coefficients A_i; the part is `x A_i`, and the map returned is B_i with `B_i B_iᵀ = A_i A_iᵀ`:
    all scalar products of `x A_i`, in no more columns than view i has. What no other view knows is shrunk; what they agree on stays.

    Args:
        views: rows (N, D_i), centred, two views or more.
        ridge: relative, of the regressions.
        width: keep this many principal components of each part; None keeps all.

    Raises:
        ShapeError: fewer than two views, or other numbers of images.

    Source: order-0 components of arXiv 1908.01581, in both directions; multi-view regression, Kakade & Foster (COLT 2007).

    Example:
        >>> shared, noise = torch.randn(200, 2).double(), torch.randn(2, 200, 3).double()
        >>> views = [torch.cat([shared, own], 1) for own in noise]  # two shared channels, three private ones
        >>> size = isomorphic_parts(views, 1e-3)[0].norm(dim=1)
        >>> bool(size[:2].min() > 3 * size[2:].max())
        True
    """
    if len(views) < 2 or len({len(view) for view in views}) != 1:
        raise ShapeError(f"expected two views or more of the same images, got shapes {[tuple(view.shape) for view in views]}")
    found = []
    for i, view in enumerate(views):
        others = torch.cat([other for j, other in enumerate(views) if j != i], 1)
        coefficients = ridge_map(view, others, ridge)
        values, vectors = torch.linalg.eigh(coefficients @ coefficients.T)
        part = vectors * values.clamp(min=0).sqrt()
        if width is not None and width < part.shape[1]:
            rows = view @ part
            part = part @ torch.linalg.eigh(rows.T @ rows)[1][:, -width:]
        size = (view @ part).square().sum(1).mean().sqrt()
        found.append(part / size.clamp_min(torch.finfo(part.dtype).tiny))
    return found
