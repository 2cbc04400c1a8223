"""How sure a figure is, over seeds and over test images."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BOOTSTRAP_SAMPLES = 2000


def mean_and_error(values: Sequence[float], signed: bool = False) -> str:
    """Mean ± standard error."""
    mean = sum(values) / len(values)
    error = (
        math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
        if len(values) > 1
        else math.nan
    )
    return f"{mean:+.2f} ± {error:.2f}" if signed else f"{mean:.2f} ± {error:.2f}"


def bootstrap_error(gap: Tensor) -> float:
    """Bootstrap standard error of the mean of (images,) when the images are drawn again."""
    again = torch.randint(len(gap), (BOOTSTRAP_SAMPLES, len(gap)), generator=torch.Generator().manual_seed(0))
    return float(gap[again].mean(1).std())


def pack_bits(right: Tensor) -> str:
    """Which images were got right, (images,), eight to a byte, in base 85."""
    return base64.b85encode(np.packbits(right.numpy().astype(bool)).tobytes()).decode()


def unpack_bits(text: str, count: int) -> Tensor:
    """(count,) zeros and ones, float64, from `pack_bits`."""
    return torch.from_numpy(np.unpackbits(np.frombuffer(base64.b85decode(text), np.uint8), count=count)).double()
