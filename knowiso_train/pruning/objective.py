"""What a short tuning makes small, on the images that train and on those that choose alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from knowiso_train.losses import kd_loss
from knowiso_train.pruning.targets import Given, Targets, distance


@dataclass(frozen=True)
class Objective:
    """A weighted sum of the features' distance, the logits' divergence and the cross-entropy; what has weight 0 is not computed.

    Attributes:
        features: weight of `distance`.
        logits: weight of `divergence`.
        labels: weight of the cross-entropy with the labels.
        temperature: of the logits' divergence.

    Example:
        >>> import torch
        >>> from knowiso_train.pruning.calibration import Calibration
        >>> images, model = Calibration([torch.randn(8, 3)]), torch.nn.Linear(3, 2)
        >>> targets = Targets(model, [], images, images.all())
        >>> said = Given({}, torch.zeros(1, 2))
        >>> round(float(Objective(labels=2.0)(said, said, targets, torch.tensor([1]))), 3)  # 2 ln 2
        1.386
    """

    features: float = 1.0
    logits: float = 0.0
    labels: float = 0.0
    temperature: float = 1.0

    def __call__(self, made: Given, given: Given, targets: Targets, truth: Tensor | None = None) -> Tensor:
        """Scalar, the mean over the images.

        Args:
            made: by the network that is trained.
            given: by the original for the same images.
            targets: whose scales divide squared distances.
            truth: (N,) labels; None where they have no weight.
        """
        terms = [made.output.new_zeros(())]
        if self.features:
            terms.append(self.features * distance(made, given, targets))
        if self.logits:
            terms.append(self.logits * divergence(made.output, given.output, targets.output_scale, self.temperature))
        if self.labels and truth is not None:
            terms.append(self.labels * F.cross_entropy(made.output, truth.to(made.output.device)))
        return sum(terms[1:], terms[0])


def divergence(made: Tensor, given: Tensor, scale: float, temperature: float = 1.0) -> Tensor:
    """KL of logits (N, classes) at a temperature; of other outputs their squared distance, divided by `scale`.

    Example:
        >>> import torch
        >>> float(divergence(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), 1.0))
        0.0
    """
    return kd_loss(made, given, temperature) if are_logits(made) else (made - given).square().mean() / scale


def are_logits(output: Tensor) -> bool:
    """Whether it is (N, classes)."""
    return output.ndim == 2 and output.shape[1] > 1
