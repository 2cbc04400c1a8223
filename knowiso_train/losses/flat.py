"""Features that do not vary: nothing can be explained of them, and they explain nothing."""

from __future__ import annotations

import warnings

from torch import nn

from knowiso_train.errors import KnowisoWarning

RESOLUTION = 1e-6  # a spread below this part of the mean is float32 rounding


def warn_once(map_: nn.Module, message: str) -> None:
    """A KnowisoWarning, the first time for this map."""
    if not getattr(map_, "warned", False):
        warnings.warn(message, KnowisoWarning, stacklevel=2)
    setattr(map_, "warned", True)  # noqa: B010  # a plain attribute beside the buffers
