"""Validation of arguments by annotations: what passes, what is refused, and what the error says."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import pytest
import torch

from knowiso_train.errors import InputTypeError, OptionError, OptionTypeError
from knowiso_train.utils.validation import (
    PositiveFloat,
    PositiveInt,
    Range,
    UnitFloat,
    checked_value,
    validate_arguments,
    validate_fields,
)


class Logger(Protocol):
    def __call__(self, values: dict[str, float], step: int) -> None: ...


FITTING: list[tuple[Any, Any]] = [
    (3, int),
    (np.int64(3), int),
    (3, float),
    (Fraction(1, 2), float),
    (math.inf, float),
    (np.float32(0.5), float),
    (True, bool),
    (None, int | None),
    ("a", Literal["a", "b"]),
    ("layer", str | Sequence[str]),
    (["x", "y"], str | Sequence[str]),
    ([0.6, 0.2, 0.2], tuple[float, float, float]),
    ((1, 2, 3), tuple[int, ...]),
    ({"a": 1}, Mapping[str, int]),
    (len, Callable[[Any], int]),
    (print, Logger),
    (torch.nn.ReLU(), torch.nn.Module),
    (Path("x"), str | Path),
    (1j, Any),
    (1, PositiveInt),
    (0.5, UnitFloat | Literal["auto"]),
    ("auto", UnitFloat | Literal["auto"]),
]
WRONG_TYPE: list[tuple[Any, Any]] = [
    (True, int),
    (3.0, int),
    ("3", int),
    (None, int),
    (torch.tensor(3), int),
    (math.nan, float),
    (True, float),
    ("0.5", float),
    (1j, float),
    (1, bool),
    (b"layer", Sequence[str]),
    ([1, "x"], Sequence[int]),
    ({"a": "b"}, Mapping[str, int]),
    (5, Callable[[Any], int]),
    (5, Logger | None),
    (torch.nn.ReLU, torch.nn.Module),
    (5, str | Path),
    (True, Literal[1, 2]),
    (2.5, PositiveInt),
]
OUT_OF_BOUNDS: list[tuple[Any, Any]] = [
    (0, PositiveInt),
    (np.int32(-1), PositiveInt),
    (0.0, PositiveFloat),
    (1.5, UnitFloat),
    ("c", Literal["a", "b"]),
    (-0.1, UnitFloat | Literal["auto"]),
    ((0.6, 0.4), tuple[float, float, float]),
    (10**18, Annotated[int, Range(0, 64)]),
]


@pytest.mark.parametrize(("value", "hint"), FITTING, ids=str)
def test_fitting_values_are_returned_equal(value: Any, hint: Any) -> None:
    result = checked_value("option", value, hint)
    assert result == (tuple(value) if isinstance(value, list) and "tuple" in str(hint) else value)
    assert not isinstance(result, np.integer)


@pytest.mark.parametrize(("value", "hint"), WRONG_TYPE, ids=str)
def test_values_of_another_type_raise_an_error_that_is_a_type_and_an_option_error(value: Any, hint: Any) -> None:
    with pytest.raises(OptionTypeError, match=r"^option must be .*, got ") as caught:
        checked_value("option", value, hint)
    assert isinstance(caught.value, OptionError)
    assert isinstance(caught.value, InputTypeError)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("value", "hint"), OUT_OF_BOUNDS, ids=str)
def test_values_out_of_bounds_raise_an_option_error_only(value: Any, hint: Any) -> None:
    with pytest.raises(OptionError, match=r"^option must be .*, got ") as caught:
        checked_value("option", value, hint)
    assert type(caught.value) is OptionError


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (0, PositiveInt, "option must be an integer at least 1, got 0"),
        (2, UnitFloat | Literal["auto"], "option must be a number from 0 to 1 or 'auto', got 2"),
        (-1.0, PositiveFloat, "option must be a number above 0, got -1.0"),
        ("x", Literal["a", "b"], "option must be 'a' or 'b', got the string 'x'"),
        (torch.ones(2), int, r"option must be an integer, got a tensor of shape \(2,\)"),
        ([1], tuple[int, int], r"option must be a tuple of 2: an integer, an integer, got \[1\] \(list\)"),
        (torch.nn.ReLU, torch.nn.Module, "option must be a torch.nn.Module, got the class ReLU"),
        ("x" * 100, int, "option must be an integer, got the string '" + "x" * 56 + r"\.\.\."),
    ],
    ids=str,
)
def test_the_message_names_what_was_expected_and_what_arrived(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(OptionError, match=f"^{message}"):
        checked_value("option", value, hint)


def test_arguments_are_checked_before_the_function_runs() -> None:
    calls = []

    @validate_arguments
    def scale(size: PositiveInt, *rest: int, mode: Literal["fit", "fill"] = "fit", **more: int) -> tuple[Any, ...]:
        calls.append(size)
        return size, rest, mode, more

    assert scale(np.int64(2), 1, mode="fill", extra=1) == (2, (1,), "fill", {"extra": 1})
    assert type(scale(np.int64(2))[0]) is int
    with pytest.raises(OptionError, match="scale: size must be"):
        scale(0)
    with pytest.raises(OptionError, match="scale: mode must be 'fit' or 'fill', got the string 'wide'"):
        scale(2, mode="wide")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="missing a required argument: 'size'"):
        scale()  # type: ignore[call-arg]
    assert calls == [2, 2]


def test_fields_of_a_frozen_dataclass_are_checked_and_converted() -> None:
    @dataclass(frozen=True)
    class Config:
        steps: PositiveInt = 1
        split: tuple[float, ...] = (1.0,)

        def __post_init__(self) -> None:
            validate_fields(self)

    config = Config(np.int64(3), [0.5, 0.5])  # type: ignore[arg-type]
    assert (type(config.steps), config.split) == (int, (0.5, 0.5))
    with pytest.raises(OptionTypeError, match="Config: steps must be an integer at least 1, got None"):
        Config(steps=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.tensor(2), np.array(2)], ids=["tensor", "array"])
def test_tensors_and_arrays_without_axes_are_no_collections(value: Any) -> None:
    with pytest.raises(OptionTypeError, match="names must be"):
        checked_value("names", value, str | Collection[str])
