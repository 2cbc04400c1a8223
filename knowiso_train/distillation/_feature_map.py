"""Base of the maps from student to teacher features, and checks that they share."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from knowiso_train.errors import KnowisoWarning, NonFiniteError
from knowiso_train.features.modules import LayerPair
from knowiso_train.features.state import KeepPrecision


def warn_once(part: Any, message: str, kind: str = "") -> None:
    """Issue a KnowisoWarning the first time that a part of the loss calls this with a kind of message."""
    issued: set[str] = vars(part).setdefault("issued_warnings", set())
    if kind not in issued:
        warnings.warn(message, KnowisoWarning, stacklevel=2)
    issued.add(kind)


def replaced(buffer: Tensor, values: Tensor) -> Tensor:
    """Return a new tensor of a buffer's dtype, device and layout with other values."""
    return torch.empty_like(buffer).copy_(values)


def check_finite(pair: LayerPair, loss: Tensor, feature: Tensor, target: Tensor, step: int) -> None:
    """Check that the loss is finite; reads it from its device.

    Raises:
        NonFiniteError: NaN or Inf; the message names layer and step.
    """
    if bool(loss.detach().isfinite()):
        return
    counts = [
        f"{role} {name!r}: {int((~values.isfinite()).sum())} of {values.numel()} values"
        for role, name, values in (
            ("student's", pair.source, feature.detach()),
            ("teacher's", pair.target, target),
        )
    ]
    raise NonFiniteError(
        f"NaN or Inf in the isomorphism loss at step {step} (counted from 0), not finite are {'; '.join(counts)}. "
        "The moments do not include that batch; check learning rate, images and the autocast dtype"
    )


class FeatureMap(KeepPrecision):
    """Base of the maps g from student to teacher features; counts the calls with an update.

    Attributes:
        name: Layer pair, for messages.
        refresh: Calls between solves.
        calls: Number of calls with `update=True`; `IsomorphismLoss` saves and restores it.
        ready: Whether the map is solved; before that the loss is 0.
    """

    def __init__(self, name: str, refresh: int) -> None:
        super().__init__()
        self.name, self.refresh = name, refresh
        self.calls, self.ready = 0, False

    @property
    def solve_due(self) -> bool:
        """True if the coming call solves the map: at every `refresh`-th call, and until there are enough samples."""
        return self.calls % self.refresh == 0 or not self.ready
