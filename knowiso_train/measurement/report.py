"""Report of a measurement, and its JSON form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowiso_train.errors import FormatError, LayerNameError
from knowiso_train.measurement._page import report_page
from knowiso_train.measurement._plot import plot
from knowiso_train.measurement._records import records_csv, records_frame
from knowiso_train.measurement.config import DIRECTIONS, Direction
from knowiso_train.measurement.functional import FunctionalShare
from knowiso_train.measurement.render import percent, render_html, render_pair, render_text
from knowiso_train.utils.saved_report import SavedReport
from knowiso_train.utils.serialization import write_if_given

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class PairResult:
    """Figures of one layer pair in one direction, all measured on the report images. Its text is a table.

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
        functional: Output of the explained network with orders 0…k in the feature's place, for k = 0…K. Empty without
            `functional=True`.
        residual_only: Output with the residual of all orders and the feature's mean in its place. None: not measured.
        target_output: The explained network's own output: agreement 1, KL 0 and its top-1. None: not measured.
        similarity: Similarities by name, see `SimilarityMoments`. Empty: not measured.
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
    functional: tuple[FunctionalShare, ...] = field(default_factory=tuple)
    residual_only: FunctionalShare | None = None
    target_output: FunctionalShare | None = None
    similarity: dict[str, float] = field(default_factory=dict)
    disentangler: Any = field(default=None, compare=False)

    @property
    def explained(self) -> float:
        """Share that all orders explain together."""
        return 1 - self.unexplained

    def check_saved(self, label: str) -> None:
        """Check values that were read from a file.

        Raises:
            FormatError: Another number of intervals or component variances than of shares.
        """
        counts = {len(self.shares), len(self.share_intervals), len(self.component_variances)}
        if len(counts | ({len(self.functional)} if self.functional else set())) > 1:
            raise FormatError(
                f"{label}: expected one share, interval and component variance per order, got different counts"
            )

    def __str__(self) -> str:
        return render_pair(self)

    def __repr__(self) -> str:
        return (
            f"PairResult({self.source!r} → {self.target!r}, {self.direction}, {percent(self.unexplained)} unexplained)"
        )


@dataclass(frozen=True)
class Report(SavedReport):
    """Results of one measurement: printable, indexable by layer name, savable as JSON, plottable.

    Attributes:
        source: Name of the source network.
        target: Name of the target network.
        pairs: One result per layer pair and direction.
        images: Numbers of images to fit, select and report on.
        settings: Options that determine the figures: order, kernel_size, solver, seed, …
        seconds: Wall-clock time.
        versions: Versions of the packages that affect the figures.

    Examples:
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

    saved_format = "knowiso_train.Report"

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

    def to_html(self, path: str | Path | None = None, *, title: str | None = None) -> str:
        """Return a page in one HTML file that needs no network access: bars, sortable tables, settings, warnings.

        Args:
            path: File to write as well. None: no file.
            title: Heading of the page. None: the names of both networks.

        Examples:
            >>> page = Report("small", "large", (), {"fit": 60}, {"order": 1}, 0.1, {}).to_html()
            >>> "<h1>small and large: shared features</h1>" in page
            True
        """
        return write_if_given(report_page(self, title), path)

    def to_csv(self, path: str | Path | None = None) -> str:
        """Return one line per layer pair and direction with all figures as fractions of 1, below a header.

        Args:
            path: File to write as well. None: no file.

        Examples:
            >>> Report("small", "large", (), {"fit": 60}, {"order": 1}, 0.1, {}).to_csv().strip()
            'direction,source,target'
        """
        return write_if_given(records_csv(self), path)

    def to_dataframe(self) -> pandas.DataFrame:
        """Return the table of `to_csv` as a pandas data frame.

        Raises:
            MissingDependencyError: pandas is not installed.

        Examples:
            >>> len(Report("small", "large", (), {"fit": 60}, {"order": 1}, 0.1, {}).to_dataframe())
            0
        """
        return records_frame(self)

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
