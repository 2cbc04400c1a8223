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
    """Prune to fewer and fewer multiply-adds until a batch takes at most this share of the original's time.

    Args:
        make: gives (network, …) for a share of the multiply-adds.
        original: the network to compare with.
        images: the first are timed.
        share: of the original's time.

    Raises:
        OptionError: not reached within six tries.
    """
    target, whole, reached = share, latency_of(original, images), 1.0
    for _ in range(TRIES):
        try:
            made = make(target)
        except OptionError as error:
            raise OptionError(
                f"a latency of {share} of the original's was not reached: {reached:.2f} was, and at {target:.2f} of the multiply-adds no more can go "
                f"({error})"
            ) from error
        reached = latency_of(made[0], images) / whole
        if reached <= share:
            return made
        target *= 0.9 * share / reached
    raise OptionError(
        f"a latency of {share} of the original's was not reached: {reached:.2f} at {target:.2f} of the multiply-adds. "
        "Widths that are multiples of 8 are faster on most machines: round_to=8"
    )
