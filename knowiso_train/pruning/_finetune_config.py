"""Options of the fine-tuning of a pruned model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from knowiso_train.errors import DataError, OptionError
from knowiso_train.utils.validation import (
    LearningRate,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Seed,
    validate_fields,
)

DEFAULT_STEPS = 200
MIN_FINETUNE_IMAGES = 8


@dataclass(frozen=True)
class PruneFinetuneConfig:
    """Settings of `finetune`, which documents each of them.

    Raises:
        OptionError: A value of another type or out of bounds, or both `steps` and `epochs`.

    Examples:
        >>> PruneFinetuneConfig(epochs=2, batch_size=32).num_steps(100)
        6
    """

    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    lr: LearningRate = 1e-2
    batch_size: PositiveInt = 64
    layers: str | Sequence[str] | None = None
    feature_weight: NonNegativeFloat = 1.0
    logit_weight: NonNegativeFloat | None = None
    label_weight: NonNegativeFloat = 0.0
    temperature: PositiveFloat = 1.0
    max_images: PositiveInt = 1024
    validation_fraction: PositiveFloat = 0.125
    frozen_statistics: bool = True
    cache_gib: NonNegativeFloat = 1.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.steps is not None and self.epochs is not None:
            raise OptionError(f"pass steps or epochs, not both; got steps={self.steps} and epochs={self.epochs}")
        infinite = [name for name, value in vars(self).items() if isinstance(value, float) and math.isinf(value)]
        if infinite:
            raise OptionError(f"{', '.join(infinite)}: expected a finite number, got inf")
        if self.validation_fraction >= 1:
            raise OptionError(f"validation_fraction must be below 1, got {self.validation_fraction}")

    def num_validation_images(self, num_images: int) -> int:
        """Return the number of held-out images.

        Raises:
            DataError: The remaining images do not fill a batch.
        """
        held_out = max(1, round(self.validation_fraction * num_images))
        if num_images < MIN_FINETUNE_IMAGES or num_images - held_out < self.batch_size:
            raise DataError(
                f"{num_images} images, {held_out} of them held out, do not fill a batch of {self.batch_size}. "
                f"Pass at least {MIN_FINETUNE_IMAGES} images, or a smaller batch_size"
            )
        return held_out

    def num_steps(self, num_images: int) -> int:
        """Return the number of updates for some number of training images."""
        if self.epochs is not None:
            return math.ceil(self.epochs * (num_images // self.batch_size))
        return self.steps or DEFAULT_STEPS
