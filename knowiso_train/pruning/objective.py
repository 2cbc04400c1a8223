"""What a short tuning makes small, on the images that train and on those that choose alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from knowiso_train.losses import kd_loss


@dataclass(frozen=True)
class Objective:
    """A weighted sum of the features' distance, the logits' divergence and the cross-entropy; divergences of weight 0 are not computed.

    Attributes:
        features: weight of `distance`.
        logits: weight of `divergence`.
        labels: weight of the cross-entropy with the labels.
        temperature: of the logits' divergence.

    Example:
        >>> import torch
        >>> objective, logits = Objective(labels=2.0), torch.zeros(1, 2)
        >>> round(float(objective(torch.tensor(0.5), logits, logits, scale=1.0, truth=torch.tensor([1]))), 3)  # 0.5 + 2 ln 2
        1.886
    """

    features: float = 1.0
    logits: float = 0.0
    labels: float = 0.0
    temperature: float = 1.0

    def __call__(self, apart: Tensor, made: Tensor, given: Tensor, scale: float, truth: Tensor | None = None) -> Tensor:
        """Scalar, the mean over the images.

        Args:
            apart: the features' `distance`.
            made: (N, …) outputs of the network that is trained.
            given: the original's for the same images.
            scale: of `divergence`.
            truth: (N,) labels; None where they have no weight.
        """
        total = self.features * apart
        if self.logits:
            total = total + self.logits * divergence(made, given, scale, self.temperature)
        if self.labels and truth is not None:
            total = total + self.labels * F.cross_entropy(made, truth.to(made.device))
        return total


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
