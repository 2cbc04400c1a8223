"""Frozen dataclasses that are saved as strict JSON and read with a check of every value."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from knowiso_train.errors import FormatError
from knowiso_train.utils.serialization import dump_json, parse_json, read_json, to_plain, write_if_given

MAX_INTEGER = 2**53


class SavedReport:
    """Base of frozen dataclasses that are saved as JSON; fields with `compare=False` are left out.

    Fields with a `default_factory` may be missing in a file.

    Attributes:
        saved_format: Value of "format" in the file, which distinguishes the classes.
        saved_version: Version of the fields.
        saved_indent: Spaces per level of the JSON. None: a single line, for reports with many numbers.

    Examples:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Count(SavedReport):
        ...     saved_format = "count"
        ...     images: int = 3
        >>> Count.from_json(Count(4).to_json())
        Count(images=4)
    """

    saved_format: ClassVar[str]
    saved_version: ClassVar[int] = 1
    saved_indent: ClassVar[int | None] = 2

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers for `from_dict`."""
        return {"format": self.saved_format, "format_version": self.saved_version} | plain_fields(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """Return strict JSON, with NaN and infinities as strings.

        Args:
            path: File to write as well. None: no file.
        """
        return write_if_given(dump_json(self.to_dict(), indent=self.saved_indent) + "\n", path)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Create a report from the values of `to_dict`.

        Raises:
            FormatError: Another format version, or values of another type than the fields.
        """
        if not isinstance(values, Mapping) or values.get("format") != cls.saved_format:
            raise FormatError(
                f'expected a report of {cls.__name__}.to_json ("format": "{cls.saved_format}"), '
                f"got {_abbreviate(values)}"
            )
        if values.get("format_version") != cls.saved_version:
            raise FormatError(
                f"expected a report of format version {cls.saved_version}, got {values.get('format_version')!r}; "
                "read it with the version of knowiso_train that wrote it, or measure again"
            )
        content = {name: value for name, value in values.items() if name not in ("format", "format_version")}
        report: Self = _read_fields(content, cls, "the report")
        return report

    @classmethod
    def from_json(cls, source: str | Path) -> Self:
        """Create a report from the JSON of `to_json`.

        Args:
            source: Path of the file, or the JSON text itself.

        Raises:
            FormatError: The file is missing, is not JSON, has another format version, or holds other values.
        """
        is_text = isinstance(source, str) and source.lstrip().startswith(("{", "["))
        origin = "the text" if is_text else str(source)
        expected = f"expected a report of {cls.__name__}.to_json"
        try:
            return cls.from_dict(parse_json(str(source)) if is_text else read_json(source))
        except FormatError as error:
            raise FormatError(f"{expected} in {origin}: {error}") from error
        except ValueError as error:
            raise FormatError(f"{expected}, but {origin} is no JSON: {error}") from error


def plain_fields(record: Any) -> dict[str, Any]:
    """Return the saved fields of a dataclass, and of the dataclasses in them, as plain values for JSON."""
    return {name: to_plain(_without_dataclasses(getattr(record, name))) for name in _saved_hints(type(record))}


def _without_dataclasses(value: Any) -> Any:
    if is_dataclass(value):
        return plain_fields(value)
    if isinstance(value, tuple):
        return [_without_dataclasses(item) for item in value]
    return value


def _saved_hints(kind: type[Any]) -> dict[str, Any]:
    """Return the annotations of the fields that are saved: those that are compared."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind) if field.compare}


def _read_fields(values: Any, kind: type[Any], label: str) -> Any:
    """Create a dataclass from plain values, each checked against the annotation of its field."""
    if not isinstance(values, Mapping):
        raise FormatError(f"{label}: expected an object, got {_abbreviate(values)}")
    hints = _saved_hints(kind)
    # Fields that files of earlier versions lack
    optional = {item.name for item in fields(kind) if item.default is None or item.default_factory is not MISSING}
    missing = [name for name in hints if name not in values and name not in optional]
    unknown = [name for name in values if name not in hints]
    if missing or unknown:
        raise FormatError(
            f"{label}: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}; "
            "the file is not of this format version"
        )
    read = {
        name: _read_value(values[name], hint, f"{label}: {name!r}") for name, hint in hints.items() if name in values
    }
    record = kind(**read)
    if hasattr(record, "check_saved"):
        record.check_saved(label)
    return record


def _read_value(value: Any, hint: Any, label: str) -> Any:
    """Return a plain value as the type of its annotation, or raise an error that names the field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if is_dataclass(hint):
        return _read_fields(value, hint, label)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):  # of a type and None
        return None if value is None else _read_value(value, arguments[0], label)
    if origin is tuple and isinstance(value, list | tuple):
        hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(hints) == len(value):
            return tuple(
                _read_value(item, hint, f"{label}[{i}]" if is_dataclass(hint) else label)
                for i, (item, hint) in enumerate(zip(value, hints, strict=True))
            )
    if origin is dict and isinstance(value, Mapping):
        return {_read_value(key, str, label): _read_value(item, arguments[1], label) for key, item in value.items()}
    if origin is Literal and value in arguments:
        return value
    # Integers of up to 53 bits are floats without rounding; larger ones need not fit into a float at all
    if hint is float and (type(value) is float or (type(value) is int and abs(value) <= MAX_INTEGER)):
        return float(value)
    if type(value) is hint and not (hint is int and abs(value) > MAX_INTEGER):
        return value
    raise FormatError(f"{label} must be {_describe(hint)}, got {_abbreviate(value)}")


def _describe(hint: Any) -> str:
    arguments = get_args(hint)
    if get_origin(hint) is tuple:
        return "a list" if arguments[-1] is Ellipsis else f"a list of {len(arguments)}"
    if get_origin(hint) is Literal:
        return f"one of {arguments}"
    words = {str: "text", int: "an integer", float: "a number", bool: "true or false"}
    return words.get(hint, "an object")


def _abbreviate(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
