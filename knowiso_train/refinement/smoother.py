"""Ridge regression of class scores on rows of features, many times on the same rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Smoother:
    """Ridge regression with intercept of any targets on the same rows, from one eigendecomposition of the smaller Gram matrix.

    Ridges are relative to the mean eigenvalue over `min(N, D)` directions.

    Args:
        features: rows (N, D), float64.

    Example:
        >>> x = torch.randn(40, 3, dtype=torch.float64)
        >>> weight, bias = Smoother(x).solve(x @ torch.ones(3, 1).double() + 5, 1e-12)
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
        centre = targets.mean(0)
        centred = targets - centre
        rotated = self.vectors.T @ (self.rows.T @ centred if self.tall else centred)
        inner = self.vectors @ (rotated / (self.values + ridge * self.scale)[:, None])
        weight = inner if self.tall else self.rows.T @ inner
        return weight, centre - self.mean @ weight

    def fitted(self, targets: Tensor, ridge: float) -> Tensor:
        """Predictions for the same rows, (N, C)."""
        weight, _ = self.solve(targets, ridge)
        return self.rows @ weight + targets.mean(0)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(N,) → (N, classes), float64."""
    return F.one_hot(labels, classes).double()


def sharpened(scores: Tensor, sharpness: float) -> Tensor:
    """Scores that approximate probabilities, made decided: `softmax(sharpness · scores)`, or the first guess where sharpness is infinite.

    Example:
        >>> sharpened(torch.tensor([[0.2, 0.4]]), float("inf"))
        tensor([[0., 1.]], dtype=torch.float64)
    """
    if sharpness == float("inf"):
        return one_hot(scores.argmax(1), scores.shape[1])
    return (scores.double() * sharpness).softmax(1)
