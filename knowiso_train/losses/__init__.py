"""Losses for any training loop: what the student does not explain of the teacher, and logit distillation beside it."""

from knowiso_train.losses.isomorphism import IsomorphismLoss
from knowiso_train.losses.logits import dkd_loss, kd_loss
from knowiso_train.losses.schedule import WeightSchedule
from knowiso_train.losses.suggest import Suggestion, suggest_layers

__all__ = ["IsomorphismLoss", "Suggestion", "WeightSchedule", "dkd_loss", "kd_loss", "suggest_layers"]
