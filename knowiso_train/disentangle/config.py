"""Configuration and interface of the solvers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from knowiso_train.errors import DataError, OptionError
from knowiso_train.utils.distributed import ProcessGroup
from knowiso_train.utils.validation import (
    LearningRate,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Range,
    Seed,
    validate_fields,
)

Solver = Literal["closed_form", "paper"]
Readout = Literal["auto", "trained", "exact"]
Precision = Literal["auto", "float32", "bfloat16"]
# The maps of order K are K(K + 3) / 2 in number; the paper uses K = 2
Order = Annotated[int, Range(0, 16)]

EXACT_LR, TRAINED_LR = 0.07, 0.05
EXACT_ROWS, TRAINED_ROWS = 100_000, 375_000  # positions in the training of order 1
MAX_STEPS = 600
DEFAULT_MAX_ROWS = 131_072  # positions that the closed form keeps for orders ≥ 1
MIN_BATCH_ROWS = 64  # positions; small samples are divided into 32 batches, but not into smaller ones than this

SolverConfig = TypeVar("SolverConfig")


@dataclass(frozen=True)
class PaperConfig:
    """Training of the paper's network (`solver_options=` of `solver="paper"`).

    Adam with coupled weight decay minimizes the squared error plus `penalty · Σ p_k²`. The learning rate is log-spaced
    over the epochs. The defaults are the published values (arXiv 1908.01581).

    Attributes:
        epochs: Passes over the sample.
        lr: Learning rate of the first epoch.
        lr_end: Learning rate of the last epoch.
        weight_decay: Coupled weight decay (added to the gradient), of the gates' logits too.
        penalty: λ; 8.0 in the paper's AlexNet runs.
        batch_size: Images per step.
        checkpoint: File to resume from and to write every 50 epochs. Each fit (layers, direction, permuted targets) has
            a file of its own, with the fit in its name. Default: none.
    """

    epochs: PositiveInt = 1000
    lr: LearningRate = 1e-4
    lr_end: PositiveFloat = 1e-6
    weight_decay: NonNegativeFloat = 1e-4
    penalty: NonNegativeFloat = 0.1
    batch_size: PositiveInt = 64
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        validate_fields(self)


@dataclass(frozen=True)
class NonlinearConfig:
    """Training of orders ≥ 1 (`solver_options=` of `solver="closed_form"`).

    Attributes:
        epochs: Passes over the sample. Default: as many as `rows_seen` takes.
        lr: Peak step of `Muon` for order 1; half of it above. Default: 0.07 where the readout is exact, else 0.05.
        weight_decay: Decoupled weight decay of matrices.
        batch_rows: Positions per step; fewer for small samples.
        rows_seen: Positions over the training of order 1; half of them above where the readout is trained. Default:
            100,000 where the readout is exact, else 375,000.
        readout: "trained" keeps the readouts trained with the hidden map, shrunk by a factor from the selection images.
            "exact" solves `V_k ã_k` in closed form afterwards, orthogonal to all lower orders at ridge 0. "auto" is
            exact for 1 × 1 maps and where `ridge` is a number: the moments of wider maps take longer than the training.
        precision: Type of the products in training. "auto" is bfloat16 on devices that multiply it faster than float32
            (CUDA since Ampere; CPUs with AVX512-BF16 or AMX), else the type of the features. Results are reproducible
            on one machine.
    """

    epochs: PositiveInt | None = None
    lr: LearningRate | None = None
    weight_decay: NonNegativeFloat = 0.1
    batch_rows: PositiveInt = 2048
    rows_seen: PositiveInt | None = None
    readout: Readout = "auto"
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        validate_fields(self)

    def is_exact(self, kernel_size: int, ridge: float | str) -> bool:
        """Return whether readouts are solved after the training."""
        return self.readout == "exact" or (self.readout == "auto" and (kernel_size == 1 or not isinstance(ridge, str)))

    def peak_lr(self, order: int, *, exact: bool) -> float:
        """Return the peak step of an order."""
        lr = self.lr or (EXACT_LR if exact else TRAINED_LR)
        return lr if order == 1 else lr / 2

    def schedule(self, order: int, images: int, rows: int, *, exact: bool) -> tuple[int, int]:
        """Return the images per step and the number of steps for a sample of `rows` positions in `images` images."""
        batch_rows = min(self.batch_rows, max(rows // 32, MIN_BATCH_ROWS))
        batch = max(1, min(images, batch_rows // (rows // images)))
        if self.epochs:
            return batch, self.epochs * max(1, images // batch)
        return batch, min(MAX_STEPS, -(-self.total_rows(order, rows, exact=exact) * images // (batch * rows)))

    def total_rows(self, order: int, rows: int, *, exact: bool) -> int:
        """Return the positions of a training on a sample of `rows` positions, each counted as often as it is seen."""
        if self.epochs:
            return self.epochs * rows
        rows_seen = self.rows_seen or (EXACT_ROWS if exact else TRAINED_ROWS)
        return rows_seen if exact or order == 1 else rows_seen // 2

    def training_dtype(self, x: Tensor) -> torch.dtype:
        """Return the type of the products in training on features x."""
        if x.dtype != torch.float32 or self.precision == "float32":
            return x.dtype
        return torch.bfloat16 if self.precision == "bfloat16" or _multiplies_bfloat16(x.device) else x.dtype


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


@dataclass(frozen=True)
class DisentangleConfig:
    """Options of `Disentangler` and `measure` that concern the maps; see there for their meaning.

    Raises:
        OptionError: An invalid value, or options that the solver does not have.

    Examples:
        >>> DisentangleConfig(order=-1)
        Traceback (most recent call last):
        knowiso_train.errors.OptionError: DisentangleConfig: order must be an integer from 0 to 16, got -1
    """

    order: Order = 2
    kernel_size: PositiveInt | None = None
    solver: Solver = "closed_form"
    hidden: PositiveInt | None = None
    ridge: NonNegativeFloat | Literal["search"] = "search"
    max_rows: PositiveInt | None = None
    positions: PositiveInt | None = None
    source_channels: PositiveInt | None = None
    seed: Seed = 0
    solver_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.max_rows is None and self.solver == "closed_form":
            object.__setattr__(self, "max_rows", DEFAULT_MAX_ROWS)
        if self.kernel_size is not None and self.kernel_size % 2 == 0:
            raise OptionError(f"kernel_size must be odd and positive (1, 3, ...), got {self.kernel_size}")
        if self.solver == "paper":
            given = [name for name in ("hidden", "positions", "source_channels") if getattr(self, name) is not None]
            if given:
                raise OptionError(
                    f'{", ".join(given)} cannot be set with solver="paper", which trains full maps on whole images; '
                    'remove it or use solver="closed_form"'
                )
            self.paper_config()
        else:
            self.nonlinear_config()

    def on_grid(self, grid: tuple[int, int]) -> DisentangleConfig:
        """Return the configuration with the kernel size decided for a grid (H, W).

        It is 1 for a single position, then the given one, then 3 for the paper's solver and 1 for the closed form.
        """
        default = 3 if self.solver == "paper" else 1
        return replace(self, kernel_size=1 if grid[0] * grid[1] == 1 else self.kernel_size or default)

    def paper_config(self) -> PaperConfig:
        """Return the training of the paper's network."""
        return _parse_solver_options(PaperConfig, self.solver_options, self.solver)

    def nonlinear_config(self) -> NonlinearConfig:
        """Return the training of orders ≥ 1 of the closed form."""
        return _parse_solver_options(NonlinearConfig, self.solver_options, self.solver)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in asdict(self).items()}


