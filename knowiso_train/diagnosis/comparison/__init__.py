"""Comparison of a reference network with stages: compressed or distilled descendants, checkpoints of a training."""

from knowiso_train.diagnosis.comparison.checkpoints import CheckpointStage, checkpoint_stages
from knowiso_train.diagnosis.comparison.compare import compare_stages
from knowiso_train.diagnosis.comparison.report import StageComparison, StageLayer, StageResult

__all__ = [
    "CheckpointStage",
    "StageComparison",
    "StageLayer",
    "StageResult",
    "checkpoint_stages",
    "compare_stages",
]
