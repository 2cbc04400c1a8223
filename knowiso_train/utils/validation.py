"""Validation of arguments and of dataclass fields by their annotations."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import numbers
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from knowiso_train.errors import OptionError, OptionTypeError

P = ParamSpec("P")
R = TypeVar("R")

TYPE_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    None: "None",
    type(None): "None",
    Path: "a path",
    torch.nn.Module: "a torch.nn.Module",
    torch.device: "a torch.device",
    torch.dtype: "a torch.dtype",
}


@dataclass(frozen=True)
class Range:
    """Bounds of a number, as metadata of an `Annotated` hint.

    Attributes:
        minimum: Least value that is allowed.
        maximum: Greatest value that is allowed.
        open_minimum: Exclude the minimum itself.
    """

    minimum: float = -math.inf
    maximum: float = math.inf
    open_minimum: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.minimum if self.open_minimum else value >= self.minimum
        return above and value <= self.maximum

    def __str__(self) -> str:
        if self.maximum == math.inf:
            return f"above {self.minimum:g}" if self.open_minimum else f"at least {self.minimum:g}"
        return f"{'above' if self.open_minimum else 'from'} {self.minimum:g} to {self.maximum:g}"


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
Seed = Annotated[int, Range(-(2**63), 2**63 - 1)]
PositiveFloat = Annotated[float, Range(0, open_minimum=True)]
NonNegativeFloat = Annotated[float, Range(0)]
# Far above every useful value; products with it are finite in float32
LearningRate = Annotated[float, Range(0, 1e6, open_minimum=True)]
UnitFloat = Annotated[float, Range(0, 1)]


def validate_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Check every argument of a function against its annotation before the function runs.

    Integers of NumPy become Python integers. Bounds come from `Annotated[..., Range(...)]`, choices from `Literal`.

    Raises:
        OptionTypeError: An argument of another type than the annotation. It is an OptionError and a TypeError.
        OptionError: A number out of bounds, or a string that is not among the choices.

    Examples:
        >>> @validate_arguments
        ... def scale(size: PositiveInt, mode: Literal["fit", "fill"] = "fit") -> int:
        ...     return size
        >>> scale(2)
        2
        >>> scale("2")
        Traceback (most recent call last):
        knowiso_train.errors.OptionTypeError: scale: size must be an integer at least 1, got the string '2'
    """
    signature = inspect.signature(function)
    name = function.__qualname__.removesuffix(".__init__")

    @functools.cache
    def hints() -> dict[str, Any]:
        return get_type_hints(function, include_extras=True)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for parameter, value in bound.arguments.items():
            kind = signature.parameters[parameter].kind
            if parameter in hints() and kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                bound.arguments[parameter] = checked_value(f"{name}: {parameter}", value, hints()[parameter])
        return function(*bound.args, **bound.kwargs)

    return checked


def validate_fields(config: Any) -> None:
    """Check every field of a frozen dataclass against its annotation, for use in `__post_init__`.

    Raises:
        OptionTypeError, OptionError: As `validate_arguments`.

    Examples:
        >>> @dataclass(frozen=True)
        ... class Config:
        ...     steps: PositiveInt = 1
        ...
        ...     def __post_init__(self) -> None:
        ...         validate_fields(self)
        >>> Config(steps=0)
        Traceback (most recent call last):
        knowiso_train.errors.OptionError: Config: steps must be an integer at least 1, got 0
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        name = f"{type(config).__name__}: {field.name}"
        object.__setattr__(config, field.name, checked_value(name, getattr(config, field.name), hints[field.name]))


def checked_value(name: str, value: Any, hint: Any) -> Any:
    """Return a value that fits an annotation, with integers of NumPy as Python integers.

    Raises:
        OptionTypeError, OptionError: As `validate_arguments`.

    Examples:
        >>> checked_value("ridge", 0.1, float | Literal["search"])
        0.1
    """
    fits, result = _match(value, hint)
    if fits:
        return result
    # A value of the right type and out of bounds is an OptionError alone
    error = OptionError if _match(value, _without_bounds(hint))[0] else OptionTypeError
    raise error(f"{name} must be {_describe(hint)}, got {_shown(value)}")


def check_known_names(option: str, names: Iterable[str], known: Sequence[str], kind: str) -> None:
    """Check that an option by name has no other names.

    Args:
        option: Name of the option.
        names: Its names.
        known: Names that exist.
        kind: Their kind, such as "stages".

    Raises:
        OptionError: Another name.

    Examples:
        >>> check_known_names("transforms", {"a": None}, ["a", "b"], "networks")
    """
    if unknown := [name for name in names if name not in known]:
        raise OptionError(f"{option}= names {', '.join(map(repr, unknown))}, which is none of the {kind} {list(known)}")


def _match(value: Any, hint: Any) -> tuple[bool, Any]:
    """Return whether a value fits a hint, and the value with integers of NumPy converted."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, (TypeVar, ParamSpec)):
        return True, value
    if origin is Annotated:
        fits, result = _match(value, arguments[0])
        return fits and all(result in bound for bound in arguments[1:] if isinstance(bound, Range)), result
    if origin in (Union, types.UnionType):
        for option in arguments:
            fits, result = _match(value, option)
            if fits:
                return True, result
        return False, value
    if origin is Literal:
        # `in` would take True for 1
        return any(type(value) is type(choice) and value == choice for choice in arguments), value
    if hint is None or hint is type(None):
        return value is None, value
    if hint is bool:
        return isinstance(value, bool), value
    if hint is int:
        integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return integer, int(value) if integer else value
    if hint is float:
        real = type(value) is not bool and isinstance(value, numbers.Real) and not math.isnan(value)
        return real, (float(value) if real and not isinstance(value, numbers.Integral) else value)
    if origin is tuple:
        return _match_tuple(value, arguments)
    if origin is collections.abc.Callable or hint is Callable:
        return callable(value), value
    if origin is not None and isinstance(origin, type):
        return _match_container(value, origin, arguments)
    if getattr(hint, "_is_protocol", False) and "__call__" in vars(hint):
        return callable(value), value
    if isinstance(hint, type):
        return isinstance(value, hint), value
    return True, value


