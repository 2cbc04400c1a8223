"""Package exports that are imported at first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_exports(
    package: str, namespace: dict[str, Any], homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package whose exports are imported at first use.

    Args:
        package: Name of the package, its `__name__`.
        namespace: Its `globals()`; a name is stored there once it is imported.
        homes: Module of each exported name, relative to the package.

    Examples:
        >>> get, names = lazy_exports("knowiso_train", {}, {"KnowisoError": "errors"})
        >>> get("KnowisoError").__name__, names()
        ('KnowisoError', ['KnowisoError'])
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        namespace[name] = getattr(import_module(f"{package}.{homes[name]}"), name)
        return namespace[name]

    def names() -> list[str]:
        return sorted({*namespace, *homes})

    return get, names
