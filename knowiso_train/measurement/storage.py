"""A report as JSON and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from knowiso_train.errors import FormatError
from knowiso_train.measurement.report import DIRECTIONS, PairResult, Report

FORMAT = "knowiso_train.Report"
FORMAT_VERSION = 1


def to_dict(report: Report) -> dict[str, Any]:
    """Plain dicts, lists and numbers."""
    head: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION}
    return head | {field.name: _plain(getattr(report, field.name)) for field in fields(Report)}


def to_json(report: Report, path: str | Path | None) -> str:
    """Text of the report, also written where a path is given."""
    text = json.dumps(_portable(to_dict(report)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    return text


def from_json(source: str | Path) -> Report:
    """Report from a path or from the text itself."""
    if isinstance(source, str) and source.lstrip().startswith(("{", "[")):
        text, where = source, "the text"
    else:
        where = str(source)
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(f"expected a report that Report.to_json wrote; {where} cannot be read: {error}") from error
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(f"expected a report that Report.to_json wrote; {where} is not JSON: {error}") from error
    return from_dict(values)


def from_dict(values: Any) -> Report:
    """Report from plain values, every one of them checked."""
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise FormatError(f'expected a report that Report.to_json wrote ("format": "{FORMAT}"), got {_short(values)}')
    if values.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"this version of knowiso_train reads reports of format version {FORMAT_VERSION}, got {values.get('format_version')!r}; "
            "read it with the version that wrote it, or measure again"
        )
    rest = {name: value for name, value in values.items() if name not in ("format", "format_version")}
    return Report(**_read(rest, _REPORT, "the report"))


def _read(values: Any, readers: dict[str, Callable[[Any], Any]], where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise FormatError(f"{where}: expected an object, got {_short(values)}")
    missing, unknown = [name for name in readers if name not in values], [name for name in values if name not in readers]
    if missing or unknown:
        lacks = f"missing {missing or 'nothing'}, unknown {unknown or 'nothing'}"
        raise FormatError(f"{where}: {lacks}; the file is not what format version {FORMAT_VERSION} writes")
    found = {}
    for name, reader in readers.items():
        try:
            found[name] = reader(values[name])
        except FormatError:
            raise
        except (TypeError, ValueError) as error:
            raise FormatError(f"{where}: {name!r} must be {error}, got {_short(values[name])}") from error
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("text")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("a whole number")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("true or false")
    return value


def _number(value: Any) -> float:
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("a number")
    return float(value)


def _maybe_number(value: Any) -> float | None:
    return None if value is None else _number(value)


def _direction(value: Any) -> str:
    if value not in DIRECTIONS:
        raise ValueError(f"one of {DIRECTIONS}")
    return str(value)


def _many(reader: Callable[[Any], Any], count: int | None = None) -> Callable[[Any], tuple[Any, ...]]:
    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or (count is not None and len(value) != count):
            raise TypeError(f"a list{'' if count is None else f' of {count}'}")
        return tuple(reader(item) for item in value)

    return read


def _named(reader: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise TypeError("an object")
        return {_text(name): reader(item) for name, item in value.items()}

    return read


def _setting(value: Any) -> Any:
    """Free-form: only the strings that stand for what JSON cannot say are read back."""
    if isinstance(value, Mapping):
        return {name: _setting(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_setting(item) for item in value]
    return float(value) if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity") else value


def _pair(value: Any) -> PairResult:
    name = f"{value.get('source')} → {value.get('target')}" if isinstance(value, Mapping) else "a pair"
    found = _read(value, _PAIR, f"pair {name}")
    if not len(found["shares"]) == len(found["share_intervals"]) == len(found["component_variances"]):
        raise FormatError(f"pair {name}: expected one share, interval and component variance per order, got different numbers of them")
    return PairResult(**found)


_PAIR: dict[str, Callable[[Any], Any]] = {
    "source": _text,
    "target": _text,
    "direction": _direction,
    "shares": _many(_number),
    "unexplained": _number,
    "interval": _many(_number, 2),
    "share_intervals": _many(_many(_number, 2)),
    "noise_floor": _maybe_number,
    "component_variances": _many(_number),
    "additive": _flag,
    "source_channels": _whole,
    "target_channels": _whole,
    "source_grid": _many(_whole, 2),
    "target_grid": _many(_whole, 2),
    "ridge": _many(_number),
    "rows": _whole,
    "warnings": _many(_text),
}
_REPORT: dict[str, Callable[[Any], Any]] = {
    "source": _text,
    "target": _text,
    "pairs": _many(_pair),
    "images": _named(_whole),
    "settings": _named(_setting),
    "seconds": _number,
    "versions": _named(_text),
}


def _plain(value: Any) -> Any:
    if isinstance(value, PairResult):
        return {name: _plain(getattr(value, name)) for name in _PAIR}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.item() if hasattr(value, "item") else str(value)  # NumPy and torch scalars; else a dtype, a path


def _portable(value: Any) -> Any:
    """JSON has no NaN or infinity."""
    if isinstance(value, dict):
        return {name: _portable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_portable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
