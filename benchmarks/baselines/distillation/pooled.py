"""Published distillation losses on the pooled features in front of the classifier: SRD, VkD, CRD and ITRD.

Each takes the features of student and teacher, (N, D), and returns a scalar. The docstrings name the published weight
of the term; the caller multiplies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class SRD(nn.Module):
    """Simple recipe of Miles & Mikolajczyk (AAAI 2024, arXiv 2303.11098): log of the sum of 4th powers.

    The student's feature is mapped linearly, and both features are batch-normalized without gain and shift. Published
    weight: 1.
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.map = nn.Linear(student_width, teacher_width)
        self.student_norm, self.teacher_norm = (nn.BatchNorm1d(teacher_width, 1e-4, affine=False) for _ in range(2))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        difference = self.student_norm(self.map(student)) - self.teacher_norm(teacher)
        return difference.pow(4).sum().log()


class VkD(nn.Module):
    """VkD of Miles, Elezi & Deng (CVPR 2024, arXiv 2403.06213): orthogonal map to the layer-normed teacher.

    The distance is the smooth L1 loss. Published weight: 1.
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.map = parametrizations.orthogonal(nn.Linear(student_width, teacher_width, bias=False))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.smooth_l1_loss(self.map(student), F.layer_norm(teacher, teacher.shape[1:]))


class CRD(nn.Module):
    """Contrastive distillation of Tian, Krishnan & Isola (ICLR 2020, arXiv 1910.10699), with negatives in the batch.

    Published are 16,384 negatives from a memory bank with a noise-contrastive estimate. Here the negatives are the
    other images of the batch, as in InfoNCE: cross-entropy of the similarities / 0.07 of 128-dimensional normalized
    linear embeddings, averaged over both directions. Published weight: 0.8.
    """

    def __init__(self, student_width: int, teacher_width: int, width: int = 128, temperature: float = 0.07) -> None:
        super().__init__()
        self.student_map, self.teacher_map = nn.Linear(student_width, width), nn.Linear(teacher_width, width)
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        embeddings = F.normalize(self.student_map(student)), F.normalize(self.teacher_map(teacher))
        similarities = embeddings[0] @ embeddings[1].T / self.temperature
        images = torch.arange(len(student), device=student.device)
        return (F.cross_entropy(similarities, images) + F.cross_entropy(similarities.T, images)) / 2


class ITRD(nn.Module):
    """Information-theoretic loss of Miles, Rodríguez & Mikolajczyk (arXiv 2112.00459): `2 · L_corr + L_mi`.

    As in the published code, L_corr = log2 Σ |c - 1|^(2α) of the correlations c of mapped student and teacher, with α =
    1.01, and L_mi = Σ G_s² - Σ (G_s ∘ G_t)² of Gram matrices with trace 1. The student is mapped for L_mi where the
    widths differ. Published weight: 1.
    """

    def __init__(self, student_width: int, teacher_width: int, alpha: float = 1.01) -> None:
        super().__init__()
        self.map = nn.Linear(student_width, teacher_width)
        self.alpha = alpha

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        mapped = self.map(student)
        correlations = (_standardize(mapped) * _standardize(teacher)).sum(0) / len(student)
        correlation_loss = (correlations - 1).abs().pow(2 * self.alpha).sum().log2()
        compared = mapped if student.shape[1] != teacher.shape[1] else student
        gram_student, gram_teacher = _gram(compared), _gram(teacher)
        joint = gram_student * gram_teacher
        mutual_loss = (gram_student / gram_student.trace()).square().sum() - (joint / joint.trace()).square().sum()
        return 2.0 * correlation_loss + mutual_loss


def _standardize(features: Tensor) -> Tensor:
    """Return the features with mean 0 and standard deviation 1 over the batch; a constant one becomes 0."""
    return (features - features.mean(0)) / (features.std(0) + 1e-6)


def _gram(features: Tensor) -> Tensor:
    """Return the cosine similarities of all images, (N, N)."""
    normalized = F.normalize(features)
    return normalized @ normalized.T
