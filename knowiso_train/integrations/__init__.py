"""Bridges to the libraries around: timm's networks and datasets, accelerate's processes. Loaded at first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knowiso_train.integrations.processes import Processes
    from knowiso_train.integrations.timm import image_loader, input_transform, load_model

__all__ = ["Processes", "image_loader", "input_transform", "load_model"]

_HOMES = {"Processes": "processes", "image_loader": "timm", "input_transform": "timm", "load_model": "timm"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
