"""Knowledge Review, a published distillation loss on feature maps (arXiv 2104.09044)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fusion(nn.Module):
    """Attention-based fusion (ABF) of Chen et al. 2021, §3.3.

    It adds the feature of a stage and the fused feature of the deeper stage, weighted by position.
    """

    def __init__(self, channels: int, middle: int, out: int, deepest: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(channels, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.outer = nn.Sequential(nn.Conv2d(middle, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))
        self.gates = None if deepest else nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid())
        for convolution in (self.inner[0], self.outer[0]):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, feature: Tensor, deeper: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the feature that is compared with the teacher, on its grid, and the input of the shallower stage."""
        fused = self.inner(feature)
        if self.gates is not None and deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[2:], mode="nearest")
            gates = self.gates(torch.cat([fused, deeper], 1))
            fused = fused * gates[:, :1] + deeper * gates[:, 1:]
        if tuple(fused.shape[2:]) != grid:
            fused = F.interpolate(fused, grid, mode="nearest")
        return self.outer(fused), fused


class ReviewKD(nn.Module):
    """Knowledge Review of Chen, Liu, Zhao & Jia (CVPR 2021): each stage of the teacher also teaches deeper stages.

    As in their published code, the pooled last stage is the deepest feature, and the middle width is min(512, the
    student's last). The published weight grows linearly over the first 20 epochs and depends on the pair of networks.
    """

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int]) -> None:
        super().__init__()
        students, teachers = [*student_channels, student_channels[-1]], [*teacher_channels, teacher_channels[-1]]
        middle, last = min(512, students[-1]), len(students) - 1
        self.fusions = nn.ModuleList(
            Fusion(s, middle, t, i == last) for i, (s, t) in enumerate(zip(students, teachers, strict=True))
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        students, teachers = ([*features, features[-1].mean((2, 3), keepdim=True)] for features in (student, teacher))
        losses, deeper = [], None
        for fusion, s, t in zip(list(self.fusions)[::-1], students[::-1], teachers[::-1], strict=True):
            compared, deeper = fusion(s, deeper, tuple(t.shape[2:]))
            losses.append(hierarchical_context(compared, t))
        return torch.stack(losses).sum()


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the HCL loss of the same paper, §3.4.

    It is the weighted mean of squared errors at the full grid and at 4×4, 2×2 and 1×1 where these are coarser. Each
    weight is half of the one before.
    """
    total, weight, weights = F.mse_loss(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        if side < student.shape[2]:
            weight /= 2
            total = total + weight * F.mse_loss(
                F.adaptive_avg_pool2d(student, side), F.adaptive_avg_pool2d(teacher, side)
            )
            weights += weight
    return total / weights
