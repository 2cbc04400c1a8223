"""How often a network is right, and how well it knows it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from knowiso_train.errors import ShapeError

BINS = 15
TEMPERATURES = tuple(10 ** (e / 20) for e in range(-60, 41))


@dataclass(frozen=True)
class Score:
    """Accuracy in percent, expected calibration error in percent points, on so many images."""

    accuracy: float
    ece: float
    images: int


def score(logits: Tensor, labels: Tensor) -> Score:
    """Top-1 accuracy and expected calibration error (15 bins of equal width).

    Args:
        logits: (N, C).
        labels: (N,).

    Raises:
        ShapeError: they do not fit.

    Source: Guo et al., *On Calibration of Modern Neural Networks* (ICML 2017).

    Example:
        >>> score(torch.tensor([[9.0, -9.0], [9.0, -9.0]]), torch.tensor([0, 1]))
        Score(accuracy=50.0, ece=49.99..., images=2)
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ShapeError(f"expected logits (N, C) and labels (N,), got {tuple(logits.shape)} and {tuple(labels.shape)}")
    sure, guess = logits.double().softmax(1).max(1)
    right = (guess == labels).double()
    which = (sure * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, which, right - sure)
    return Score(100 * float(right.mean()), 100 * float(gaps.abs().sum()) / len(labels), len(labels))


def clearly_less(after: Score, before: Score) -> bool:
    """Whether an accuracy fell by more than two standard errors of one share.

    Example:
        >>> clearly_less(Score(70.0, 1.0, 400), Score(80.0, 1.0, 400)), clearly_less(Score(70.0, 1.0, 20), Score(80.0, 1.0, 20))
        (True, False)
    """
    share = before.accuracy / 100
    return after.accuracy < before.accuracy - 200 * math.sqrt(max(share * (1 - share), 1e-4) / before.images)


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """T with the least cross-entropy of `logits / T`; it changes no guess.

    Example:
        >>> best_temperature(torch.tensor([[0.1, 0.0], [0.0, 0.1]]), torch.tensor([0, 1]))
        0.001
    """
    rows = torch.arange(len(labels))
    return min(TEMPERATURES, key=lambda t: float(-(logits.double() / t).log_softmax(1)[rows, labels].mean()))
