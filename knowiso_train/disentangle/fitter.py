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
    """What is to be fitted.

    Attributes:
        settings: kernel decided (`Settings.on_grid`).
        source_channels: C_A.
        target_channels: C_B of one target.
        targets: number of targets stacked along the channels of `y`, fitted from one pass over the source.
        expected: images that will come, as far as is known.
        dtype: of the maps.
        device: of the features.
        group: the processes that share the fit.
    """

    settings: DisentangleConfig
    source_channels: int
    target_channels: int
    targets: int
    expected: int
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
    """Takes features batch by batch, then gives one module of maps per target.

    Attributes:
        ridges: relative ridge per order, for each target; empty where there is none.
        centers: mean of each target, (C_B,).
        notes: what deserves a second look.
        rows: positions × images that order 0 (or the network) was fitted on.
    """

    def __init__(self, task: FitSpec) -> None:
        self.task = task
        self.ridges: list[tuple[float, ...]] = []
        self.centers: list[Tensor] = []
        self.notes: list[str] = []
        self.rows = 0

    @abstractmethod
    def update(self, x: Tensor, y: Tensor, index: NDArray[np.int64], select: NDArray[np.bool_]) -> None:
        """Add images: x (N, C_A, H, W), y (N, targets · C_B, H, W), their dataset indices, and which of them are to select on."""

    @abstractmethod
    def finish(self, *, progress: bool, label: str) -> list[nn.Module]:
        """Fit, in all processes together."""

    @staticmethod
    @abstractmethod
    def estimate_memory(
        settings: DisentangleConfig,
        source_channels: int,
        target_channels: int,
        targets: int,
        expected_rows: int | None,
    ) -> MemoryEstimate:
        """Estimate the memory of a fit before any of it is allocated.

        Args:
            settings: Configuration with the kernel size decided.
            source_channels: Channels of the source feature.
            target_channels: Channels of one target.
            targets: Number of targets fitted in one pass.
            expected_rows: Expected images × positions. None: at least `max_rows`.
        """

    @staticmethod
    def sample_bytes(
        settings: DisentangleConfig, source_channels: int, target_channels: int, targets: int, expected_rows: int | None
    ) -> int:
        """Return the bytes of the sample of features that `max_rows` bounds."""
        rows = min(settings.max_rows, expected_rows or settings.max_rows)
        # 4 bytes per float32, and a quarter more for the selection sample
        return 5 * rows * (source_channels + targets * target_channels)

    def part(self, target: int) -> slice:
        """Channels of one target."""
        return slice(target * self.task.target_channels, (target + 1) * self.task.target_channels)

    @staticmethod
    def nothing_to_fit(label: str) -> DataError:
        """The error for an empty fitting set."""
        return DataError(
            f"{label}: no image fell to the fitting set; give more images or a larger first fraction in split="
        )
