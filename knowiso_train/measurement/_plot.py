"""Figures of reports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowiso_train.errors import MissingDependencyError, OptionError
from knowiso_train.measurement.render import (
    EXPLAINED_COLOR,
    HATCH_COLOR,
    MUTED_COLOR,
    NOISE_FLOOR_COLOR,
    UNEXPLAINED_COLOR,
    directions,
    interval,
    pair_name,
    roughness_mark,
)
from knowiso_train.pages.charts import clip, stacked_edges
from knowiso_train.pages.colors import TEXT_COLOR, order_colors, text_color_on
from knowiso_train.utils.serialization import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    from knowiso_train.measurement.report import PairResult, Report

FIGURE_WIDTH_INCHES, FIGURE_DPI = 9.0, 160
ROW_HEIGHT_INCHES, MARGIN_HEIGHT_INCHES, TITLE_HEIGHT_INCHES = 0.44, 1.6, 0.35
BAR_HEIGHT_ROWS = 0.62
MIN_LABEL_SHARE = 0.075  # segments narrower than this have no label, in a figure of two panels
MAX_LEGEND_COLUMNS = 5  # which fit with their longest labels
INTERVAL_PAD_POINTS, MARKED_INTERVAL_PAD_POINTS = 4, 10  # without and with markers at the end of a bar
MAX_LABEL_CHARACTERS = 26  # of a layer name
AGREEMENT_MARKERS = {"output agrees (images)": "o", "residual agrees (images)": "X"}
AGREEMENT_STYLE: dict[str, Any] = {
    "color": "white",
    "markeredgecolor": TEXT_COLOR,
    "markeredgewidth": 1.0,
    "markersize": 7,
    "linestyle": "none",
}
MAX_TITLE_CHARACTERS = 84  # over all panels, at the full font size


def plot(report: Report, path: str | Path | None = None, *, title: str | None = None) -> Figure:
    """Plot a report; see `Report.plot`."""
    panels = directions(report)
    if not panels:
        raise OptionError("the report has no layer pairs, so there is nothing to plot")
    num_rows = max(len(pairs) for _, pairs in panels)
    height = ROW_HEIGHT_INCHES * num_rows + MARGIN_HEIGHT_INCHES + (0 if title is None else TITLE_HEIGHT_INCHES)
    figure = new_figure(FIGURE_WIDTH_INCHES, height, title, "Report.plot")
    colors = order_colors(max(len(pair.shares) for pair in report.pairs))
    labels = [[_label(pair) for pair in pairs] for _, pairs in panels]
    same_labels = all(panel == labels[0] for panel in labels)
    panel_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for i, (axes, (direction, pairs)) in enumerate(zip(panel_axes, panels, strict=True)):
        _draw_title(axes, *report.roles(direction), max_characters=MAX_TITLE_CHARACTERS // len(panels))
        for row, pair in enumerate(pairs):
            _draw_pair(axes, row, pair, colors, min_label_share=MIN_LABEL_SHARE * len(panels) / 2)
        _format_axes(axes, pairs, [] if i and same_labels else labels[i])
        if roughness_mark(report):
            label = f"rough: only {report.images['report']} report images"
            axes.set_xlabel(label, fontsize=8.5, color=NOISE_FLOOR_COLOR)
    _draw_legend(figure, report, colors)
    if path is not None:
        save_figure(figure, Path(path))
    return figure


def new_figure(width: float, height: float, title: str | None, method: str) -> Figure:
    """Return an empty white figure.

    Args:
        width: Width in inches.
        height: Height in inches.
        title: Title above the panels. None: no title.
        method: Method that plots, for the error message.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        # Not pyplot: it has global state and selects a back-end
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise MissingDependencyError(
            f'{method} needs matplotlib, which is not installed; pip install "knowiso_train[plots]"'
        ) from error

    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, wspace=0.04)
    figure = Figure(figsize=(width, height), dpi=FIGURE_DPI, layout=layout, facecolor="white")
    if title is not None:
        figure.suptitle(title, fontsize=12, color=TEXT_COLOR, fontweight="bold")
    return figure


