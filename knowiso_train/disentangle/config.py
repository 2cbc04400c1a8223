"""Configuration of the solvers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from knowiso_train.errors import OptionError
from knowiso_train.regression.ridge import Ridge

SOLVERS = ("closed_form", "paper")

Recipe = TypeVar("Recipe")

READOUTS = ("auto", "trained", "exact")


@dataclass(frozen=True)
class DisentangleConfig:
    """Options of `Disentangler` and `measure` that concern the maps; see there.

    Raises:
        OptionError: a value without meaning.
    """

    order: int = 2
    kernel_size: int | None = None
    solver: str = "closed_form"
    hidden: int | None = None
    ridge: Ridge = "search"
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
        if self.solver == "paper" and (
            self.hidden is not None or self.positions is not None or self.source_channels is not None
        ):
            raise OptionError(
                "hidden, positions and source_channels belong to the closed form; the paper's solver trains full maps on whole images"
            )

    def on_grid(self, grid: tuple[int, int]) -> DisentangleConfig:
        """With the kernel decided: as given, else 3 for the paper's solver and 1 for the closed form; 1 where there is a single position."""
        default = 3 if self.solver == "paper" else 1
        return replace(self, kernel_size=1 if grid[0] * grid[1] == 1 else self.kernel_size or default)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in asdict(self).items()}


def parse_solver_options(kind: type[Recipe], options: Mapping[str, Any] | None, solver: str) -> Recipe:
    """A recipe (a dataclass whose fields all have defaults) with some values replaced.

    Raises:
        OptionError: a name that the recipe does not have.
    """
    known = sorted(field.name for field in fields(kind))  # type: ignore[arg-type]
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise OptionError(f"unknown options {unknown} for the {solver} solver; it takes {known}")
    return kind(**(options or {}))


@dataclass(frozen=True)
class PaperConfig:
    """Adam with coupled weight decay, learning rate log-spaced per epoch, squared error plus `penalty · Σ p_k²`.

    Attributes:
        epochs: passes over the sample.
        lr: learning rate of the first epoch.
        lr_end: learning rate of the last epoch.
        weight_decay: coupled (added to the gradient), on the gates' logits too.
        penalty: λ, 0.1 as published (8.0 in the AlexNet runs).
        batch_size: images a step.
        checkpoint: file to resume from and to write every 50 epochs; None for none.
    """

    epochs: int = 1000
    lr: float = 1e-4
    lr_end: float = 1e-6
    weight_decay: float = 1e-4
    penalty: float = 0.1
    batch_size: int = 64
    checkpoint: str | None = None


@dataclass(frozen=True)
class NonlinearConfig:
    """How orders ≥ 1 are fitted (`solver_options=` of the closed form). One set of values served all that was tried.

    Attributes:
        epochs: passes over the sample; None is 8 for order 1 and 5 above, more for small samples until `rows_seen`, at
            most 60.
        lr: step of the optimizer (`Muon`) at its peak, for order 1; half of it above.
        weight_decay: decoupled.
        batch_rows: positions a step; fewer for small samples.
        rows_seen: positions that training sees at least, where `epochs` is None.
        readout: "trained" keeps the readouts that were trained with the hidden map, shrunk where the selection images
            say so; "exact" solves
            `V_k ã_k` in closed form afterwards (orthogonal to all below at ridge 0; on CIFAR ResNets equally good,
            twice the time);
            "auto" is exact where `ridge` is a number and trained where it is searched.
    """

    epochs: int | None = None
    lr: float = 0.05
    weight_decay: float = 0.1
    batch_rows: int = 3072
    rows_seen: int = 800_000
    readout: str = "auto"

    def __post_init__(self) -> None:
        if self.readout not in READOUTS:
            raise OptionError(f"readout must be one of {READOUTS}, got {self.readout!r}")

    def steps(self, order: int, images: int, rows: int) -> tuple[int, int]:
        """Images a step, and steps."""
        per_image = rows // images
        batch = max(1, min(images, min(self.batch_rows, max(rows // 32, 64)) // per_image))
        epochs = self.epochs or max(8 if order == 1 else 5, min(60, -(-self.rows_seen // rows)))
        return batch, epochs * max(1, images // batch)
