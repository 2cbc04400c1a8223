"""Report of a measurement, and its JSON form."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from knowiso_train.errors import FormatError, LayerNameError
from knowiso_train.measurement._plot import plot
from knowiso_train.measurement.config import DIRECTIONS, Direction
from knowiso_train.measurement.render import render_html, render_text
from knowiso_train.utils.serialization import dump_json, parse_json, read_json, to_plain, write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_FORMAT = "knowiso_train.Report"
REPORT_FORMAT_VERSION = 1
MAX_INTEGER = 2**53


@dataclass(frozen=True)
class PairResult:
    """Figures of one layer pair in one direction, all measured on the report images.

    Attributes:
        source: Explaining layer.
        target: Explained layer.
        direction: "forward" (source network → target network) or "backward".
        shares: Explained share of each order 0…K.
        unexplained: Share of the variance that no order explains (fraction of variance unexplained, 1 − R²).
        interval: 95 % bootstrap interval of `unexplained` over images.
        share_intervals: 95 % bootstrap intervals of `shares`.
        noise_floor: Explained share after a permutation of the targets between images. None: not measured.
        component_variances: Var(x^(k)) / Var(x_B) of arXiv 1908.01581. Components are correlated, so the sum is not 1.
        additive: True if shares and unexplained sum to 1. False if `shares` are the paper's component variances.
        source_channels: Channels of the explaining layer.
        target_channels: Channels of the explained layer.
        source_grid: (height, width) of the explaining layer.
        target_grid: (height, width) of the explained layer.
        ridge: Relative ridge of each order.
        rows: Number of samples (positions × images) of the order-0 fit.
        warnings: Conditions that limit the accuracy of the figures.
        disentangler: Fitted maps; neither saved with the report nor compared.
    """

    source: str
    target: str
    direction: Direction
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
        """Share that all orders explain together."""
        return 1 - self.unexplained


@dataclass(frozen=True)
class Report:
    """Results of one measurement: printable, indexable by layer name, savable as JSON, plottable.

    Attributes:
        source: Name of the source network.
        target: Name of the target network.
        pairs: One result per layer pair and direction.
        images: Numbers of images to fit, select and report on.
        settings: Options that determine the figures: order, kernel_size, solver, seed, …
        seconds: Wall-clock time.
        versions: Versions of the packages that affect the figures.

    Example:
        >>> pair = PairResult(
        ...     source="conv", target="conv", direction="forward", shares=(0.5, 0.25), unexplained=0.25,
        ...     interval=(0.24, 0.26), share_intervals=((0.49, 0.51), (0.24, 0.26)), noise_floor=0.01,
        ...     component_variances=(0.5, 0.25), additive=True, source_channels=8, target_channels=8,
        ...     source_grid=(4, 4), target_grid=(4, 4), ridge=(0.0, 0.0), rows=960,
        ... )
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
        """Pairs in which the source network explains the target network."""
        return tuple(pair for pair in self.pairs if pair.direction == "forward")

    @property
    def backward(self) -> tuple[PairResult, ...]:
        """Pairs in which the target network explains the source network."""
        return tuple(pair for pair in self.pairs if pair.direction == "backward")

    def roles(self, direction: str) -> tuple[str, str]:
        """Return the names of the explaining and of the explained network."""
        return (self.source, self.target) if direction == "forward" else (self.target, self.source)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[PairResult]:
        return iter(self.pairs)

    def __getitem__(self, key: str | tuple[str, str]) -> PairResult:
        """Return the pair of a layer: `report["layer3"]`, or `report["layer3", "backward"]`.

        Explained layers take precedence over explaining layers of the same name. The default direction is forward, or
        backward if only that was measured.

        Raises:
            LayerNameError: No pair or several pairs have this layer; the message lists them.
        """
        name, direction = key if isinstance(key, tuple) else (key, "forward" if self.forward else "backward")
        if direction not in DIRECTIONS:
            raise LayerNameError(
                f"expected report[layer] or report[layer, direction] with direction one of {DIRECTIONS}, got {key!r}"
            )
        pairs = self.forward if direction == "forward" else self.backward
        matches = [pair for pair in pairs if pair.target == name] or [pair for pair in pairs if pair.source == name]
        if len(matches) == 1:
            return matches[0]
        listed = ", ".join(f"{pair.source} → {pair.target}" for pair in matches or pairs) or "none"
        if matches:
            raise LayerNameError(
                f"{name!r} is in {len(matches)} {direction} pairs: {listed}. Pick one from report.{direction}."
            )
        raise LayerNameError(f"no {direction} pair has a layer {name!r}; measured: {listed}")

    def __str__(self) -> str:
        return render_text(self)

    def _repr_html_(self) -> str:
        return render_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers for `from_dict`, without the disentanglers."""
        content = {"format": REPORT_FORMAT, "format_version": REPORT_FORMAT_VERSION} | _saved_values(self)
        plain: dict[str, Any] = to_plain(content | {"pairs": [_saved_values(pair) for pair in self.pairs]})
        return plain

    def to_json(self, path: str | Path | None = None) -> str:
        """Return strict JSON, with NaN and infinities as strings.

        Args:
            path: File to write as well. None: no file.
        """
        text = dump_json(self.to_dict()) + "\n"
        if path is not None:
            write_file(path, text)
        return text

    @classmethod
    def from_dict(cls, values: Any) -> Report:
        """Create a report from the values of `to_dict`.

        Raises:
            FormatError: Another format version, or values of another type than the fields.
        """
        if not isinstance(values, Mapping) or values.get("format") != REPORT_FORMAT:
            raise FormatError(
                f'expected a report of Report.to_json ("format": "{REPORT_FORMAT}"), got {_abbreviate(values)}'
            )
        if values.get("format_version") != REPORT_FORMAT_VERSION:
            raise FormatError(
                f"expected a report of format version {REPORT_FORMAT_VERSION}, got {values.get('format_version')!r}; "
                "read it with the version of knowiso_train that wrote it, or measure again"
            )
        content = {name: value for name, value in values.items() if name not in ("format", "format_version")}
        report: Report = _read_fields(content, Report, "the report")
        return report

    @classmethod
    def from_json(cls, source: str | Path) -> Report:
        """Create a report from the JSON of `to_json`.

        Args:
            source: Path of the file, or the JSON text itself.

        Raises:
            FormatError: The file is missing, is not JSON, has another format version, or holds other values.
        """
        is_text = isinstance(source, str) and source.lstrip().startswith(("{", "["))
        origin = "the text" if is_text else str(source)
        try:
            return cls.from_dict(parse_json(str(source)) if is_text else read_json(source))
        except FormatError as error:
            raise FormatError(f"expected a report of Report.to_json in {origin}: {error}") from error
        except ValueError as error:
            raise FormatError(f"expected a report of Report.to_json, but {origin} is no JSON: {error}") from error

    def plot(self, path: str | Path | None = None, *, title: str | None = None) -> Figure:
        """Plot stacked bars per layer pair, with one panel per direction.

        Args:
            path: File to write (.png, .pdf, .svg). None: no file.
            title: Title above the panels. None: no title.

        Raises:
            MissingDependencyError: matplotlib is not installed.
            OptionError: A file type that matplotlib cannot write.
        """
        return plot(self, path, title=title)


def _saved_values(result: Report | PairResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in _saved_fields(type(result))}


def _saved_fields(kind: type[Any]) -> dict[str, Any]:
    """Return the annotations of the fields that are saved: those that are compared."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind) if field.compare}


