"""How a disentangler is fitted: one validated record, saved with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from knowiso_train.errors import OptionError

SOLVERS = ("closed_form", "paper")


@dataclass(frozen=True)
class Settings:
    """Options of `Disentangler` and `measure` that concern the maps; see there.

    Raises:
        OptionError: a value without meaning.
    """

    order: int = 2
    kernel_size: int | None = None
    solver: str = "closed_form"
    hidden: int | None = None
    ridge: float | str = "search"
    max_rows: int = 131_072
    positions: int | None = None
    source_channels: int | None = None
    seed: int = 0
    solver_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise OptionError(f"solver must be one of {SOLVERS}, got {self.solver!r}")
        if isinstance(self.order, bool) or not isinstance(self.order, int) or self.order < 0:
            raise OptionError(f"order must be an integer K >= 0 (the number of non-linear steps), got {self.order!r}")
        if self.kernel_size is not None and (self.kernel_size < 1 or self.kernel_size % 2 == 0):
            raise OptionError(f"kernel_size must be odd and positive (1, 3, ...), got {self.kernel_size}")
        for name in ("hidden", "positions", "source_channels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} must be positive or None, got {value}")
        if self.max_rows < 1:
            raise OptionError(f"max_rows must be positive, got {self.max_rows}")
        if isinstance(self.ridge, str) and self.ridge != "search":
            raise OptionError(f'ridge must be "search" or a number >= 0, got {self.ridge!r}')
        if self.solver == "paper" and (self.hidden is not None or self.positions is not None or self.source_channels is not None):
            raise OptionError("hidden, positions and source_channels belong to the closed form; the paper's solver trains full maps on whole images")

    def on_grid(self, grid: tuple[int, int]) -> Settings:
        """With the kernel decided: as given, else 3 for the paper's solver and 1 for the closed form; 1 where there is a single position."""
        default = 3 if self.solver == "paper" else 1
        return replace(self, kernel_size=1 if grid[0] * grid[1] == 1 else self.kernel_size or default)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in asdict(self).items()}