def _parse_solver_options(kind: type[SolverConfig], options: Mapping[str, Any] | None, solver: str) -> SolverConfig:
    """Return a configuration with some values replaced.

    Raises:
        OptionError: A name that the configuration does not have.
    """
    names = sorted(field.name for field in fields(kind))  # type: ignore[arg-type]
    unknown = sorted(set(options or {}) - set(names))
    if unknown:
        raise OptionError(f"unknown options {unknown} for solver={solver!r}; it takes {names}")
    return kind(**(options or {}))


@dataclass(frozen=True)
class FitSpec:
    """Shapes and options of one fit.

    Attributes:
        config: Configuration with the kernel size decided (`DisentangleConfig.on_grid`).
        source_channels: C_A.
        target_channels: C_B of one target.
        num_targets: Number of targets stacked along the channels of `y`, fitted from one pass over the source.
        expected_images: Approximate number of images to come.
        dtype: Type of the maps.
        device: Device of the features.
        group: Processes that share the fit.
    """

    config: DisentangleConfig
    source_channels: int
    target_channels: int
    num_targets: int
    expected_images: int
    dtype: torch.dtype
    device: torch.device
    group: ProcessGroup


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one fit.

    Attributes:
        num_features: Columns of the order-0 regression.
        streaming: Bytes held while features stream.
        solving: Further bytes at the peak of the solve.
    """

    num_features: int
    streaming: int
    solving: int


def solve_bar(work: float, *, show: bool) -> tqdm[Any]:
    """Return a progress bar over fits of known work, with the remaining time.

    Args:
        work: Sum of `Fitter.work`.
        show: False for a bar that is not shown.
    """
    return tqdm(
        total=max(work, 1.0),
        desc="solve",
        disable=not show,
        smoothing=0,
        bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
    )


class Fitter(ABC):
    """Fit of maps to features that arrive batch by batch; one module of maps for each target.

    Attributes:
        ridges: Relative ridge of each order, for each target; empty for solvers without one.
        centers: Mean of each target, (C_B,).
        notes: Warnings for the report.
        rows: Number of positions × images fitted by order 0 (or by the network).
    """

    def __init__(self, spec: FitSpec) -> None:
        self.spec = spec
        self.ridges: list[tuple[float, ...]] = []
        self.centers: list[Tensor] = []
        self.notes: list[str] = []
        self.rows = 0

    @abstractmethod
    def update(self, x: Tensor, y: Tensor, index: NDArray[np.int64], select: NDArray[np.bool_]) -> None:
        """Add images.

        Args:
            x: Source, (N, C_A, H, W).
            y: Targets, (N, num_targets · C_B, H, W).
            index: Dataset index of each image, (N,).
            select: True for selection images, False for fitting images, (N,).
        """

    @property
    @abstractmethod
    def work(self) -> float:
        """Approximate multiply-adds of `finish`, for the remaining time."""

    @abstractmethod
    def finish(self, *, bar: tqdm[Any], label: str) -> list[nn.Module]:
        """Fit the maps, in all processes together.

        Args:
            bar: Bar of `solve_bar`, which advances by `work`.
            label: Layers and direction, for messages.
        """

    @staticmethod
    @abstractmethod
    def estimate_memory(
        config: DisentangleConfig,
        source_channels: int,
        target_channels: int,
        num_targets: int,
        expected_rows: int | None,
    ) -> MemoryEstimate:
        """Estimate the memory of a fit before any of it is allocated.

        Args:
            config: Configuration with the kernel size decided.
            source_channels: Channels of the source feature.
            target_channels: Channels of one target.
            num_targets: Number of targets fitted in one pass.
            expected_rows: Expected images × positions. Default: at least `max_rows`.
        """

    @staticmethod
    def sample_bytes(
        config: DisentangleConfig,
        source_channels: int,
        target_channels: int,
        num_targets: int,
        expected_rows: int | None,
    ) -> int:
        """Return the bytes of the sample of features that `max_rows` bounds."""
        rows = expected_rows or config.max_rows or DEFAULT_MAX_ROWS
        rows = min(config.max_rows or rows, rows)
        # 4 bytes per float32, and a quarter more for the selection sample
        return 5 * rows * (source_channels + num_targets * target_channels)

    def channels_of(self, target: int) -> slice:
        """Return the channels of one target in `y`."""
        return slice(target * self.spec.target_channels, (target + 1) * self.spec.target_channels)

    @staticmethod
    def empty_fit_error(label: str) -> DataError:
        """Return the error for an empty fitting set."""
        return DataError(
            f"{label}: no image fell to the fitting set; give more images or a larger first fraction in split="
        )
