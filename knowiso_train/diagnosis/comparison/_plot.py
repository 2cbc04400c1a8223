"""Figure of a comparison of stages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from knowiso_train.diagnosis.comparison.render import shown_tables
from knowiso_train.errors import OptionError
from knowiso_train.measurement._plot import FIGURE_WIDTH_INCHES, new_figure, save_figure
from knowiso_train.measurement.render import HATCH_COLOR, MUTED_COLOR
from knowiso_train.pages.colors import ORDER_COLORS, TEXT_COLOR, ramp

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from knowiso_train.diagnosis.comparison.report import StageComparison, StageFigure
    from knowiso_train.measurement.report import PairResult

PLOT_HEIGHT_INCHES = 3.4
PLOT_TITLES: dict[StageFigure, str] = {
    "lost": "lost by the stage",
    "gained": "gained by the stage",
    "agreement": "output agrees with the kept part",
}
INTERVAL_OPACITY = 0.18
MAX_STAGE_TICKS, MAX_SLANTED_TICKS = 24, 8


def plot_comparison(comparison: StageComparison, path: str | Path | None, *, title: str | None) -> Figure:
    """Plot shares over the stages; see `StageComparison.plot`."""
    if not comparison.stages:
        raise OptionError("the comparison has no stages, so there is nothing to plot")
    figure = new_figure(FIGURE_WIDTH_INCHES, PLOT_HEIGHT_INCHES, title, "StageComparison.plot")
    names = [name for name in PLOT_TITLES if name in shown_tables(comparison)]
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        _draw_curves(axes, comparison, name)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), fontsize=8, frameon=False)
    if path is not None:
        save_figure(figure, Path(path))
    return figure


def _draw_curves(axes: Axes, comparison: StageComparison, name: StageFigure) -> None:
    """Draw a figure of every layer over the stages, with the intervals of shares."""
    steps = [stage.step for stage in comparison]
    has_steps = all(step is not None for step in steps)
    x = [float(step) for step in steps if step is not None] if has_steps else list(map(float, range(len(steps))))
    for layer, color in zip(comparison.layers, ramp(ORDER_COLORS[:3], len(comparison.layers)), strict=True):
        axes.plot(x, comparison.curve(layer, name), color=color, marker="o", markersize=3, linewidth=1.4, label=layer)
        if name in ("lost", "gained"):
            entries = [next((entry for entry in stage if entry.layer == layer), None) for stage in comparison]
            bounds = [
                (float("nan"),) * 2 if entry is None else _interval(entry.of_reference, entry.of_stage, name)
                for entry in entries
            ]
            low, high = zip(*bounds, strict=True)
            axes.fill_between(x, low, high, color=color, alpha=INTERVAL_OPACITY, linewidth=0)
    axes.set_title(PLOT_TITLES[name], fontsize=9, color=TEXT_COLOR, loc="left")
    values = [value for layer in comparison.layers for value in comparison.curve(layer, name)]
    # Shares on held-out images can exceed 1
    top = max([1.0, *filter(math.isfinite, values)])
    axes.set_ylim(0, top * 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    if has_steps:
        axes.set_xlabel("step or epoch", fontsize=8, color=MUTED_COLOR)
    else:
        every = -(-len(x) // MAX_STAGE_TICKS)
        slant = {"rotation": 30, "ha": "right"} if len(x) <= MAX_SLANTED_TICKS else {"rotation": 90}
        axes.set_xticks(x[::every], comparison.names[::every], **slant)
    axes.tick_params(labelsize=7, length=2, colors=MUTED_COLOR)
    axes.grid(axis="y", color=HATCH_COLOR, linewidth=0.4)
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)


def _interval(of_reference: PairResult, of_stage: PairResult, name: StageFigure) -> tuple[float, float]:
    return of_reference.interval if name == "lost" else of_stage.interval
