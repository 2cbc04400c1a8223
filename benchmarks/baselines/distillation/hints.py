"""Published distillation losses on feature maps: FitNet, attention transfer and SimKD.

Each takes the lists of student and teacher features, (N, C, H, W), from shallow to deep, and returns a scalar. The
docstrings name the published weight of the term; the caller multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FitNet(nn.Module):
    """FitNet hints (Romero et al., ICLR 2015, eq. 3): squared error of the adapted student, summed over the pairs.

    The adapter is a 1×1 convolution, batch norm and ReLU, as in the published code of Tian et al. (*Contrastive
    Representation Distillation*, ICLR 2020), because the features follow a ReLU. It is trained with the student, in one
    stage with the other losses. Grids must be equal. Published weight: 100. Other forms of the adapter are not
    published: `kernel_size=3` has as many parameters as the 3×3 maps of `IsomorphismLoss`, and `linear=True` leaves the
    ReLU out.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        kernel_size: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(s, t, kernel_size, padding=kernel_size // 2),
                nn.BatchNorm2d(t),
                nn.Identity() if linear else nn.ReLU(inplace=True),
            )
            for s, t in zip(student_channels, teacher_channels, strict=True)
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        losses = [F.mse_loss(adapter(s), t) for adapter, s, t in zip(self.adapters, student, teacher, strict=True)]
        return torch.stack(losses).sum()


class AttentionTransfer(nn.Module):
    """Attention transfer of Zagoruyko & Komodakis (ICLR 2017), eq. 2 with p = 2, as in their published code.

    Squares are averaged over channels and divided by their norm over positions. The loss is the mean squared
    difference, summed over the pairs. The finer grid is average-pooled. Published weight: 1,000.
    """

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        losses = []
        for s, t in zip(student, teacher, strict=True):
            grid = min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3])
            losses.append(F.mse_loss(self.attention(s, grid), self.attention(t, grid)))
        return torch.stack(losses).sum()

    @staticmethod
    def attention(feature: Tensor, grid: tuple[int, int]) -> Tensor:
        feature = feature if tuple(feature.shape[2:]) == grid else F.adaptive_avg_pool2d(feature, grid)
        return F.normalize(feature.square().mean(1).flatten(1))


class SimKD(nn.Module):
    """Feature part of SimKD (Chen et al., CVPR 2022, arXiv 2203.14001): squared error at the last stage.

    The projector is the published bottleneck of 1×1, 3×3 and 1×1 convolutions, each with batch norm and ReLU, at half
    the width of the teacher. The student is trained on this loss alone, with weight 1, and classifies by the teacher's
    classifier on the projected feature. The finer grid is average-pooled.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        middle = teacher_channels // 2
        kernels = [(student_channels, middle, 1), (middle, middle, 3), (middle, teacher_channels, 1)]
        self.projector = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))
                for i, o, k in kernels
            )
        )

    def project(self, student: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the feature that replaces the teacher's, on a grid of positions."""
        projected: Tensor = self.projector(F.adaptive_avg_pool2d(student, grid))
        return projected

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        grid = min(student[-1].shape[2], teacher[-1].shape[2]), min(student[-1].shape[3], teacher[-1].shape[3])
        return F.mse_loss(self.project(student[-1], grid), F.adaptive_avg_pool2d(teacher[-1], grid))
