"""Curves of measurements over training steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowiso_train.callbacks.history import Measurement, metric_prefix
from knowiso_train.errors import OptionError
from knowiso_train.measurement._plot import new_figure, save_figure, shorten
from knowiso_train.measurement.render import MUTED_COLOR, UNEXPLAINED_COLOR, pair_name
from knowiso_train.pages.charts import Axis
from knowiso_train.pages.colors import TEXT_COLOR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from knowiso_train.measurement.report import PairResult

CURVES_WIDTH_INCHES, CURVES_HEIGHT_INCHES, LEGEND_LINE_INCHES = 7.5, 4.0, 0.18
# Colors of Okabe and Ito (2008) without yellow, distinguishable by color-blind readers, and a marker of each
CURVE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222")
CURVE_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MAX_LINE_CHARACTERS, SIGN_CHARACTERS = 108, 8  # of a line of the legend, and of the sign before a name
MIN_CURVES_SHARE = 0.05  # length of the axis, so that differences within the noise do not fill the picture
# Noise floors that would lengthen the axis more, or those of more pairs, are written instead of drawn
MAX_AXIS_GROWTH, MAX_NOISE_FLOORS = 2.0, 4
MAX_STEP_TICKS = 8


def plot_curves(history: Sequence[Measurement], path: str | Path) -> Figure:
    """Plot the explained share of each layer pair over the training steps, with its noise floor as a dotted line.

    Args:
        history: Measurements in order, with the student as source and the teacher as target.
        path: File to write.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OptionError: The history is empty.
    """
    if not history:
        raise OptionError("the history is empty, so there are no curves to draw; call measure() or step() first")
    last = history[-1].report
    labels = [_label(pair) for pair in last]
    longest = max((len(label) for label in labels), default=0) + SIGN_CHARACTERS
    num_columns = max(1, min(len(labels), MAX_LINE_CHARACTERS // longest))
    num_lines = math.ceil(len(labels) / num_columns) + 1
    height = CURVES_HEIGHT_INCHES + LEGEND_LINE_INCHES * num_lines
    figure = new_figure(CURVES_WIDTH_INCHES, height, None, "the picture of the monitor")
    axes = figure.subplots()
    styles = [_style(i) for i in range(len(labels))]
    values = [_percentages(history, pair, "share") for pair in last]
    for (steps, shares), label, style in zip(values, labels, styles, strict=True):
        axes.plot(steps, shares, label=label, linewidth=1.8, markersize=4.5, **style)
    note = _draw_noise_floors(axes, history, [share for _, shares in values for share in shares], styles)
    axes.set_title(
        f"Features of the teacher ({last.target}) that the student ({last.source}) explains",
        fontsize=10.5,
        color=TEXT_COLOR,
        loc="left",
        pad=8,
    )
    _format_axes(axes, [measurement.step for measurement in history])
    legend = figure.legend(
        loc="outside lower center",
        ncols=num_columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=TEXT_COLOR,
        title=note,
        title_fontsize=8.5,
    )
    legend.get_title().set_color(MUTED_COLOR)
    save_figure(figure, Path(path))
    return figure


def _draw_noise_floors(
    axes: Axes, history: Sequence[Measurement], shares: Sequence[float], styles: Sequence[dict[str, Any]]
) -> str:
    """Set the axis around the shares, draw the noise floors if they are near, and return the text about them."""
    floors = [_percentages(history, pair, "noise_floor") for pair in history[-1].report]
    finite = [floor for _, values in floors for floor in values if math.isfinite(floor)]
    near, wide = _axis(shares), _axis([*shares, *finite])
    growth = (wide.high - wide.low) / (near.high - near.low)
    are_drawn = growth <= MAX_AXIS_GROWTH and len(floors) <= MAX_NOISE_FLOORS
    limits = wide if are_drawn else near
    axes.set_ylim(100 * limits.low, 100 * limits.high)
    if not finite:
        return ""
    if not are_drawn:
        return f"Noise floors (not drawn): at most {max(finite):.1f} %"
    for (steps, values), style in zip(floors, styles, strict=True):
        axes.plot(steps, values, color=style["color"], linewidth=1.1, linestyle=":")
    return "Dotted: noise floor of the curve in the same color"


def _axis(percentages: Sequence[float]) -> Axis:
    """Return the axis around finite percentages, of at least the minimum length."""
    shares = [value / 100 for value in percentages if math.isfinite(value)] or [0.0]
    margin = max(0.0, MIN_CURVES_SHARE - (max(shares) - min(shares))) / 2
    return Axis.around([min(shares) - margin, max(shares) + margin])


def _percentages(history: Sequence[Measurement], pair: PairResult, name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a metric of a pair was measured, and its values in percent."""
    key = f"{metric_prefix(pair)}/{name}"
    points = [(step, metrics[key]) for step, metrics in ((m.step, m.metrics) for m in history) if key in metrics]
    return [step for step, _ in points], [100 * value for _, value in points]


def _style(i: int) -> dict[str, Any]:
    """Return color, marker and line of a curve; the combination differs for each of 112 curves."""
    return {
        "color": CURVE_COLORS[i % len(CURVE_COLORS)],
        "marker": CURVE_MARKERS[i % len(CURVE_MARKERS)],
        "linestyle": "-" if i // len(CURVE_COLORS) % 2 == 0 else "--",
    }


def _label(pair: PairResult) -> str:
    """Return the layers of a pair as they fit into a line of the legend."""
    role = "" if pair.direction == "forward" else " (backward: student explained by the teacher)"
    max_characters = MAX_LINE_CHARACTERS - SIGN_CHARACTERS - len(role)
    if len(pair_name(pair)) <= max_characters:
        return pair_name(pair) + role
    max_characters = max_characters if pair.source == pair.target else (max_characters - len(" → ")) // 2
    names = dict.fromkeys(shorten(name, max_characters) for name in (pair.source, pair.target))
    return " → ".join(names) + role


def _format_axes(axes: Axes, steps: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("training step", fontsize=8.5, color=MUTED_COLOR)
    axes.set_ylabel("explained share on held-out images, %", fontsize=8.5, color=MUTED_COLOR)
    if len(steps) <= MAX_STEP_TICKS:
        axes.set_xticks(steps)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(axis="both", length=0, labelsize=8, labelcolor=MUTED_COLOR)
    axes.grid(axis="y", color=UNEXPLAINED_COLOR, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