def _draw_pair(axes: Axes, row: int, pair: PairResult, colors: list[str], min_label_share: float) -> None:
    """Draw the bar of one pair, its interval and its noise floor."""
    explained = clip(pair.explained)
    axes.barh(
        row,
        1 - explained,
        BAR_HEIGHT_ROWS,
        left=explained,
        color=UNEXPLAINED_COLOR,
        edgecolor=HATCH_COLOR,
        hatch="/////",
        linewidth=0,
    )
    if pair.additive:
        _draw_shares(axes, row, pair, colors, min_label_share)
    else:
        _draw_components(axes, row, pair, colors)
    if 1 - explained >= min_label_share * 1.15 and not math.isnan(pair.unexplained):
        label = _draw_number(axes, (1 + explained) / 2, row, pair.unexplained, TEXT_COLOR)
        label.set_bbox({"facecolor": UNEXPLAINED_COLOR, "edgecolor": "none", "pad": 1.2})
    _draw_interval(axes, row, pair)
    if pair.noise_floor is not None and math.isfinite(pair.noise_floor):
        x, half_height = clip(pair.noise_floor), BAR_HEIGHT_ROWS / 2 + 0.06
        axes.plot(
            [x, x],
            [row - half_height, row + half_height],
            color=NOISE_FLOOR_COLOR,
            linewidth=1.8,
            solid_capstyle="butt",
            zorder=7,
            clip_on=False,
        )
    if pair.functional and pair.residual_only is not None:
        for share, marker in zip((pair.functional[-1], pair.residual_only), AGREEMENT_MARKERS.values(), strict=True):
            if math.isfinite(share.agreement):
                axes.plot(clip(share.agreement), row, marker=marker, zorder=8, clip_on=False, **AGREEMENT_STYLE)


def _draw_shares(axes: Axes, row: int, pair: PairResult, colors: list[str], min_label_share: float) -> None:
    """Draw shares that sum to the explained share as a stacked bar."""
    edges = stacked_edges(pair.shares, clip(pair.explained))
    for share, color, (left, right) in zip(pair.shares, colors, edges, strict=False):
        axes.barh(row, right - left, BAR_HEIGHT_ROWS, left=left, color=color, edgecolor="white", linewidth=0.6)
        if right - left >= min_label_share:
            x = _label_position(pair.noise_floor, left, right)
            _draw_number(axes, x, row, share, text_color_on(color))


def _draw_components(axes: Axes, row: int, pair: PairResult, colors: list[str]) -> None:
    """Draw correlated components, which cannot be stacked: one bar, and a marker per component."""
    axes.barh(row, clip(pair.explained), BAR_HEIGHT_ROWS, color=EXPLAINED_COLOR, linewidth=0)
    for variance, color in zip(pair.component_variances, colors, strict=False):
        axes.plot(
            variance,
            row,
            marker="D",
            markersize=5.5,
            color=color,
            markeredgecolor="white",
            markeredgewidth=0.7,
            linestyle="none",
            zorder=5,
        )


def _draw_interval(axes: Axes, row: int, pair: PairResult) -> None:
    """Draw the interval of the edge between explained and unexplained below the bar, where it covers no number."""
    low, high = 1 - pair.interval[1], 1 - pair.interval[0]
    if not (math.isfinite(low) and math.isfinite(high)):
        return
    low, high, y = clip(low), clip(high), row + BAR_HEIGHT_ROWS / 2 + 0.1
    axes.plot([low, high], [y, y], color=TEXT_COLOR, linewidth=1.1, solid_capstyle="butt", zorder=5)
    for end in (low, high):
        axes.plot([end, end], [y - 0.07, y + 0.07], color=TEXT_COLOR, linewidth=1.1, zorder=5)


def _draw_number(axes: Axes, x: float, row: int, share: float, color: str) -> Text:
    return axes.text(x, row, f"{100 * share:.1f}", ha="center", va="center", fontsize=8, color=color, zorder=6)


def _draw_title(axes: Axes, explaining: str, explained: str, max_characters: int) -> None:
    """Write the names of both networks, in a smaller font if they are long, and shortened beyond that."""
    relation = " explained from "
    max_small_characters = max_characters * 5 // 4
    text = f"{explained}{relation}{explaining}"
    if len(text) > max_small_characters:
        max_name = (max_small_characters - len(relation)) // 2
        text = f"{shorten(explained, max_name)}{relation}{shorten(explaining, max_name)}"
    fontsize = 10.5 if len(text) <= max_characters else 9.0
    axes.set_title(text, fontsize=fontsize, color=TEXT_COLOR, loc="left", pad=8)


def _label_position(noise_floor: float | None, left: float, right: float) -> float:
    """Return the x of a segment's number: its middle, or beside the mark of the noise floor if that would cross it."""
    middle = (left + right) / 2
    if noise_floor is None or math.isnan(noise_floor) or abs(noise_floor - middle) > MIN_LABEL_SHARE / 2:
        return middle
    # The middle of the wider part
    return (noise_floor + right) / 2 if noise_floor <= middle else (left + noise_floor) / 2


