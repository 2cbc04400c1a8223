"""Configuration of a measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor, nn

from knowiso_train.disentangle.config import DisentangleConfig, Order, Solver
from knowiso_train.errors import OptionError
from knowiso_train.features.hooks import Side
from knowiso_train.measurement.functional import AUTO_LABELS
from knowiso_train.measurement.similarity import SimilarityName, similarity_names
from knowiso_train.utils.validation import NonNegativeFloat, PositiveInt, Range, Seed, UnitFloat, validate_fields

Direction = Literal["forward", "backward"]
Directions = Literal["forward", "backward", "both"]
Repeated = Literal["error", "first", "last"]
# Function of a batch that returns the valid positions, or "auto" for the masks in batches that are mappings
Mask = Callable[[Any], Tensor] | Literal["auto"]
# Weights of the bootstrap are held for every replicate and image
Replicates = Annotated[int, Range(0, 100_000)]

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
MIN_REPORT_IMAGES = 2  # of the report set; fewer are refused
MIN_RELIABLE_IMAGES = 10  # of the report set; below this number the figures are marked, and the pairs have a warning


@dataclass(frozen=True)
class MeasureConfig:
    """Options of `measure`; see there for their meaning and defaults.

    Raises:
        OptionError: An invalid value.
    """

    order: Order = 2
    kernel_size: PositiveInt | None = None
    solver: Solver = "closed_form"
    directions: Directions = "forward"
    hidden: PositiveInt | None = None
    ridge: NonNegativeFloat | Literal["search"] = "search"
    split: Sequence[UnitFloat] = (0.6, 0.2, 0.2)
    seed: Seed = 0
    max_images: PositiveInt | None = None
    max_rows: PositiveInt | None = None
    positions: PositiveInt | None = None
    source_channels: PositiveInt | None = None
    noise_floor: bool = True
    bootstrap: Replicates = 500
    source_transform: Callable[[Any], Any] | None = None
    target_transform: Callable[[Any], Any] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    layout: str | Mapping[str, str] | None = None
    repeated: Repeated = "error"
    functional: bool = False
    labels: str | Callable[[Any], Any] | None = AUTO_LABELS
    output: Callable[[Any], Tensor] | None = None
    at: Side | Mapping[str, Side] = "output"
    mask: Mask | None = "auto"
    similarity: bool | SimilarityName | Sequence[SimilarityName] = False
    device: torch.device | str | None = None
    autocast: torch.dtype | None = None
    names: tuple[str, str] | None = None
    progress: bool = True
    solver_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        validate_fields(self)
        split = tuple(self.split)
        if len(split) != 3 or abs(sum(split) - 1) > 1e-6 or split[0] <= 0 or split[2] <= 0:
            raise OptionError(
                "split must be three fractions (fit, select, report) that sum to 1, with fit and report above 0; "
                f"got {split}"
            )
        object.__setattr__(self, "split", split)
        self.disentangle_config()  # checks the options of the maps
        _ = self.similarities  # checks the names

    @property
    def similarities(self) -> tuple[SimilarityName, ...]:
        """Names of the similarities to compute."""
        return similarity_names(self.similarity)

    @property
    def measured_directions(self) -> tuple[Direction, ...]:
        """Directions to measure, in the order of the report."""
        return DIRECTIONS if self.directions == "both" else (self.directions,)

    def check_functional_options(self) -> None:
        """Check that options of the functional shares are given only with `functional=True`.

        Raises:
            OptionError: `labels` or `output` without functional shares.
        """
        if self.functional:
            return
        for option, given in (("labels", self.labels not in (AUTO_LABELS, None)), ("output", self.output is not None)):
            if given:
                raise OptionError(f"{option}= has an effect only with functional=True, got functional=False")

    def disentangle_config(self) -> DisentangleConfig:
        """Return the options that concern the maps."""
        return DisentangleConfig(
            order=self.order,
            kernel_size=self.kernel_size,
            solver=self.solver,
            hidden=self.hidden,
            ridge=self.ridge,
            max_rows=self.max_rows,
            positions=self.positions,
            source_channels=self.source_channels,
            seed=self.seed,
            solver_options=self.solver_options,
        )

    def report_settings(self) -> dict[str, Any]:
        """Return the options that determine the figures of a report, as plain values for JSON."""
        return self.disentangle_config().to_dict() | {
            "directions": self.directions,
            "split": list(self.split),
            "max_images": self.max_images,
            "bootstrap": self.bootstrap,
            "functional": self.functional,
            "at": self.at if isinstance(self.at, str) else dict(self.at),
            "similarity": list(self.similarities),
        }
