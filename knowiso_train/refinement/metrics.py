"""Accuracy, calibration and paired cross-validation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from knowiso_train.errors import ShapeError
from knowiso_train.refinement.heads import ConsensusFeatures, HeadConfig, ridge_head

NUM_CALIBRATION_BINS = 15
TEMPERATURE_GRID = tuple(10 ** (e / 20) for e in range(-60, 41))

NUM_FOLDS = 5
SIGNIFICANCE_STD_ERRORS = 1.5  # standard errors


@dataclass(frozen=True)
class Score:
    """Accuracy in percent, expected calibration error in percent points, on so many images."""

    accuracy: float
    ece: float
    num_images: int


def classification_score(logits: Tensor, labels: Tensor) -> Score:
    """Top-1 accuracy and expected calibration error (15 bins of equal width).

    Args:
        logits: (N, C).
        labels: (N,).

    Raises:
        ShapeError: they do not fit.

    Source: Guo et al., *On Calibration of Modern Neural Networks* (ICML 2017).

    Example:
        >>> classification_score(torch.tensor([[9.0, -9.0], [9.0, -9.0]]), torch.tensor([0, 1]))
        Score(accuracy=50.0, ece=49.99..., num_images=2)
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ShapeError(f"expected logits (N, C) and labels (N,), got {tuple(logits.shape)} and {tuple(labels.shape)}")
    sure, guess = logits.double().softmax(1).max(1)
    right = (guess == labels).double()
    which = (sure * NUM_CALIBRATION_BINS).long().clamp(max=NUM_CALIBRATION_BINS - 1)
    gaps = torch.zeros(NUM_CALIBRATION_BINS, dtype=torch.float64).index_add_(0, which, right - sure)
    return Score(100 * float(right.mean()), 100 * float(gaps.abs().sum()) / len(labels), len(labels))


def significantly_less(after: Score, before: Score) -> bool:
    """Whether an accuracy fell by more than two standard errors of one share.

    Example:
        >>> significantly_less(Score(70.0, 1.0, 400), Score(80.0, 1.0, 400)), significantly_less(Score(70.0, 1.0, 20), Score(80.0, 1.0, 20))
        (True, False)
    """
    share = before.accuracy / 100
    return after.accuracy < before.accuracy - 200 * math.sqrt(max(share * (1 - share), 1e-4) / before.num_images)


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """T with the least cross-entropy of `logits / T`; it changes no guess.

    Example:
        >>> best_temperature(torch.tensor([[0.1, 0.0], [0.0, 0.1]]), torch.tensor([0, 1]))
        0.001
    """
    rows = torch.arange(len(labels))
    return min(TEMPERATURE_GRID, key=lambda t: float(-(logits.double() / t).log_softmax(1)[rows, labels].mean()))


@dataclass(frozen=True)
class PairedCV:
    """One classifier's accuracy over another's, on labeled images that what is fitted did not see the labels of.

    Attributes:
        gain: percentage points.
        error: its standard error over the images; infinite where there are too few of them.
    """

    gain: float
    error: float

    @property
    def significantly_worse(self) -> bool:
        """Whether it is clearly worse."""
        return self.gain < -SIGNIFICANCE_STD_ERRORS * self.error

    @property
    def significantly_better(self) -> bool:
        """Whether it is clearly better."""
        return self.gain > SIGNIFICANCE_STD_ERRORS * self.error


def consensus_vs_labels_cv(
    consensus: ConsensusFeatures,
    features: Tensor,
    index: Tensor,
    labels: Tensor,
    classes: int,
    recipe: HeadConfig,
    seed: int = 0,
) -> PairedCV:
    """`consensus_head` over the labels alone, both without a fifth of the labels and judged on it, five times. Images whose labels are left out are
    among the unlabeled ones.

    Args:
        consensus: of all images.
        features: (n, D) of the labeled images, of the network that is refined.
        index: (n,) where they are among all images.
        labels: (n,).
        classes: C.
        recipe: of the consensus head; the labels alone take its `label_ridge`.
        seed: of the folds.

    Example:
        >>> labels = torch.arange(400) % 2
        >>> networks = [torch.cat([labels[:, None] * 4.0, 2 * torch.randn(400, 6)], 1) for _ in range(3)]
        >>> consensus_vs_labels_cv(ConsensusFeatures.from_views(networks), networks[0][:40], torch.arange(40), labels[:40], 2, HeadConfig()).significantly_worse
        False
    """
    if len(index) < 2 * NUM_FOLDS:
        return PairedCV(0.0, float("inf"))
    gains = []
    for out, known in _folds(labels, seed):
        heads = (
            consensus.head(index[known], labels[known], classes, recipe),
            ridge_head(features[known], labels[known], classes, recipe.label_ridge),
        )
        ours, alone = ((head(features[out]).argmax(1) == labels[out]).double() for head in heads)
        gains.append(ours - alone)
    return _judged(torch.cat(gains))


def own_vs_labels_cv(
    scores: Tensor, features: Tensor, labels: Tensor, classes: int, ridge: float, seed: int = 0
) -> PairedCV:
    """Accuracy of a classifier that is there over one from the labels alone, on labeled images that the latter did not see the labels of.

    Args:
        scores: (n, C) of the classifier that is there, on the labeled images.
        features: (n, D) of these.
        labels: (n,).
        classes: C.
        ridge: of the labels' own classifier.
        seed: of the folds.

    Example:
        >>> labels = torch.arange(60) % 3
        >>> own_vs_labels_cv(10.0 * torch.eye(3)[labels], torch.randn(60, 4), labels, 3, ridge=0.1).significantly_better
        True
    """
    if len(labels) < 2 * NUM_FOLDS:
        return PairedCV(0.0, float("inf"))
    gains = []
    for out, known in _folds(labels, seed):
        alone = ridge_head(features[known], labels[known], classes, ridge)(features[out])
        own, other = ((part.argmax(1) == labels[out]).double() for part in (scores[out], alone))
        gains.append(own - other)
    return _judged(torch.cat(gains))


def _folds(labels: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices of those left out, and a mask of the others; every fold has its share of every class."""
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = mixed[labels[mixed].argsort(stable=True)]
    for fold in range(NUM_FOLDS):
        out = order[fold::NUM_FOLDS]
        known = torch.ones(len(labels), dtype=torch.bool)
        known[out] = False
        yield out, known


def _judged(gains: Tensor) -> PairedCV:
    gain = 100 * gains
    return PairedCV(float(gain.mean()), float(gain.std()) / len(gain) ** 0.5)
