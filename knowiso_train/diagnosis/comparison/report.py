"""Results of a comparison of stages with a reference network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from knowiso_train.diagnosis.comparison.render import render_comparison, render_stage
from knowiso_train.errors import LayerNameError, OptionError
from knowiso_train.measurement.functional import FunctionalShare
from knowiso_train.measurement.report import PairResult
from knowiso_train.utils.saved_report import SavedReport
from knowiso_train.utils.serialization import write_if_given
from knowiso_train.utils.validation import UnitFloat, checked_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

StageFigure = Literal["kept", "lost", "gained", "agreement", "kl", "lost_agreement"]
FIGURES: tuple[StageFigure, ...] = get_args(StageFigure)
LOSS_TOLERANCE = 0.01  # share of the variance


@dataclass(frozen=True)
class StageLayer:
    """Figures of one layer of a stage beside the reference.

    Attributes:
        layer: Name of the layer in the reference.
        stage_layer: Name of the layer in the stage.
        of_reference: Reference's feature explained from the stage's.
        of_stage: Stage's feature explained from the reference's.
    """

    layer: str
    stage_layer: str
    of_reference: PairResult
    of_stage: PairResult

    @property
    def kept(self) -> float:
        """Share of the reference's feature that the stage reproduces; by order: `of_reference.shares`."""
        return self.of_reference.explained

    @property
    def lost(self) -> float:
        """Share of the reference's feature that the stage does not reproduce: blind spots of the stage."""
        return self.of_reference.unexplained

    @property
    def gained(self) -> float:
        """Share of the stage's feature that the reference does not reproduce."""
        return self.of_stage.unexplained

    def figure(self, name: StageFigure) -> float:
        """Return a figure by its name; NaN if it was not measured.

        Args:
            name: "kept", "lost" or "gained"; or "agreement" and "kl" of the reference's output with the kept part in
                place of the feature, and "lost_agreement" with the lost part alone.

        Raises:
            OptionError: Another name.
        """
        if name not in FIGURES:
            raise OptionError(f"figure must be one of {FIGURES}, got {name!r}")
        if name in ("kept", "lost", "gained"):
            return float(getattr(self, name))
        if name == "lost_agreement":
            residual = self.of_reference.residual_only
            return math.nan if residual is None else residual.agreement
        functional = self.of_reference.functional
        return float(getattr(functional[-1], name)) if functional else math.nan


@dataclass(frozen=True)
class StageResult:
    """Figures of one stage beside the reference, indexable by the reference's layer names.

    Attributes:
        name: Name of the stage.
        step: Step or epoch of a checkpoint. None: no checkpoint.
        layers: One result per layer, in the order in which the reference computes them.
        output: Stage's output compared with the reference's own. None: not measured, or of other classes.
        images: Numbers of images to fit, select and report on.
        seconds: Wall-clock time.
    """

    name: str
    step: int | None
    layers: tuple[StageLayer, ...]
    output: FunctionalShare | None
    images: dict[str, int]
    seconds: float

    def __iter__(self) -> Iterator[StageLayer]:
        return iter(self.layers)

    def __getitem__(self, layer: str) -> StageLayer:
        """Return the result of a layer of the reference.

        Raises:
            LayerNameError: A layer that was not compared; the message lists the layers.
        """
        for entry in self.layers:
            if entry.layer == layer:
                return entry
        raise LayerNameError(
            f"no layer {layer!r} in stage {self.name!r}; compared: {', '.join(entry.layer for entry in self.layers)}"
        )

    def figure(self, layer: str, name: StageFigure) -> float:
        """Return a figure of a layer, or NaN for a layer that was not compared; see `StageLayer.figure`."""
        return next((entry.figure(name) for entry in self.layers if entry.layer == layer), math.nan)

    def __str__(self) -> str:
        return render_stage(self)