def _label(pair: PairResult) -> str:
    """Return the layer names of a pair, in two lines if they are long."""
    name = pair_name(pair)
    if pair.source == pair.target or len(name) <= MAX_LABEL_CHARACTERS:
        return shorten(name, MAX_LABEL_CHARACTERS)
    return f"{shorten(pair.source, MAX_LABEL_CHARACTERS)}\n→ {shorten(pair.target, MAX_LABEL_CHARACTERS - 2)}"


def _format_axes(axes: Axes, pairs: tuple[PairResult, ...], labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), labels, fontsize=9, color=TEXT_COLOR, linespacing=1.05)
    axes.set_ylim(len(pairs) - 0.45, -0.55)  # the first layer on top
    # Variances of correlated components can exceed 1
    variances = [v for pair in pairs if not pair.additive for v in pair.component_variances if math.isfinite(v)]
    largest = max([1.0, *variances])
    axes.set_xlim(0, 1.0 if largest == 1 else largest * 1.04)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25", "50", "75", "100 %"], fontsize=8, color=MUTED_COLOR)
    axes.tick_params(axis="both", length=0, pad=5)
    # The axis counts the explained share, so the interval of the unexplained share is written as numbers
    right = axes.secondary_yaxis("right")
    intervals = [interval(pair.interval).removesuffix(" %") for pair in pairs]
    right.set_yticks(range(len(pairs)), intervals, fontsize=7.5, color=MUTED_COLOR)
    is_marked = any(pair.functional for pair in pairs)
    right.tick_params(length=0, pad=MARKED_INTERVAL_PAD_POINTS if is_marked else INTERVAL_PAD_POINTS)
    right.spines[:].set_visible(False)
    axes.set_xlabel("share of the explained layer's variance", fontsize=8.5, color=MUTED_COLOR)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_legend(figure: Figure, report: Report, colors: list[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    if any(pair.additive for pair in report.pairs):
        handles += [
            Patch(facecolor=color, label=f"order {k}{' (linear)' if k == 0 else ''}") for k, color in enumerate(colors)
        ]
    if not all(pair.additive for pair in report.pairs):
        handles.append(Patch(facecolor=EXPLAINED_COLOR, label="explained"))
        handles += [
            Line2D([], [], marker="D", linestyle="none", color=color, markersize=5.5, label=f"Var(order {k})")
            for k, color in enumerate(colors)
        ]
    handles.append(
        Patch(facecolor=UNEXPLAINED_COLOR, edgecolor=HATCH_COLOR, hatch="/////", linewidth=0, label="unexplained")
    )
    handles.append(
        Line2D(
            [],
            [],
            color=TEXT_COLOR,
            linewidth=1.1,
            marker="|",
            markersize=6,
            label="95 % interval of unexplained (right)",
        )
    )
    if any(pair.noise_floor is not None for pair in report.pairs):
        handles.append(
            Line2D(
                [],
                [],
                color=NOISE_FLOOR_COLOR,
                linewidth=1.8,
                marker="|",
                markersize=9,
                markeredgewidth=1.8,
                linestyle="none",
                label="noise floor",
            )
        )
    if any(pair.functional for pair in report.pairs):
        handles += [
            Line2D([], [], marker=marker, label=label, **AGREEMENT_STYLE) for label, marker in AGREEMENT_MARKERS.items()
        ]
    num_lines = math.ceil(len(handles) / MAX_LEGEND_COLUMNS)
    legend = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=math.ceil(len(handles) / num_lines),
        frameon=False,
        fontsize=8.5,
        labelcolor=TEXT_COLOR,
        handlelength=1.3,
        columnspacing=1.6,
    )
    legend.set_in_layout(True)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the file's suffix.

    Raises:
        OptionError: A suffix that matplotlib cannot write.
    """
    file_types = sorted(figure.canvas.get_supported_filetypes())
    file_type = path.suffix.lstrip(".").lower() or "png"
    if file_type not in file_types:
        raise OptionError(f"cannot write a picture as {path.suffix!r}; expected one of {', '.join(file_types)}")
    with replace_file(path) as partial:
        figure.savefig(partial, dpi=FIGURE_DPI, format=file_type)


def shorten(name: str, max_characters: int) -> str:
    """Return a name without its middle if it is too long, since both ends distinguish layers.

    Examples:
        >>> shorten("encoder.stages.3.blocks.12.mlp.fc2", 20)
        'encoder.s…12.mlp.fc2'
    """
    if len(name) <= max_characters:
        return name
    head = (max_characters - 1) // 2
    return f"{name[:head]}…{name[len(name) - (max_characters - 1 - head) :]}"
