"""What a report says of its surroundings."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from torch import nn

from knowiso_train.features import bare


def versions() -> dict[str, str]:
    """Versions that figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("knowiso_train", "torch", "timm", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def network_name(model: nn.Module) -> str:
    """timm's architecture name where there is one, else the class."""
    inner = bare(model)
    config = getattr(inner, "default_cfg", None) or {}
    name = config.get("architecture") if hasattr(config, "get") else None
    return str(name or type(inner).__name__)