@dataclass(frozen=True)
class StageComparison(SavedReport):
    """Kept, lost and gained shares of stages beside a reference: printable, savable, plottable.

    Attributes:
        reference: Name of the reference network.
        stages: One result per stage, in the given order.
        settings: Options that determine the figures.
        seconds: Wall-clock time of this call; stages from files add nothing.
        versions: Versions of the packages that affect the figures.
    """

    saved_format = "knowiso_train.StageComparison"

    reference: str
    stages: tuple[StageResult, ...]
    settings: dict[str, Any]
    seconds: float
    versions: dict[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the stages."""
        return tuple(stage.name for stage in self.stages)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the reference's layers, in the order in which it computes them."""
        return tuple(dict.fromkeys(entry.layer for stage in self.stages for entry in stage.layers))

    def __len__(self) -> int:
        return len(self.stages)

    def __iter__(self) -> Iterator[StageResult]:
        return iter(self.stages)

    def __getitem__(self, name: str) -> StageResult:
        """Return the result of a stage.

        Raises:
            OptionError: No such stage; the message lists the stages.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise OptionError(f"no stage {name!r}; compared: {', '.join(self.names)}")

    def curve(self, layer: str, figure: StageFigure = "lost") -> tuple[float, ...]:
        """Return a figure of a layer for every stage; see `StageLayer.figure`. NaN for stages without the layer.

        Raises:
            LayerNameError: A layer that was not compared.
            OptionError: Another figure.
        """
        if layer not in self.layers:
            raise LayerNameError(f"no layer {layer!r}; compared: {', '.join(self.layers)}")
        return tuple(stage.figure(layer, figure) for stage in self.stages)

    def emerged(self, layer: str) -> tuple[float, ...]:
        """Return the rise of the kept share from each stage to the next; negative where more was lost than emerged.

        Raises:
            LayerNameError: A layer that was not compared.
        """
        kept = self.curve(layer, "kept")
        return tuple(later - earlier for earlier, later in pairwise(kept))

    def loss_start(self, name: str, *, beside: str | None = None, tolerance: float = LOSS_TOLERANCE) -> str | None:
        """Return the layer in which the loss of a stage starts.

        That is the first layer, in the reference's order, whose lost share exceeds that of the other stage in the same
        layer by more than the tolerance: the 95 % interval of the one lies above the interval of the other plus it.

        Args:
            name: Stage.
            beside: Other stage, such as the one before in a chain. None: the reference itself, which loses nothing.
            tolerance: Share of the variance that does not count as a loss.

        Returns:
            Name of the layer, or None if no layer loses that much.

        Raises:
            OptionError: No such stage, or a tolerance outside 0 … 1.
        """
        checked_value("tolerance", tolerance, UnitFloat)
        other = None if beside is None else self[beside]
        for entry in self[name].layers:
            bound = 0.0 if other is None else other[entry.layer].of_reference.interval[1]
            if entry.of_reference.interval[0] > bound + tolerance:
                return entry.layer
        return None

    def __str__(self) -> str:
        return render_comparison(self)

    def to_csv(self, path: str | Path | None = None) -> str:
        """Return one line per stage and layer with all figures as fractions of 1, below a header.

        Args:
            path: File to write as well. None: no file.
        """
        from knowiso_train.diagnosis.comparison._records import comparison_csv

        return write_if_given(comparison_csv(self), path)

    def to_html(self, path: str | Path | None = None, *, title: str | None = None) -> str:
        """Return a page in one HTML file that needs no network access: bars of every stage and layer, tables.

        Args:
            path: File to write as well. None: no file.
            title: Heading of the page. None: the name of the reference.
        """
        from knowiso_train.diagnosis.comparison._page import comparison_page

        return write_if_given(comparison_page(self, title), path)

    def plot(self, path: str | Path | None = None, *, title: str | None = None) -> Figure:
        """Plot lost and gained shares, and the output's agreement, over the stages: one line per layer.

        Args:
            path: File to write (.png, .pdf, .svg). None: no file.
            title: Title above the panels. None: no title.

        Raises:
            MissingDependencyError: matplotlib is not installed.
            OptionError: A file type that matplotlib cannot write, or no stages.
        """
        from knowiso_train.diagnosis.comparison._plot import plot_comparison

        return plot_comparison(self, path, title=title)
