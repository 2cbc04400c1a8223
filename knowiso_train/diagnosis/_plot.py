"""Figures of a diagnosis and of a stability report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowiso_train.diagnosis.render import KIND_TITLES
from knowiso_train.errors import OptionError
from knowiso_train.measurement._plot import FIGURE_WIDTH_INCHES, new_figure, save_figure
from knowiso_train.measurement.render import MUTED_COLOR, NOISE_FLOOR_COLOR, pair_name
from knowiso_train.pages.colors import ORDER_COLORS, TEXT_COLOR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from knowiso_train.diagnosis.report import Diagnosis, LayerDiagnosis
    from knowiso_train.diagnosis.stability import StabilityFigure, StabilityReport

PANEL_HEIGHT_INCHES, HEADER_HEIGHT_INCHES = 2.1, 0.6
PLOT_CLASSES = 12
COLOR_MAP = "magma"
FIGURE_TITLES = {
    "unexplained": "unexplained share (%)",
    "agreement": "agreement of the explained part (%)",
    "kl": "KL of the explained part",
    "residual_agreement": "agreement of the residual alone (%)",
}


def plot_diagnosis(diagnosis: Diagnosis, path: str | Path | None, *, title: str | None) -> Figure:
    """Plot channels, positions and classes of every result; see `Diagnosis.plot`."""
    if not diagnosis.layers:
        raise OptionError("the diagnosis has no layer pairs, so there is nothing to plot")
    height = PANEL_HEIGHT_INCHES * len(diagnosis.layers) + HEADER_HEIGHT_INCHES
    figure = new_figure(FIGURE_WIDTH_INCHES, height, title, "Diagnosis.plot")
    has_classes = any(layer.classes for layer in diagnosis.layers)
    ratios = [2.2, 1.0, 1.4][: 2 + has_classes]
    panels = figure.subplots(len(diagnosis.layers), len(ratios), squeeze=False, width_ratios=ratios)
    for axes, layer in zip(panels, diagnosis.layers, strict=True):
        _draw_channels(axes[0], layer)
        _draw_positions(figure, axes[1], layer)
        if has_classes:
            _draw_classes(axes[2], layer, diagnosis.class_names)
    if path is not None:
        save_figure(figure, Path(path))
    return figure


def _draw_channels(axes: Axes, layer: LayerDiagnosis) -> None:
    """Draw the unexplained share of each channel, in decreasing order, with the share of all channels as a line."""
    shares = sorted(layer.channels, reverse=True)
    axes.bar(range(len(shares)), shares, width=1.0, color=ORDER_COLORS[1], linewidth=0)
    axes.axhline(layer.pair.unexplained, color=NOISE_FLOOR_COLOR, linewidth=1.2)
    axes.set_title(
        f"{KIND_TITLES[layer.kind]}: {layer.network}, {pair_name(layer.pair)}", fontsize=9, color=TEXT_COLOR, loc="left"
    )
    axes.set_xlabel(f"{len(shares)} channels, by unexplained share", fontsize=8, color=MUTED_COLOR)
    axes.set_xticks([])
    axes.set_xlim(-0.5, len(shares) - 0.5)
    _format_share_axis(axes.yaxis, axes.set_ylim, shares)


def _draw_positions(figure: Figure, axes: Axes, layer: LayerDiagnosis) -> None:
    image = axes.imshow(layer.positions, cmap=COLOR_MAP, vmin=0)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.tick_params(labelsize=7, length=2, colors=MUTED_COLOR)
    axes.set_title("residual energy", fontsize=8.5, color=TEXT_COLOR)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_classes(axes: Axes, layer: LayerDiagnosis, class_names: tuple[str, ...]) -> None:
    classes = layer.classes[:PLOT_CLASSES]
    labels = [
        class_names[entry.label] if entry.label < len(class_names) else f"class {entry.label}" for entry in classes
    ]
    shares = [entry.unexplained for entry in classes]
    axes.barh(range(len(classes)), shares, color=ORDER_COLORS[2], linewidth=0)
    axes.set_yticks(range(len(classes)), labels, fontsize=7, color=TEXT_COLOR)
    axes.set_ylim(max(len(classes), 1) - 0.4, -0.6)
    axes.set_title("unexplained by class", fontsize=8.5, color=TEXT_COLOR)
    _format_share_axis(axes.xaxis, axes.set_xlim, shares)


def _format_share_axis(axis: Any, set_limits: Any, shares: list[float]) -> None:
    set_limits(0, max(shares, default=1.0) * 1.05 or 1.0)
    axis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axis.set_tick_params(labelsize=7, length=2, colors=MUTED_COLOR)
    for spine in ("top", "right"):
        axis.axes.spines[spine].set_visible(False)


def plot_stability(
    report: StabilityReport, path: str | Path | None, *, figure: StabilityFigure, title: str | None
) -> Figure:
    """Plot one matrix per layer; see `StabilityReport.plot`."""
    count = len(report.networks)
    side = max(2.4, 0.55 * count + 1.2)
    drawing = new_figure(side * len(report.layers), side + HEADER_HEIGHT_INCHES, title, "StabilityReport.plot")
    panels = drawing.subplots(1, len(report.layers), squeeze=False)[0]
    matrices = [report.matrix(layer, figure) for layer in report.layers]
    is_share = figure != "kl"
    values = [value for matrix in matrices for row in matrix for value in row if not math.isnan(value)]
    largest = max(values, default=1.0)
    for axes, layer, matrix in zip(panels, report.layers, matrices, strict=True):
        axes.imshow(matrix, cmap=COLOR_MAP, vmin=0, vmax=1 if is_share else largest)
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                if not math.isnan(value):
                    dark = value < 0.6 * (1 if is_share else largest)
                    text = f"{100 * value:.0f}" if is_share else f"{value:.2g}"
                    axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else TEXT_COLOR)
        axes.set_xticks(range(count), report.networks, fontsize=7, rotation=45, ha="right", color=TEXT_COLOR)
        axes.set_yticks(range(count), report.networks, fontsize=7, color=TEXT_COLOR)
        axes.set_title(layer, fontsize=9, color=TEXT_COLOR)
        axes.set_xlabel("explaining", fontsize=8, color=MUTED_COLOR)
    panels[0].set_ylabel(f"explained: {FIGURE_TITLES[figure]}", fontsize=8, color=MUTED_COLOR)
    if path is not None:
        save_figure(drawing, Path(path))
    return drawing
