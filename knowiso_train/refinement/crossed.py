"""Whether guesses on unlabelled images help: labelled images, left out in turn, tell."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from knowiso_train.refinement.head import Consensus, HeadRecipe, ridge_head

FOLDS = 5
CLEARLY = 1.5  # standard errors


@dataclass(frozen=True)
class Crossed:
    """Accuracy of `consensus_head` over that of the labels alone, on labelled images that neither saw the labels of.

    Attributes:
        gain: percentage points.
        error: its standard error over the images; infinite where there are too few of them.
    """

    gain: float
    error: float

    @property
    def misled(self) -> bool:
        """Whether the guesses clearly do harm."""
        return self.gain < -CLEARLY * self.error


def crossed(consensus: Consensus, features: Tensor, index: Tensor, labels: Tensor, classes: int, recipe: HeadRecipe, seed: int = 0) -> Crossed:
    """Both classifiers without a fifth of the labels, judged on it, five times; images whose labels are left out are among the unlabelled ones.

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
    count = len(index)
    if count < 2 * FOLDS:
        return Crossed(0.0, float("inf"))
    mixed = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    order, gains = mixed[labels[mixed].argsort(stable=True)], []  # every fold has its share of every class
    for fold in range(FOLDS):
        out = order[fold::FOLDS]
        known = torch.ones(count, dtype=torch.bool)
        known[out] = False
        heads = (
            consensus.head(index[known], labels[known], classes, recipe),
            ridge_head(features[known], labels[known], classes, recipe.few_ridge),
        )
        ours, alone = ((head(features[out]).argmax(1) == labels[out]).double() for head in heads)
        gains.append(ours - alone)
    gain = 100 * torch.cat(gains)
    return Crossed(float(gain.mean()), float(gain.std()) / count**0.5)
