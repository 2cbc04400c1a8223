"""Versions of the libraries and names of networks, as reports record them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def library_versions() -> dict[str, str]:
    """Versions that figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("knowiso_train", "torch", "timm", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
