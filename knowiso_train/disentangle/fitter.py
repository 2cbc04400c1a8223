"""Interface of the solvers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from knowiso_train.disentangle.config import DisentangleConfig
from knowiso_train.errors import DataError
from knowiso_train.utils.distributed import ProcessGroup


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

    @abstractmethod
    def finish(self, *, progress: bool, label: str) -> list[nn.Module]:
        """Fit the maps, in all processes together."""

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
        rows = min(config.max_rows, expected_rows or config.max_rows)
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
