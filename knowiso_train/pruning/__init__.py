"""Pruning, refitting and fine-tuning."""

from knowiso_train.pruning.augmentation import cutmix
from knowiso_train.pruning.finetune import finetune
from knowiso_train.pruning.index_tracking import track_kept_indices
from knowiso_train.pruning.kept_indices import compose_kept_indices
from knowiso_train.pruning.optimizer_state import preserve_optimizer_state, transfer_optimizer_state
from knowiso_train.pruning.refit import refit
from knowiso_train.pruning.serialization import load_kept_indices

__all__ = [
    "compose_kept_indices",
    "cutmix",
    "finetune",
    "load_kept_indices",
    "preserve_optimizer_state",
    "refit",
    "track_kept_indices",
    "transfer_optimizer_state",
]
