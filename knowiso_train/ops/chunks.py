"""A batch in chunks: what is large is made for a few images at a time."""

from __future__ import annotations

from torch import Tensor

GPU_BYTES = 2**27  # alive at once on a GPU: little of its memory, and products that are worth their launches


def chunks(x: Tensor, each: int, at_once: int) -> list[slice]:
    """Slices of images.

    Args:
        x: (N, …), for its length and device.
        each: bytes that an image takes.
        at_once: bytes that are alive at once on a CPU; on a GPU `GPU_BYTES` are, where that is more.

    Example:
        >>> import torch
        >>> chunks(torch.zeros(5, 1), 100, 250)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None)]
    """
    step = max(1, (at_once if x.device.type == "cpu" else max(at_once, GPU_BYTES)) // each)
    return [slice(start, start + step) for start in range(0, len(x), step)]
