"""How long a batch takes, and a budget in these terms."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from knowiso_train.errors import OptionError
from knowiso_train.features import device_of
from knowiso_train.pruning.calibration import Calibration

Made = TypeVar("Made", bound=tuple[Any, ...])
TIMED = 32  # images
REPEATS = 7
TRIES = 6
NEAR = 0.9  # of the time that is allowed: what takes less has lost more than it had to


@torch.no_grad()
def latency_of(model: nn.Module, images: Calibration) -> float:
    """Median seconds of a forward pass of up to 32 images, in the network's present mode, after two passes to warm up.

    Example:
        >>> latency_of(nn.Linear(2, 2), Calibration([torch.zeros(4, 2)])) > 0
        True
    """
    batch, seconds, device = images.some(min(TIMED, images.count)), [], device_of(model)
    for turn in range(REPEATS + 2):
        began = time.perf_counter()
        images.run(model, batch)
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn >= 2:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def reach_latency(make: Callable[[float], Made], original: nn.Module, images: Calibration, share: float) -> Made:
    """Prune to fewer and fewer multiply-adds until a batch takes at most this share of the original's time, and back where it takes far less.

    Args:
        make: gives (network, …) for a share of the multiply-adds.
        original: the network to compare with.
        images: the first are timed.
        share: of the original's time.

    Returns:
        The largest network that was fast enough, within six tries.

    Raises:
        OptionError: not reached.
    """
    target, whole = share, latency_of(original, images)
    slow, fast = (1.0, 1.0), (0.0, 0.0)  # (multiply-adds, time) of the nearest on either side
    best: Made | None = None
    for _ in range(TRIES):
        try:
            made = make(target)
        except OptionError as error:
            if best is not None:
                return best
            raise OptionError(
                f"a latency of {share} of the original's was not reached: {slow[1]:.2f} was, and at {target:.2f} of the multiply-adds no more can go "
                f"({error})"
            ) from error
        taken = latency_of(made[0], images) / whole
        if taken > share:
            slow = (target, taken)
        else:
            best, fast = made, (target, taken)
        if best is None:
            target *= 0.9 * share / taken
        elif fast[1] >= NEAR * share or slow[1] <= fast[1]:
            break
        else:
            target = fast[0] + (slow[0] - fast[0]) * ((1 + NEAR) / 2 * share - fast[1]) / (slow[1] - fast[1])
    if best is not None:
        return best
    raise OptionError(
        f"a latency of {share} of the original's was not reached: {slow[1]:.2f} at {slow[0]:.2f} of the multiply-adds. "
        "Widths that are multiples of 8 are faster on most machines: round_to=8"
    )
