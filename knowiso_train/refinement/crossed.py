"""Whether guesses on unlabelled images help, and whether a new classifier does: labelled images, left out in turn, tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from knowiso_train.refinement.head import Consensus, HeadRecipe, ridge_head

FOLDS = 5
CLEARLY = 1.5  # standard errors


@dataclass(frozen=True)
class Crossed:
    """One classifier's accuracy over another's, on labelled images that what is fitted did not see the labels of.

    Attributes:
        gain: percentage points.
        error: its standard error over the images; infinite where there are too few of them.
    """

    gain: float
    error: float

    @property
    def misled(self) -> bool:
        """Whether it is clearly worse."""
        return self.gain < -CLEARLY * self.error

    @property
    def clear(self) -> bool:
        """Whether it is clearly better."""
        return self.gain > CLEARLY * self.error


def crossed(consensus: Consensus, features: Tensor, index: Tensor, labels: Tensor, classes: int, recipe: HeadRecipe, seed: int = 0) -> Crossed:
    """`consensus_head` over the labels alone, both without a fifth of the labels and judged on it, five times. Images whose labels are left out are
    among the unlabelled ones.

    Args:
        consensus: of all images.
        features: (n, D) of the labelled images, of the network that is refined.
        index: (n,) where they are among all images.
        labels: (n,).
        classes: C.
        recipe: of the consensus head; the labels alone take its `few_ridge`.
        seed: of the folds.

    Example:
        >>> labels = torch.arange(400) % 2
        >>> networks = [torch.cat([labels[:, None] * 4.0, 2 * torch.randn(400, 6)], 1) for _ in range(3)]
        >>> crossed(Consensus.of(networks), networks[0][:40], torch.arange(40), labels[:40], 2, HeadRecipe()).misled
        False
    """
    if len(index) < 2 * FOLDS:
        return Crossed(0.0, float("inf"))
    gains = []
    for out, known in _folds(labels, seed):
        heads = (
            consensus.head(index[known], labels[known], classes, recipe),
            ridge_head(features[known], labels[known], classes, recipe.few_ridge),
        )
        ours, alone = ((head(features[out]).argmax(1) == labels[out]).double() for head in heads)
        gains.append(ours - alone)
    return _judged(torch.cat(gains))


def own_over_labels(scores: Tensor, features: Tensor, labels: Tensor, classes: int, ridge: float, seed: int = 0) -> Crossed:
    """Accuracy of a classifier that is there over one from the labels alone, on labelled images that the latter did not see the labels of.

    Args:
        scores: (n, C) of the classifier that is there, on the labelled images.
        features: (n, D) of these.
        labels: (n,).
        classes: C.
        ridge: of the labels' own classifier.
        seed: of the folds.

    Example:
        >>> labels = torch.arange(60) % 3
        >>> own_over_labels(10.0 * torch.eye(3)[labels], torch.randn(60, 4), labels, 3, ridge=0.1).clear
        True
    """
    if len(labels) < 2 * FOLDS:
        return Crossed(0.0, float("inf"))
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
    for fold in range(FOLDS):
        out = order[fold::FOLDS]
        known = torch.ones(len(labels), dtype=torch.bool)
        known[out] = False
        yield out, known


def _judged(gains: Tensor) -> Crossed:
    gain = 100 * gains
    return Crossed(float(gain.mean()), float(gain.std()) / len(gain) ** 0.5)
