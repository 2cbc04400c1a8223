"""Configuration of a diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from knowiso_train.utils.validation import NonNegativeInt, validate_fields


@dataclass(frozen=True)
class DiagnoseConfig:
    """Options of `diagnose` that do not concern the measurement; see there for their meaning and defaults.

    Raises:
        OptionError: An invalid value.
    """

    num_directions: NonNegativeInt = 6
    num_shared: NonNegativeInt = 3
    num_images: NonNegativeInt = 8
    num_thumbnails: NonNegativeInt = 256
    groups: str | Callable[[Any], Any] | None = None
    class_names: Sequence[str] | None = None
    to_image: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        validate_fields(self)
