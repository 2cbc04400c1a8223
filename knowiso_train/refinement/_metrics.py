"""Accuracy, calibration, and paired cross-validation of classifiers."""

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
SIGNIFICANCE_STD_ERRORS = 1.5  # standard errors of a significant difference in cross-validation
DROP_STD_ERRORS = 2.0  # standard errors of a significant drop of one accuracy
MIN_BINOMIAL_VARIANCE = 1e-4  # lower bound of p(1 − p), for accuracies near 0 and 100 %


@dataclass(frozen=True)
class Score:
    """Accuracy and calibration of a classifier.

    Attributes:
        accuracy: Top-1 accuracy in percent.
        ece: Expected calibration error in percent points.
        num_images: Number of images.
    """

    accuracy: float
    ece: float
    num_images: int


def classification_score(logits: Tensor, labels: Tensor) -> Score:
    """Compute top-1 accuracy and expected calibration error, with 15 bins of equal width.

    Args:
        logits: (N, C).
        labels: (N,).

    Raises:
        ShapeError: Logits and labels of different shapes.

    References:
        Guo et al., *On Calibration of Modern Neural Networks* (ICML 2017).

    Examples:
        >>> classification_score(torch.tensor([[9.0, -9.0], [9.0, -9.0]]), torch.tensor([0, 1]))
        Score(accuracy=50.0, ece=49.99..., num_images=2)
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ShapeError(f"expected logits (N, C) and labels (N,), got {tuple(logits.shape)} and {tuple(labels.shape)}")
    confidence, prediction = logits.double().softmax(1).max(1)
    correct = (prediction == labels).double()
    bins = (confidence * NUM_CALIBRATION_BINS).long().clamp(max=NUM_CALIBRATION_BINS - 1)
    # ECE = Σ_b |B_b|/N · |acc(B_b) − conf(B_b)| = 1/N · Σ_b |Σ_{n in B_b} (correct_n − confidence_n)|
    gaps = torch.zeros(NUM_CALIBRATION_BINS, dtype=torch.float64).index_add_(0, bins, correct - confidence)
    return Score(100 * float(correct.mean()), 100 * float(gaps.abs().sum()) / len(labels), len(labels))


def significantly_less(after: Score, before: Score) -> bool:
    """Return whether an accuracy fell by more than two standard errors of the accuracy before.

    Examples:
        >>> before = Score(80.0, 1.0, 400)
        >>> significantly_less(Score(70.0, 1.0, 400), before)
        True
        >>> significantly_less(Score(70.0, 1.0, 20), Score(80.0, 1.0, 20))
        False
    """
    p = before.accuracy / 100
    std_error = 100 * math.sqrt(max(p * (1 - p), MIN_BINOMIAL_VARIANCE) / before.num_images)
    return after.accuracy < before.accuracy - DROP_STD_ERRORS * std_error


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """Search the temperature T with the least cross-entropy of `logits / T`. Predictions do not change.

    Args:
        logits: (N, C).
        labels: (N,).

    Examples:
        >>> best_temperature(torch.tensor([[0.1, 0.0], [0.0, 0.1]]), torch.tensor([0, 1]))
        0.001
    """
    rows = torch.arange(len(labels))
    return min(TEMPERATURE_GRID, key=lambda t: float(-(logits.double() / t).log_softmax(1)[rows, labels].mean()))


@dataclass(frozen=True)
class PairedCV:
    """Paired difference of two classifiers' accuracies in cross-validation.

    Attributes:
        gain: Mean difference in percent points.
        std_error: Standard error of the gain over the images. Infinite: too few images.
    """

    gain: float
    std_error: float

    @classmethod
    def from_differences(cls, differences: Tensor) -> PairedCV:
        """Summarize per-image differences (N,) of correctness, each -1, 0 or 1."""
        percent = 100 * differences
        return cls(float(percent.mean()), float(percent.std()) / len(percent) ** 0.5)

    @property
    def significantly_worse(self) -> bool:
        """True where the first classifier is worse by more than 1.5 standard errors."""
        return self.gain < -SIGNIFICANCE_STD_ERRORS * self.std_error

    @property
    def significantly_better(self) -> bool:
        """True where the first classifier is better by more than 1.5 standard errors."""
        return self.gain > SIGNIFICANCE_STD_ERRORS * self.std_error


def consensus_vs_labels_cv(
    consensus: ConsensusFeatures,
    features: Tensor,
    index: Tensor,
    labels: Tensor,
    num_classes: int,
    config: HeadConfig,
    seed: int = 0,
) -> PairedCV:
    """Compare `consensus_head` with a ridge classifier of the labels alone, by five-fold cross-validation.

    Images of the left-out fold stay among the unlabeled images of the consensus head.

    Args:
        consensus: Prepared features of all images.
        features: (n, D) features of the labeled images, of the network to refine.
        index: (n,) indices of the labeled images among all images.
        labels: (n,).
        num_classes: Number of classes C.
        config: Settings of the consensus head. The ridge classifier takes its `label_ridge`.
        seed: Seed of the folds.

    Examples:
        >>> labels = torch.arange(400) % 2
        >>> networks = [torch.cat([labels[:, None] * 4.0, 2 * torch.randn(400, 6)], 1) for _ in range(3)]
        >>> consensus, index = ConsensusFeatures.from_views(networks), torch.arange(40)
        >>> cv = consensus_vs_labels_cv(consensus, networks[0][:40], index, labels[:40], 2, HeadConfig())
        >>> cv.significantly_worse
        False
    """
    if len(index) < 2 * NUM_FOLDS:
        return PairedCV(0.0, float("inf"))
    differences = []
    for test, train in _folds(labels, seed):
        heads = (
            consensus.head(index[train], labels[train], num_classes, config),
            ridge_head(features[train], labels[train], num_classes, config.label_ridge),
        )
        of_consensus, of_labels = ((head(features[test]).argmax(1) == labels[test]).double() for head in heads)
        differences.append(of_consensus - of_labels)
    return PairedCV.from_differences(torch.cat(differences))


def own_vs_labels_cv(
    scores: Tensor, features: Tensor, labels: Tensor, num_classes: int, ridge: float, seed: int = 0
) -> PairedCV:
    """Compare an existing classifier with a ridge classifier of the labels alone, by five-fold cross-validation.

    Args:
        scores: (n, C) scores of the existing classifier on the labeled images.
        features: (n, D) features of these images.
        labels: (n,).
        num_classes: Number of classes C.
        ridge: Ridge of the new classifier.
        seed: Seed of the folds.

    Examples:
        >>> labels = torch.arange(60) % 3
        >>> scores = 10.0 * torch.eye(3)[labels]
        >>> own_vs_labels_cv(scores, torch.randn(60, 4), labels, 3, ridge=0.1).significantly_better
        True
    """
    if len(labels) < 2 * NUM_FOLDS:
        return PairedCV(0.0, float("inf"))
    differences = []
    for test, train in _folds(labels, seed):
        new_scores = ridge_head(features[train], labels[train], num_classes, ridge)(features[test])
        existing, new = ((part.argmax(1) == labels[test]).double() for part in (scores[test], new_scores))
        differences.append(existing - new)
    return PairedCV.from_differences(torch.cat(differences))


def _folds(labels: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield indices of each stratified fold's test images and the mask of its training images."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    # Sorted by class: every NUM_FOLDS-th image gives each fold its share of every class
    order = shuffled[labels[shuffled].argsort(stable=True)]
    for fold in range(NUM_FOLDS):
        test = order[fold::NUM_FOLDS]
        train = torch.ones(len(labels), dtype=torch.bool)
        train[test] = False
        yield test, train
