"""timm's own `FeatureDistillationTask` on features that are computed elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FeatureHolder(nn.Module):
    """Stand-in for a timm network that returns the pooled features and logits that it was given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features, self.num_classes, self.in_chans = width, width, 3
        self.pretrained_cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
        self.pooled = self.logits = torch.empty(0)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the pooled features in place of a feature map."""
        return self.pooled

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the pooled features, or the logits."""
        return features if pre_logits else self.logits


class TimmFeatureTask(nn.Module):
    """Distillation term of timm's `FeatureDistillationTask` (timm ≥ 1.0.24): squared error of pooled features.

    The student's feature is mapped linearly where the widths differ. Weight in timm's examples: 5.
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        from timm.task import FeatureDistillationTask

        self.holders = FeatureHolder(student_width), FeatureHolder(teacher_width)
        criterion = nn.CrossEntropyLoss()
        self.task: Any = FeatureDistillationTask(
            *self.holders, criterion=criterion, distill_loss_weight=1.0, device=torch.device("cpu"), verbose=False
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        for holder, features in zip(self.holders, (student, teacher), strict=True):
            holder.pooled, holder.logits = features, features
        loss: Tensor = self.task(student.new_zeros(1, 3, 1, 1), torch.zeros(len(student), dtype=torch.long))["kd_loss"]
        return loss
