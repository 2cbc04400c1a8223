"""Options of a solver, given by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from knowiso_train.errors import OptionError

Recipe = TypeVar("Recipe")


def recipe_of(kind: type[Recipe], options: Mapping[str, Any] | None, solver: str) -> Recipe:
    """A recipe (a dataclass whose fields all have defaults) with some values replaced.

    Raises:
        OptionError: a name that the recipe does not have.
    """
    known = sorted(field.name for field in fields(kind))  # type: ignore[arg-type]
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise OptionError(f"unknown options {unknown} for the {solver} solver; it takes {known}")
    return kind(**(options or {}))