def _read_fields(values: Any, kind: type[Any], label: str) -> Any:
    """Create a dataclass from plain values, each checked against the annotation of its field."""
    if not isinstance(values, Mapping):
        raise FormatError(f"{label}: expected an object, got {_abbreviate(values)}")
    hints = _saved_fields(kind)
    missing = [name for name in hints if name not in values]
    unknown = [name for name in values if name not in hints]
    if missing or unknown:
        raise FormatError(
            f"{label}: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}; "
            f"the file is not of format version {REPORT_FORMAT_VERSION}"
        )
    result = kind(**{name: _read_value(values[name], hint, f"{label}: {name!r}") for name, hint in hints.items()})
    if (
        kind is PairResult
        and len({len(result.shares), len(result.share_intervals), len(result.component_variances)}) > 1
    ):
        raise FormatError(
            f"{label}: expected one share, interval and component variance per order, got different counts"
        )
    return result


def _read_value(value: Any, hint: Any, label: str) -> Any:
    """Return a plain value as the type of its annotation, or raise an error that names the field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if hint is PairResult:
        layers = f"{value.get('source')} → {value.get('target')}" if isinstance(value, Mapping) else "of layers"
        return _read_fields(value, PairResult, f"pair {layers}")
    if origin in (Union, types.UnionType):  # of a type and None
        return None if value is None else _read_value(value, arguments[0], label)
    if origin is tuple and isinstance(value, list | tuple):
        hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(hints) == len(value):
            return tuple(_read_value(item, hint, label) for item, hint in zip(value, hints, strict=True))
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
