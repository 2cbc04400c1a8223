"""Report of a measurement, and its JSON form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowiso_train.errors import FormatError, LayerNameError
from knowiso_train.measurement.plot import plot
from knowiso_train.measurement.render import DIRECTIONS, render_html, render_text
from knowiso_train.utils.serialization import dump_json, parse_json, to_plain, write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_FORMAT = "knowiso_train.Report"
REPORT_FORMAT_VERSION = 1


@dataclass(frozen=True)
class PairResult:
    """How much of one layer another layer explains, all figures on the report images.

    Attributes:
        source: layer of the network explained from.
        target: layer of the network explained.
        direction: "forward" (source network → target network) or "backward".
        shares: explained share of each order 0..K.
        unexplained: share that no order explains.
        interval: 95 % bootstrap interval over images, of `unexplained`.
        share_intervals: the same for each of `shares`.
        noise_floor: explained share that is left when targets are shuffled between images; None where it was not asked
            for.
        component_variances: Var(x^(k)) / Var(x_B) as the paper reports it; components are correlated, so these need not
            add up.
        additive: True where shares and unexplained sum to 1; False where `shares` are the paper's component variances.
        source_channels, target_channels: widths of the two layers.
        source_grid, target_grid: (height, width) of their positions.
        ridge: relative ridge chosen, per order.
        rows: positions × images that the order-0 map was fitted on.
        warnings: what deserves a second look.
        disentangler: the fitted maps; neither saved with the report nor compared.
    """

    source: str
    target: str
    direction: str
    shares: tuple[float, ...]
    unexplained: float
    interval: tuple[float, float]
    share_intervals: tuple[tuple[float, float], ...]
    noise_floor: float | None
    component_variances: tuple[float, ...]
    additive: bool
    source_channels: int
    target_channels: int
    source_grid: tuple[int, int]
    target_grid: tuple[int, int]
    ridge: tuple[float, ...]
    rows: int
    warnings: tuple[str, ...] = ()
    disentangler: Any = field(default=None, repr=False, compare=False)

    @property
    def explained(self) -> float:
        """What all orders explain together."""
        return 1 - self.unexplained


@dataclass(frozen=True)
class Report:
    """All layer pairs of one measurement; `print` it, index it by layer name, save it, plot it.

    Attributes:
        source, target: names of the networks.
        pairs: one result per layer pair and direction.
        images: how many were used to fit, select and report.
        settings: order, kernel_size, solver, seed, …
        seconds: wall-clock time.
        versions: of the packages that figures depend on.

    Example:
        >>> pair = PairResult("conv", "conv", "forward", (0.5, 0.25), 0.25, (0.24, 0.26), ((0.49, 0.51), (0.24, 0.26)), 0.01,
        ...                   (0.5, 0.25), True, 8, 8, (4, 4), (4, 4), (0.0, 0.0), 960)
        >>> report = Report("small", "large", (pair,), {"fit": 60, "select": 20, "report": 20}, {"order": 1}, 0.1, {})
        >>> report["conv"].explained
        0.75
        >>> Report.from_json(report.to_json()) == report
        True
    """

    source: str
    target: str
    pairs: tuple[PairResult, ...]
    images: dict[str, int]
    settings: dict[str, Any]
    seconds: float
    versions: dict[str, str]

    @property
    def forward(self) -> tuple[PairResult, ...]:
        """Pairs in which the target network is explained from the source network."""
        return tuple(pair for pair in self.pairs if pair.direction == "forward")

    @property
    def backward(self) -> tuple[PairResult, ...]:
        """Pairs in which the source network is explained from the target network."""
        return tuple(pair for pair in self.pairs if pair.direction == "backward")

    def roles(self, direction: str) -> tuple[str, str]:
        """Names of the network explained from and of the network explained."""
        return (self.source, self.target) if direction == "forward" else (self.target, self.source)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[PairResult]:
        return iter(self.pairs)

    def __getitem__(self, key: str | tuple[str, str]) -> PairResult:
        """The pair of a layer: `report["layer3"]`, or `report["layer3", "backward"]`.

        The name of the explained layer is looked for first, then that of the layer explained from. Without a direction
        the forward pairs answer,
        or the backward pairs where only those were measured.

        Raises:
            LayerNameError: no such layer, or several pairs with it; the message lists them.
        """
        name, direction = key if isinstance(key, tuple) else (key, "forward" if self.forward else "backward")
        if direction not in DIRECTIONS:
            raise LayerNameError(
                f"expected report[layer] or report[layer, direction] with direction one of {DIRECTIONS}, got {key!r}"
            )
        pairs = self.forward if direction == "forward" else self.backward
        found = [pair for pair in pairs if pair.target == name] or [pair for pair in pairs if pair.source == name]
        if len(found) == 1:
            return found[0]
        listed = ", ".join(f"{pair.source} → {pair.target}" for pair in found or pairs) or "none"
        if found:
            raise LayerNameError(
                f"{name!r} is in {len(found)} {direction} pairs: {listed}. Pick one from report.{direction}."
            )
        raise LayerNameError(f"no {direction} pair has a layer {name!r}; measured: {listed}")

    def __str__(self) -> str:
        return render_text(self)

    def _repr_html_(self) -> str:
        return render_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, without the disentanglers; `from_dict` reads it."""

        return to_dict(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """Strict JSON, NaN and Inf as strings; also written to `path` where one is given."""

        return to_json(self, path)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """The inverse of `to_dict`.

        Raises:
            FormatError: another format version, or values that are no report.
        """

        return from_dict(values)

    @classmethod
    def from_json(cls, source: str | Path) -> Report:
        """Read what `to_json` wrote.

        Args:
            source: a path, or the JSON text itself.

        Raises:
            FormatError: no such file, no JSON, another format version, or values that are no report.
        """

        return from_json(source)

    def plot(self, path: str | Path | None = None, *, title: str | None = None) -> Figure:
        """Stacked bars per layer pair, one panel per direction; saved to `path` where one is given (.png, .pdf, .svg).

        Raises:
            MissingDependencyError: matplotlib is not installed.
            OptionError: a file type that matplotlib cannot write.
        """
        return plot(self, path, title=title)


def to_dict(report: Report) -> dict[str, Any]:
    """Plain dicts, lists and numbers."""
    head: dict[str, Any] = {"format": REPORT_FORMAT, "format_version": REPORT_FORMAT_VERSION}
    values = {field.name: getattr(report, field.name) for field in fields(Report)}
    values["pairs"] = [{name: getattr(pair, name) for name in _PAIR} for pair in report.pairs]
    plain: dict[str, Any] = to_plain(values)
    return head | plain


def to_json(report: Report, path: str | Path | None) -> str:
    """Text of the report, also written where a path is given."""
    text = dump_json(to_dict(report)) + "\n"
    if path is not None:
        write_file(path, text)
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
            raise FormatError(
                f"expected a report that Report.to_json wrote; {where} cannot be read: {error}"
            ) from error
    try:
        values = parse_json(text)
    except ValueError as error:
        raise FormatError(f"expected a report that Report.to_json wrote; {where} is not JSON: {error}") from error
    return from_dict(values)


def from_dict(values: Any) -> Report:
    """Report from plain values, every one of them checked."""
    if not isinstance(values, Mapping) or values.get("format") != REPORT_FORMAT:
        raise FormatError(
            f'expected a report that Report.to_json wrote ("format": "{REPORT_FORMAT}"), got {_short(values)}'
        )
    if values.get("format_version") != REPORT_FORMAT_VERSION:
        raise FormatError(
            f"this version of knowiso_train reads reports of format version {REPORT_FORMAT_VERSION}, got {values.get('format_version')!r}; "
            "read it with the version that wrote it, or measure again"
        )
    rest = {name: value for name, value in values.items() if name not in ("format", "format_version")}
    return Report(**_read(rest, _REPORT, "the report"))


def _read(values: Any, readers: dict[str, Callable[[Any], Any]], where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise FormatError(f"{where}: expected an object, got {_short(values)}")
    missing, unknown = (
        [name for name in readers if name not in values],
        [name for name in values if name not in readers],
    )
    if missing or unknown:
        lacks = f"missing {missing or 'nothing'}, unknown {unknown or 'nothing'}"
        raise FormatError(f"{where}: {lacks}; the file is not what format version {REPORT_FORMAT_VERSION} writes")
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


def _pair(value: Any) -> PairResult:
    name = f"{value.get('source')} → {value.get('target')}" if isinstance(value, Mapping) else "a pair"
    found = _read(value, _PAIR, f"pair {name}")
    if not len(found["shares"]) == len(found["share_intervals"]) == len(found["component_variances"]):
        raise FormatError(
            f"pair {name}: expected one share, interval and component variance per order, got different numbers of them"
        )
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
    "settings": _named(lambda value: value),
    "seconds": _number,
    "versions": _named(_text),
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
