"""Distillation losses."""

from knowiso_train.distillation.config import IsomorphismLossConfig
from knowiso_train.distillation.kd import WeightSchedule, dist_loss, dkd_loss, kd_loss, mlkd_loss, standardized_kd_loss
from knowiso_train.distillation.layer_selection import Suggestion, suggest_layers
from knowiso_train.distillation.loss import IsomorphismLoss

__all__ = [
    "IsomorphismLoss",
    "IsomorphismLossConfig",
    "Suggestion",
    "WeightSchedule",
    "dist_loss",
    "dkd_loss",
    "kd_loss",
    "mlkd_loss",
    "standardized_kd_loss",
    "suggest_layers",
]
