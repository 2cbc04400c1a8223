"""Published distillation losses on logits that the library does not have: standardized KD and DIST."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def standardized_kd(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """Compute KD on logits that are standardized per image (Sun et al., CVPR 2024, arXiv 2403.01427, eq. 8).

    The standard deviation is the unbiased one, as in the published code, and the loss has the factor T². Published
    weight: 9, with 0.1 for the cross-entropy.
    """

    def standardize(logits: Tensor) -> Tensor:
        return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7) / temperature

    student, teacher = (F.log_softmax(standardize(logits), 1) for logits in (student, teacher))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def dist_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Compute the sum of DIST's inter-class and intra-class losses (Huang et al., NeurIPS 2022, arXiv 2205.10536).

    Each is 1 minus a mean Pearson correlation of the probabilities: over the classes of an image (eq. 8), and over the
    images of a class (eq. 9), times T². Published weight on CIFAR-100: 2, at T = 4.
    """
    student, teacher = ((logits / temperature).softmax(1) for logits in (student, teacher))
    inter = 1 - _pearson(student, teacher).mean()
    intra = 1 - _pearson(student.T, teacher.T).mean()
    return (inter + intra) * temperature**2


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Return the correlation of every row."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1, eps=1e-8)
