"""Free memory of devices, and checks against it."""

from __future__ import annotations

import torch

from knowiso_train.errors import CapacityError

USABLE_MEMORY_FRACTION = 0.8  # of the free memory; the rest is left to the allocator and to other programs


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes, with what torch keeps for later tensors on a GPU.

    Examples:
        >>> free_bytes(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    import psutil  # installed with accelerate

    return int(psutil.virtual_memory().available)


def usable_bytes(device: torch.device) -> int:
    """Return the part of the free memory that may be used, in bytes.

    Examples:
        >>> usable_bytes(torch.device("cpu")) > 0
        True
    """
    return int(USABLE_MEMORY_FRACTION * free_bytes(device))


def format_bytes(count: int) -> str:
    """Return a number of bytes as text.

    Examples:
        >>> format_bytes(3 * 2**30), format_bytes(2**20)
        ('3.0 GiB', '1 MiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**28 else f"{count / 2**20:.0f} MiB"


def check_images_fit(side: int, count: int, channels: int = 3) -> None:
    """Check that square float32 images fit into the usable memory, before they are created.

    Args:
        side: Height and width in pixels.
        count: Number of images in memory at the same time.
        channels: Channels of an image.

    Raises:
        CapacityError: They do not fit.

    Examples:
        >>> check_images_fit(10**6, count=2)
        Traceback (most recent call last):
        knowiso_train.errors.CapacityError: 2 image(s) of 1000000 × 1000000 pixels need 22351.7 GiB, but ...
    """
    needed, usable = 4 * channels * side**2 * count, usable_bytes(torch.device("cpu"))
    if needed > usable:
        raise CapacityError(
            f"{count} image(s) of {side} × {side} pixels need {format_bytes(needed)}, but {format_bytes(usable)} can "
            "be used. Use smaller images, smaller batches or fewer workers"
        )
