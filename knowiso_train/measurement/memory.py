"""Estimate of the memory of a fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from knowiso_train.disentangle.closed_form_fit import default_hidden
from knowiso_train.disentangle.config import DisentangleConfig
from knowiso_train.errors import CapacityError
from knowiso_train.regression.ridge import MAX_SEARCH_FEATURES

USABLE_MEMORY_FRACTION = 0.8  # of the free memory


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one layer pair takes: while features stream, and at the peak of its solve."""

    label: str
    columns: int
    streaming: int
    solving: int


def estimate_memory(
    label: str,
    settings: DisentangleConfig,
    source_channels: int,
    target_channels: int,
    targets: int,
    expected_rows: int | None,
) -> MemoryEstimate:
    """Estimate for one layer pair; rows of a sample are counted with their float32 features."""
    columns = min(source_channels, settings.source_channels or source_channels) * (settings.kernel_size or 1) ** 2
    rows = min(settings.max_rows, expected_rows or settings.max_rows)
    # Four bytes, and a quarter more to select on
    sample = 5 * rows * (source_channels + targets * target_channels)
    if settings.solver == "paper":
        return MemoryEstimate(label, columns, sample, sample)
    moments = 2 * 8 * (columns**2 + columns * targets * target_channels)
    hidden = (settings.hidden or default_hidden(target_channels)) * (settings.kernel_size or 1) ** 2
    widest = columns + settings.order * hidden
    solve = 8 * (5 if columns <= MAX_SEARCH_FEATURES else 2) * columns**2 + (8 * 8 * widest**2 if settings.order else 0)
    return MemoryEstimate(label, columns, moments + (sample if settings.order else 0), solve)


def check_capacity(needs: list[MemoryEstimate], device: torch.device) -> None:
    """Raise before the memory is gone.

    Raises:
        CapacityError: what it needs, what there is, and the ways out.
    """
    free = free_bytes(device)
    total = sum(n.streaming for n in needs) + max(n.solving for n in needs)
    if total <= USABLE_MEMORY_FRACTION * free:
        return
    worst = max(needs, key=lambda n: n.streaming + n.solving)
    raise CapacityError(
        f"measuring {len(needs)} layer pair(s) needs about {_gib(total)} on {device}, {_gib(int(USABLE_MEMORY_FRACTION * free))} can be "
        f"used; the largest is {worst.label} with {worst.columns} regressors ({_gib(worst.streaming + worst.solving)}). Ways out: "
        "kernel_size=1 (9 times fewer regressors than 3), source_channels=256 (a random projection of the source), "
        "positions=16 or a smaller max_rows (fewer positions per image), order=0, or fewer layers a call."
    )


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil  # comes with accelerate

    return int(psutil.virtual_memory().available)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**28 else f"{count / 2**20:.0f} MiB"
