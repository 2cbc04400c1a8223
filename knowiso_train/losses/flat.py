"""Features that do not vary: nothing can be explained of them, and they explain nothing."""

from __future__ import annotations

import warnings
from typing import Any

from knowiso_train.errors import KnowisoWarning

RESOLUTION = 1e-6  # a spread below this part of the mean is float32 rounding


def warn_once(part: Any, message: str) -> None:
    """A KnowisoWarning, the first time for this part of the loss."""
    if not getattr(part, "warned", False):
        warnings.warn(message, KnowisoWarning, stacklevel=2)
    part.warned = True
