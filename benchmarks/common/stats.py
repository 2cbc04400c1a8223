"""Standard errors over seeds and over test images."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BOOTSTRAP_SAMPLES = 2000


def mean_and_error(values: Sequence[float], signed: bool = False) -> str:
    """Format mean ± standard error of the mean; `signed` adds a plus sign."""
    mean, error = sum(values) / len(values), standard_error(values)
    return f"{mean:+.2f} ± {error:.2f}" if signed else f"{mean:.2f} ± {error:.2f}"


def standard_error(values: Sequence[float]) -> float:
    """Compute the standard error of the mean; NaN for one value."""
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def bootstrap_error(values: Tensor) -> float:
    """Compute the bootstrap standard error of the mean of per-image values, (images,)."""
    resampled = torch.randint(len(values), (BOOTSTRAP_SAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    return float(values[resampled].mean(1).std())


def pack_bits(correct: Tensor) -> str:
    """Encode correct predictions, (images,), as base 85 with eight images per byte."""
    return base64.b85encode(np.packbits(correct.numpy().astype(bool)).tobytes()).decode()


def unpack_bits(text: str, count: int) -> Tensor:
    """Decode the text of `pack_bits` to (count,) zeros and ones, float64."""
    return torch.from_numpy(np.unpackbits(np.frombuffer(base64.b85decode(text), np.uint8), count=count)).double()


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Compute Spearman's rank correlation; equal values get their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    return ((array[:, None] > array[None]).sum(1) + (array[:, None] >= array[None]).sum(1) - 1) / 2