def _match_tuple(value: Any, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    if not isinstance(value, (tuple, list)):
        return False, value
    hints = [arguments[0]] * len(value) if arguments[-1:] == (Ellipsis,) else list(arguments)
    if len(hints) != len(value):
        return False, value
    matches = [_match(item, hint) for item, hint in zip(value, hints, strict=True)]
    return all(fits for fits, _ in matches), tuple(item for _, item in matches)


def _match_container(value: Any, origin: type[Any], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    """Match sequences and mappings with their items; other generic classes by class alone."""
    # A string is a sequence of strings, which is never meant
    if not isinstance(value, origin) or isinstance(value, (str, bytes)):
        return False, value
    items: Any = value
    if issubclass(origin, collections.abc.Mapping) and len(arguments) == 2:
        fits = all(_match(key, arguments[0])[0] and _match(item, arguments[1])[0] for key, item in items.items())
        return fits, value
    if issubclass(origin, collections.abc.Collection) and arguments:
        try:
            items = list(value)
        except TypeError:  # tensors and arrays without axes are collections by their methods
            return False, value
        return all(_match(item, arguments[0])[0] for item in items), value
    return True, value


def _without_bounds(hint: Any) -> Any:
    """Return a hint without bounds and with the types of literals in place of their values."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _without_bounds(arguments[0])
    if origin in (Union, types.UnionType):
        return Union[tuple(_without_bounds(option) for option in arguments)]  # noqa: UP007
    if origin is Literal:
        return Union[tuple(type(choice) for choice in arguments)]  # noqa: UP007
    if origin is tuple:
        return tuple
    return hint


def _describe(hint: Any) -> str:
    """Return a hint in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join([_describe(arguments[0]), *(str(bound) for bound in arguments[1:] if isinstance(bound, Range))])
    if origin in (Union, types.UnionType):
        words = [_describe(option) for option in arguments]
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    if origin is Literal:
        choices = [repr(choice) for choice in arguments]
        return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"
    if hint in TYPE_WORDS:
        return TYPE_WORDS[hint]
    if origin is tuple:
        if arguments[-1:] == (Ellipsis,):
            return f"a tuple, each item {_describe(arguments[0])}"
        return f"a tuple of {len(arguments)}: {', '.join(_describe(item) for item in arguments)}"
    if origin is collections.abc.Callable or hint is Callable or getattr(hint, "_is_protocol", False):
        return "a function"
    if isinstance(origin, type) and issubclass(origin, collections.abc.Mapping) and len(arguments) == 2:
        values = "" if arguments[1] is Any else f" to {_describe(arguments[1])}"
        return f"a mapping from {_describe(arguments[0])}{values}"
    if isinstance(origin, type) and issubclass(origin, collections.abc.Collection) and arguments:
        return "a list or tuple" + ("" if arguments[0] is Any else f", each item {_describe(arguments[0])}")
    name = getattr(origin or hint, "__name__", str(hint))
    return f"an object of class {name}"


def _shown(value: Any) -> str:
    """Return a value for an error message, cut to 60 characters."""
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    if isinstance(value, str):
        return f"the string {text}"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"{text} ({type(value).__name__})"
