"""What a training loop holds: a measurement every n steps, its curves and its report."""

from knowiso_train.callbacks.history import Measured
from knowiso_train.callbacks.isomorphism import IsomorphismCallback

__all__ = ["IsomorphismCallback", "Measured"]
