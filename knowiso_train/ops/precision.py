"""Products in full float32, whatever the user has allowed for his own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _switches() -> list[tuple[Any, str, Any]]:
    """What else holds a precision of its own, the attribute, and the value for full precision; the older one before torch 2.9."""
    places = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None), getattr(torch.backends.cudnn, "conv", None)]
    new: list[tuple[Any, str, Any]] = [(place, "fp32_precision", "ieee") for place in places if hasattr(place, "fp32_precision")]
    return new or [(torch.backends.cudnn, "allow_tf32", False)]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32 or less in products and convolutions: differences of large sums, and small eigenvalues of second moments, are lost
    otherwise.

    PyTorch has two ways to allow these, `torch.set_float32_matmul_precision` and, since 2.9, `torch.backends.cuda.matmul.fp32_precision`; where they
    have been used against each other the first cannot be read. Both are as before afterwards.

    Args:
        device: whose autocast is meant.

    Example:
        >>> torch.set_float32_matmul_precision("high")
        >>> with full_precision(torch.device("cpu")):
        ...     torch.get_float32_matmul_precision()
        'highest'
        >>> torch.get_float32_matmul_precision()
        'high'
        >>> torch.set_float32_matmul_precision("highest")
    """
    switches = [(place, name, full, getattr(place, name)) for place, name, full in _switches()]
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the new way says less than "highest", of which the old one does not know
        before = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        for place, name, full, _ in switches:
            setattr(place, name, full)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        for place, name, _, own in switches:
            setattr(place, name, own)
