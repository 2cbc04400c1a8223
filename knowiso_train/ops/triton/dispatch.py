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
# Maximum source channels: their gradient stays in registers while the kernel loops over the target channels
MAX_SOURCE_CHANNELS = 256


def interpreted() -> bool:
    """Return True if Triton interprets its kernels on the CPU: `TRITON_INTERPRET=1` before its first import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _module(name: str) -> ModuleType | None:
    return import_module(f"knowiso_train.ops.triton.{name}") if HAS_TRITON else None


def _usable(*tensors: Tensor) -> bool:
    device = tensors[0].device
    has_kernels = interpreted() if device.type == "cpu" else device.type == "cuda"
    return has_kernels and all(tensor.dtype in KERNEL_DTYPES and tensor.device == device for tensor in tensors)


def gate_kernels(h: Tensor) -> ModuleType | None:
    """Return the kernels of `ops.gate` for this tensor, or None."""
    return _module("gate") if _usable(h) else None


def supports_residual_energy(x: Tensor, y: Tensor, weight: Tensor) -> bool:
    """Return True if a kernel of `ops.residual_energy` takes these tensors.

    It takes bfloat16 sources of at most 256 channels under 1×1 maps that need no gradient.
    """
    return (
        HAS_TRITON
        and x.dtype == torch.bfloat16
        and weight.shape[-1] == 1
        and weight.shape[1] <= MAX_SOURCE_CHANNELS
        and _usable(x, y, weight)
    )


def residual_energy_kernel(x: Tensor, y: Tensor, weight: Tensor) -> ModuleType | None:
    """Return the kernel of `ops.residual_energy` for these tensors, or None."""
    return _module("residual_energy") if supports_residual_energy(x, y, weight) else None
