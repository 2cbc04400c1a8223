"""Check of the available memory before features are accumulated."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from knowiso_train.disentangle.fitter import MemoryEstimate
from knowiso_train.errors import CapacityError

USABLE_MEMORY_FRACTION = 0.8  # of the free memory; the rest is left to the networks and the allocator


def check_capacity(estimates: Mapping[str, MemoryEstimate], device: torch.device) -> None:
    """Raise an error if the estimated memory exceeds the usable memory of a device.

    Args:
        estimates: Memory estimate of each layer pair, by its label.
        device: Device of the statistics.

    Raises:
        CapacityError: The estimate exceeds `USABLE_MEMORY_FRACTION` of the free memory.
    """
    usable = int(USABLE_MEMORY_FRACTION * free_bytes(device))
    # All pairs accumulate at the same time, but are solved one after the other
    total = sum(e.streaming for e in estimates.values()) + max(e.solving for e in estimates.values())
    if total <= usable:
        return
    label, largest = max(estimates.items(), key=lambda item: item[1].streaming + item[1].solving)
    raise CapacityError(
        f"measuring {len(estimates)} layer pair(s) needs about {_format_bytes(total)} on {device}, "
        f"but {_format_bytes(usable)} can be used; the largest is {label} with {largest.num_features} features "
        f"({_format_bytes(largest.streaming + largest.solving)}). Use kernel_size=1, source_channels=256 (a random "
        "projection of the source), positions=16, a smaller max_rows, order=0, or fewer layers a call."
    )


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil  # installed with accelerate

    return int(psutil.virtual_memory().available)


def _format_bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**28 else f"{count / 2**20:.0f} MiB"
