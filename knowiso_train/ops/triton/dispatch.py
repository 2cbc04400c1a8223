"""Choice of a Triton kernel by device, dtype and shape."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Source channels whose gradient stays in registers while the kernel walks over the target's
MAX_SOURCE_CHANNELS = 256


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, as tests do (`TRITON_INTERPRET=1`, set before the first import of Triton)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _module(name: str) -> ModuleType | None:
    return import_module(f"knowiso_train.ops.triton.{name}") if HAS_TRITON else None


def _usable(*tensors: Tensor) -> bool:
    device = tensors[0].device
    here = interpreted() if device.type == "cpu" else device.type == "cuda"
    return here and all(tensor.dtype in KERNEL_DTYPES and tensor.device == device for tensor in tensors)


def gate_kernels(h: Tensor) -> ModuleType | None:
    """The kernels of `ops.gate` for this tensor, or None."""
    return _module("gate") if _usable(h) else None


def supports_residual_energy(x: Tensor, y: Tensor, weight: Tensor) -> bool:
    """Whether there is a kernel of `ops.residual_energy`: for bfloat16 sources of at most 256 channels under 1x1 maps that are not learned."""
    return (
        HAS_TRITON
        and x.dtype == torch.bfloat16
        and weight.shape[-1] == 1
        and weight.shape[1] <= MAX_SOURCE_CHANNELS
        and _usable(x, y, weight)
    )


def residual_energy_kernel(x: Tensor, y: Tensor, weight: Tensor) -> ModuleType | None:
    """That kernel, or None."""
    return _module("residual_energy") if supports_residual_energy(x, y, weight) else None
