"""Callbacks of training loops."""

from knowiso_train.callbacks.history import Measurement
from knowiso_train.callbacks.isomorphism import IsomorphismCallback

__all__ = [
    "IsomorphismCallback",
    "Measurement",
]
