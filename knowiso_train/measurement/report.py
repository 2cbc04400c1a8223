"""What a measurement found: one `PairResult` per layer pair and direction, together a `Report`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowiso_train.errors import LayerNameError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIRECTIONS = ("forward", "backward")


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
        noise_floor: explained share that is left when targets are shuffled between images; None where it was not asked for.
        component_variances: Var(x^(k)) / Var(x_B) as the paper reports it; components are correlated, so these need not add up.
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

        The name of the explained layer is looked for first, then that of the layer explained from. Without a direction the forward pairs answer,
        or the backward pairs where only those were measured.

        Raises:
            LayerNameError: no such layer, or several pairs with it; the message lists them.
        """
        name, direction = key if isinstance(key, tuple) else (key, "forward" if self.forward else "backward")
        if direction not in DIRECTIONS:
            raise LayerNameError(f"expected report[layer] or report[layer, direction] with direction one of {DIRECTIONS}, got {key!r}")
        pairs = self.forward if direction == "forward" else self.backward
        found = [pair for pair in pairs if pair.target == name] or [pair for pair in pairs if pair.source == name]
        if len(found) == 1:
            return found[0]
        listed = ", ".join(f"{pair.source} → {pair.target}" for pair in found or pairs) or "none"
        if found:
            raise LayerNameError(f"{name!r} is in {len(found)} {direction} pairs: {listed}. Pick one from report.{direction}.")
        raise LayerNameError(f"no {direction} pair has a layer {name!r}; measured: {listed}")

    def __str__(self) -> str:
        from knowiso_train.measurement.table import render_text

        return render_text(self)

    def _repr_html_(self) -> str:
        from knowiso_train.measurement.html import render_html

        return render_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, without the disentanglers; `from_dict` reads it."""
        from knowiso_train.measurement.storage import to_dict

        return to_dict(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """Strict JSON, NaN and Inf as strings; also written to `path` where one is given."""
        from knowiso_train.measurement.storage import to_json

        return to_json(self, path)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """The inverse of `to_dict`.

        Raises:
            FormatError: another format version, or values that are no report.
        """
        from knowiso_train.measurement.storage import from_dict

        return from_dict(values)

    @classmethod
    def from_json(cls, source: str | Path) -> Report:
        """Read what `to_json` wrote.

        Args:
            source: a path, or the JSON text itself.

        Raises:
            FormatError: no such file, no JSON, another format version, or values that are no report.
        """
        from knowiso_train.measurement.storage import from_json

        return from_json(source)

    def plot(self, path: str | Path | None = None, *, title: str | None = None) -> Figure:
        """Stacked bars per layer pair, one panel per direction; saved to `path` where one is given (.png, .pdf, .svg).

        Raises:
            MissingDependencyError: matplotlib is not installed.
            OptionError: a file type that matplotlib cannot write.
        """
        from knowiso_train.measurement.plot import plot

        return plot(self, path, title=title)
