"""Curves of measurements over training steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from knowiso_train.callbacks.history import Measurement, metric_prefix
from knowiso_train.errors import MissingDependencyError, OptionError
from knowiso_train.measurement.render import MUTED_COLOR, NOISE_FLOOR_COLOR, UNEXPLAINED_COLOR
from knowiso_train.pages.colors import TEXT_COLOR, order_colors
from knowiso_train.utils.serialization import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES_SIZE_INCHES, CURVES_DPI = (7.5, 4.2), 160
NUM_PALE_COLORS = 4  # colors at the light end of the scale, too pale for a line


def plot_curves(history: Sequence[Measurement], path: str | Path) -> Figure:
    """Plot the explained share of each layer pair over the training steps, with its noise floor as a dotted line.

    Args:
        history: Measurements in order.
        path: File to write.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OptionError: The history is empty.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            'share curves need matplotlib, which is not installed; pip install "knowiso_train[plots]"'
        ) from error
    if not history:
        raise OptionError("the history is empty, so there are no curves to draw; call measure() or step() first")

    last = history[-1].report
    figure = Figure(figsize=CURVES_SIZE_INCHES, dpi=CURVES_DPI, layout="constrained", facecolor="white")
    axes = figure.subplots()
    for pair, color in zip(last, order_colors(len(last) + NUM_PALE_COLORS), strict=False):
        prefix = metric_prefix(pair)
        points = [(measurement.step, measurement.metrics) for measurement in history]
        points = [(step, metrics) for step, metrics in points if f"{prefix}/share" in metrics]
        steps = [step for step, _ in points]
        shares = [100 * metrics[f"{prefix}/share"] for _, metrics in points]
        noise_floors = [100 * metrics.get(f"{prefix}/noise_floor", math.nan) for _, metrics in points]
        name = prefix.removeprefix("iso/val/").replace("→", " → ").replace("/backward", " (backward)")
        axes.plot(steps, shares, color=color, linewidth=1.8, marker="o", markersize=3.5, label=name)
        axes.plot(steps, noise_floors, color=NOISE_FLOOR_COLOR, linewidth=0.9, linestyle=":")
    axes.plot([], [], color=NOISE_FLOOR_COLOR, linewidth=0.9, linestyle=":", label="noise floor")
    axes.set_title(f"{last.target} explained from {last.source}", fontsize=10.5, color=TEXT_COLOR, loc="left", pad=8)
    axes.set_xlabel("training step", fontsize=8.5, color=MUTED_COLOR)
    axes.set_ylabel("explained share on held-out images, %", fontsize=8.5, color=MUTED_COLOR)
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 100)
    axes.tick_params(axis="both", length=0, labelsize=8, labelcolor=MUTED_COLOR)
    axes.grid(axis="y", color=UNEXPLAINED_COLOR, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5, labelcolor=TEXT_COLOR)
    with replace_file(path) as partial:
        figure.savefig(partial, dpi=CURVES_DPI)
    return figure
