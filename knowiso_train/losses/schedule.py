"""How strong the loss is as training goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from knowiso_train.errors import OptionError

SHAPES = ("cosine", "linear")


@dataclass(frozen=True)
class WeightSchedule:
    """Factor of the loss: up linearly from 0 to 1 over `warmup` calls, then down to `final` at call `total`.

    Args:
        warmup: calls of `iso()` with the loss on until the factor is 1; 0 starts there.
        total: call at which `final` is reached and kept; None never goes down.
        final: factor at the end, in [0, 1].
        shape: of the way down, "cosine" or "linear".

    Raises:
        OptionError: a value without meaning.

    Example:
        >>> schedule = WeightSchedule(warmup=10, total=110, final=0.5, shape="linear")
        >>> [schedule(call) for call in (0, 5, 10, 60, 110, 500)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.5]
    """

    warmup: int = 0
    total: int | None = None
    final: float = 0.0
    shape: str = "cosine"

    def __post_init__(self) -> None:
        if self.warmup < 0 or (self.total is not None and self.total <= self.warmup):
            raise OptionError(f"expected 0 <= warmup < total, got warmup={self.warmup} and total={self.total}")
        if not 0 <= self.final <= 1:
            raise OptionError(f"final must be in [0, 1], got {self.final}")
        if self.shape not in SHAPES:
            raise OptionError(f"shape must be one of {SHAPES}, got {self.shape!r}")

    def __call__(self, call: int) -> float:
        """Factor at a call, counted from 0."""
        if call < self.warmup:
            return call / self.warmup
        if self.total is None:
            return 1.0
        done = min(1.0, (call - self.warmup) / (self.total - self.warmup))
        left = 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final + (1 - self.final) * left
