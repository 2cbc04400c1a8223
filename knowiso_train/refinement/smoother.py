"""Ridge regression of class scores on rows of features, many times on the same rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DECIDED = 12.0  # sharpness at which proportions are counted where guesses are all or nothing
ROUNDS = 20
SMALLEST = 1e-12


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


def sharpened(scores: Tensor, sharpness: float, shares: Tensor | None = None) -> Tensor:
    """Scores that approximate probabilities, made decided: `softmax(sharpness · scores)`, or the first guess where sharpness is infinite.

    Guesses favour some classes, and classifiers fitted to them favour them more. With `shares`, a bias for each class brings the guesses to these
    proportions (distribution alignment, Berthelot et al. 2020; as one half of Sinkhorn's iteration, the sums of the images being one).

    Args:
        scores: (N, C).
        sharpness: of the guesses.
        shares: (C,) > 0, of the classes among the images.

    Example:
        >>> sharpened(torch.tensor([[0.2, 0.4]]), float("inf"))
        tensor([[0., 1.]], dtype=torch.float64)
        >>> scores = torch.tensor([[0.0, 0.4], [0.0, 0.3], [0.0, 0.2], [0.0, 0.1]])
        >>> sharpened(scores, float("inf"), torch.tensor([0.5, 0.5])).argmax(1)
        tensor([1, 1, 0, 0])
    """
    hard = sharpness == float("inf")
    decided = scores.double() * (DECIDED if hard else sharpness)
    if shares is not None and len(scores):
        wanted, bias = (shares.double() / shares.sum()).log(), torch.zeros(scores.shape[1], dtype=torch.float64, device=scores.device)
        for _ in range(ROUNDS):
            bias = bias + wanted - (decided + bias).softmax(1).mean(0).clamp_min(SMALLEST).log()
        decided = decided + bias
    return one_hot(decided.argmax(1), scores.shape[1]) if hard else decided.softmax(1)


def class_shares(labels: Tensor, classes: int) -> Tensor:
    """(C,) among some labels, each class counted once more than it was seen.

    Example:
        >>> class_shares(torch.tensor([0, 0, 1]), 3).tolist()
        [0.5, 0.3333333333333333, 0.16666666666666666]
    """
    counts = torch.bincount(labels, minlength=classes).double() + 1
    return counts / counts.sum()
